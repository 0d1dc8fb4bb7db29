"""The only place where noise is drawn."""

import numpy as np
import torch
from torch import Tensor


def gaussian(size: int, std: float, generator: np.random.Generator) -> Tensor:
    """Independent normal values of standard deviation ``std``: shape (size,), float32, on the CPU.

    Drawn in float64 and rounded to float32, so the tails are those of the float64 sampler.
    """
    return torch.from_numpy(generator.standard_normal(size) * std).float()


def gaussian_on(size: int, std: float, generator: torch.Generator) -> Tensor:
    """Like `gaussian`, drawn in float32 on the generator's own device."""
    return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32) * std


def gaussian_secure(size: int, std: float, generator: np.random.Generator) -> Tensor:
    """Like `gaussian`, each value the half-sum of four normals of a cryptographic ``generator``.

    One float64 normal can betray the exact real number behind it (Mironov 2012); after a sum of four, inverting the
    rounding is infeasible (Holohan and Braghin 2021, arXiv 2107.10138, section 5). Costs four draws per value.
    """
    total = sum(generator.standard_normal(size) for _ in range(4))
    return torch.from_numpy(np.asarray(total) * (std / 2)).float()

"""Kymatio's 2-D scattering, made usable under ``torch.func``. Imported by ScatterNet only: kymatio is optional."""

import torch

# the front end itself: `kymatio.torch` also imports the 3-D one, which fails with SciPy 1.17
from kymatio.scattering2d.backend.torch_backend import TorchBackend2D
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
from torch import Tensor, nn


class _FunctionalBackend(TorchBackend2D):
    """Kymatio's backend without its assignments into fresh tensors and its custom gradient; vmap accepts neither."""

    @classmethod
    def rfft(cls, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(x[..., 0]))

    @classmethod
    def modulus(cls, x: Tensor) -> Tensor:
        # the constant is below the precision of any modulus that matters, and keeps the slope at 0 finite
        return (x.square().sum(dim=-1, keepdim=True) + 1e-30).sqrt()


def build_front_end(image_size: int, scales: int, angles: int) -> nn.Module:
    """Return a module (..., H, W) -> (..., paths, H / 2**scales, W / 2**scales) whose filters are not saved."""
    front_end = ScatteringTorch2D(J=scales, shape=(image_size, image_size), L=angles)
    front_end.backend = _FunctionalBackend
    for name, filters in list(front_end.named_buffers()):
        front_end.register_buffer(name, filters, persistent=False)
    module: nn.Module = front_end
    return module

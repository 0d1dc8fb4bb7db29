"""Every record's own privacy loss, a PRIVATE diagnostic: it is computed from private records without noise.

Records that contribute less than the clip norm lose less than the guarantee says. At full batch, with noise multiplier
sigma and shares of lengths l_t <= 1 (units of the clip norm), a record's losses compose to those of one Gaussian
mechanism with ``mu = sqrt(sum_t l_t^2) / sigma``, at the steps that this fit made. It is no guarantee: whoever sees it
learns about the record, and the lengths at weights that were not reached are unknown.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor


class RecordLosses:
    """Adds up, over full-batch steps, the squared length of each record's share."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None

    def add(self, lengths: Tensor) -> None:
        """Count one step: lengths (n,) in units of the clip norm, the same records in the same order every time."""
        squares = lengths.detach().double().cpu().square()
        self.squares = squares if self.squares is None else self.squares + squares

    def save(self, folder: Path, noise_multiplier: float, delta: float) -> None:
        """Write ``record_losses.npz`` (mu and epsilon by record) and a histogram, readable by the owner alone."""
        from matplotlib.figure import Figure

        mu = (torch.zeros(0) if self.squares is None else self.squares.sqrt() / noise_multiplier).numpy()
        grid = np.linspace(0.0, max(mu.max(initial=0.0), 1e-6), 200)
        epsilon = np.interp(mu, grid, [gaussian_epsilon(value, delta) for value in grid])
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        np.savez(folder / "record_losses.npz", mu=mu, epsilon=epsilon, delta=delta)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.hist(epsilon, bins=50)
        axes.set(xlabel=f"epsilon of the record at delta {delta:g}", ylabel="records", title="PRIVATE: not for release")
        figure.savefig(folder / "record_losses.png", dpi=120)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of a Gaussian mechanism with sensitivity over noise ``mu`` (Balle and Wang 2018, theorem 8).

    T full-batch steps at noise multiplier sigma are one with ``mu = sqrt(T) / sigma``.

    Example:
        >>> round(gaussian_epsilon(200**0.5 / 52.759, 1e-5), 3)
        1.0
    """
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        return float(ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    found: float = brentq(excess, 0.0, high, xtol=1e-10)
    return found

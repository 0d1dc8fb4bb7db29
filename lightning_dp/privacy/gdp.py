"""Gaussian differential privacy, for planning and for printing what others claim; never for a guarantee of ours.

Dong, Roth and Su 2022 (arXiv 1905.02383). mu-GDP is exact for full-batch Gaussian mechanisms. For subsampled ones it
is a central limit theorem, whose error has no sign: `accounting.py` certifies instead.
"""

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr


def delta_of_mu(mu: float, epsilon: float) -> float:
    """Smallest delta of a mu-GDP mechanism at ``epsilon`` (Corollary 2.13)."""
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def mu_of(epsilon: float, delta: float) -> float:
    """Largest mu at which mu-GDP implies (epsilon, delta).

    Example:
        >>> round(mu_of(1.0, 1e-5), 4)
        0.2681
    """
    found: float = brentq(lambda mu: delta_of_mu(mu, epsilon) - delta, 1e-6, 100.0, xtol=1e-12)
    return found


def epsilon_of(mu: float, delta: float) -> float:
    """Epsilon of a mu-GDP mechanism at ``delta``."""
    found: float = brentq(lambda epsilon: delta_of_mu(mu, epsilon) - delta, 0.0, 50 + mu**2 + 10 * mu, xtol=1e-10)
    return found

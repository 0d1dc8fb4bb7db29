"""From a ledger of releases to epsilon, by independent accountants; and back, from epsilon to the noise multiplier.

* ``pld``: privacy loss distributions of Google's dp-accounting, discretised pessimistically: the certified default.
* ``prv``: the upper estimate of Opacus' FFT accountant (Gopi et al. 2021, arXiv 2106.02848), the second opinion.
* ``rdp``: Renyi accounting of dp-accounting, looser, for what the FFT accountants cannot do in float64.

The central limit theorem of Gaussian DP is not offered: it under-reports (6-fold at q = 0.001, sigma 0.6, 100 steps).
"""

import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution as _PLD
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusRDPAccountant
from opacus.accountants.analysis.prv import (
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    compute_safe_domain_size,
    discretize,
)
from scipy.optimize import brentq
from scipy.special import ndtr

from lightning_dp.errors import ConfigError

Adjacency = Literal["add_remove", "replace_one"]
Accountant = Literal["pld", "prv", "rdp"]

# Below this delta the FFTs of PLD and PRV return float64 rounding error.
SMALLEST_FFT_DELTA = 1e-9
# Above this epsilon PRV runs for minutes; schedules of more segments than this do as well.
_LARGEST_PRV_EPSILON = 50.0
_MOST_FFT_SEGMENTS = 100
_LOG_TOLERANCE = 1e-4
_RELATIONS = {
    "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@dataclass(frozen=True)
class Release:
    """``count`` noisy clipped sums over Poisson batches, alike in their public numbers.

    Args:
        noise_multiplier: standard deviation of the noise over the clip norm.
        sample_rate: probability of each record to be in the batch; 1 is full batch.
        count: how many such sums were released.
        group: part of a public partition of the records to which the batches were confined ("class 3"); "" for all
            records. A record belongs to one part, by itself: what others are there does not move it.
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1
    group: str = ""


def merge(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Neighbours alike in all but the count put together; epsilon does not depend on it."""
    runs = itertools.groupby(releases, key=lambda release: replace(release, count=0))
    merged = (replace(kind, count=sum(release.count for release in run)) for kind, run in runs)
    return tuple(release for release in merged if release.count)


def _by_record(releases: tuple[Release, ...], adjacency: Adjacency) -> list[tuple[Release, ...]]:
    """What a record of each group takes part in: the releases of its group and those of all (parallel composition).

    Raises:
        ConfigError: replace-one with groups, since a replaced record may change its group.
    """
    groups = {release.group for release in releases} - {""}
    if not groups:
        return [releases]
    if adjacency == "replace_one":
        raise ConfigError(
            "privacy.adjacency replace_one does not go with releases by group: a replaced record may be of another "
            "group; set add_remove"
        )
    seen = ((release for release in releases if release.group in ("", group)) for group in groups)
    return list({merge(replace(release, group="") for release in part) for part in seen})


def epsilon(
    releases: Iterable[Release], delta: float, adjacency: Adjacency = "add_remove", accountant: Accountant = "pld"
) -> float:
    """Smallest certified epsilon for ``delta`` of all ``releases`` together, for a record of any group.

    Args:
        releases: the ledger.
        delta: in (0, 1).
        adjacency: "add_remove" (one record more or less: the sum moves by at most the clip norm) or "replace_one"
            (one record changed: by at most twice the clip norm).
        accountant: see the module.

    Raises:
        ConfigError: an FFT accountant with delta below 1e-9, ``rdp`` with ``replace_one``, or ``replace_one`` with
            groups.

    Example:
        >>> round(epsilon([Release(4.0, 1.0)], delta=1e-5), 3)
        0.926
        >>> round(epsilon([Release(1.1, 256 / 60000, 3525)], delta=1e-5), 3)
        1.135
    """
    merged = merge(releases)
    if not merged:
        return 0.0
    if any(release.noise_multiplier == 0 for release in merged):
        return math.inf
    if accountant != "rdp" and delta < SMALLEST_FFT_DELTA:
        raise ConfigError(f"privacy.accountant {accountant} is float64 noise at delta {delta:g}: use rdp below 1e-9")
    account = {"pld": _pld, "prv": _prv, "rdp": _rdp}[accountant]
    return max(account(seen, delta, adjacency) for seen in _by_record(merged, adjacency))


def delta_curve(
    releases: Iterable[Release], epsilons: Sequence[float], adjacency: Adjacency = "add_remove"
) -> list[float]:
    """Smallest certified delta (PLD) at each of ``epsilons`` >= 0, for a record of any group: the whole guarantee.

    Far out, below about 1e-9, it is float64 noise, and never below it.

    Example:
        >>> [round(delta, 4) for delta in delta_curve([Release(1.0, 1.0)], [0.0, 1.0])]
        [0.3829, 0.1269]
    """
    merged = merge(releases)
    if not merged:
        return [0.0] * len(epsilons)
    if any(release.noise_multiplier == 0 for release in merged):
        return [1.0] * len(epsilons)
    curves = [
        _composed(seen, adjacency, 1e-4).get_delta_for_epsilon(list(epsilons)) for seen in _by_record(merged, adjacency)
    ]
    return [float(max(deltas)) for deltas in zip(*curves, strict=True)]


def second_opinion(
    releases: Iterable[Release], delta: float, adjacency: Adjacency, accountant: Accountant
) -> tuple[float, str]:
    """Epsilon by an accountant independent of ``accountant``, and that accountant's name.

    ``prv`` seconds ``pld`` and ``pld`` seconds ``prv``; for ledgers that ``prv`` cannot do in bounded time
    (epsilon above 50, more than 100 segments), and for ``rdp``, Opacus' own RDP does, add-remove only: under
    replace-one it is used at twice the sensitivity (group privacy of a Gaussian), which is valid at rate 1 and is
    returned as infinity otherwise.
    """
    merged = merge(releases)
    if not merged or any(release.noise_multiplier == 0 for release in merged):
        return epsilon(merged, delta, adjacency), "exact"
    if accountant == "prv":
        return epsilon(merged, delta, adjacency, "pld"), "pld"
    most = max(len(seen) for seen in _by_record(merged, adjacency))
    within_prv = delta >= SMALLEST_FFT_DELTA and most <= _MOST_FFT_SEGMENTS
    if accountant == "pld" and within_prv and epsilon(merged, delta, adjacency) <= _LARGEST_PRV_EPSILON:
        return epsilon(merged, delta, adjacency, "prv"), "prv"
    return max(_opacus_rdp(seen, delta, adjacency) for seen in _by_record(merged, adjacency)), "rdp (opacus)"


def calibrate(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    adjacency: Adjacency = "add_remove",
    accountant: Accountant = "pld",
) -> float:
    """Smallest noise multiplier (to one part in five thousand) with which ``steps`` releases stay within the target.

    Guarantee: `epsilon` of the result never exceeds ``target_epsilon``.

    Raises:
        ConfigError: no noise multiplier up to 1e6 reaches the target.
    """
    return calibrate_plan(target_epsilon, delta, [Release(0.0, sample_rate, steps)], adjacency, accountant)


def calibrate_plan(
    target_epsilon: float,
    delta: float,
    plan: Sequence[Release],
    adjacency: Adjacency = "add_remove",
    accountant: Accountant = "pld",
) -> float:
    """As `calibrate`, for releases of several rates and groups at one noise multiplier; theirs are not read."""

    def excess(log_sigma: float) -> float:
        planned = [replace(release, noise_multiplier=math.exp(log_sigma)) for release in plan]
        return epsilon(planned, delta, adjacency, accountant) - target_epsilon

    # Far below the answer a PLD takes seconds. Full-batch Gaussians compose to one, whose classical bound is near.
    steps = sum(release.count for release in plan)
    classical = math.sqrt(steps * 2 * math.log(1.25 / delta)) / target_epsilon
    high = math.log(classical if all(release.sample_rate == 1 for release in plan) else 1.0)
    low = high - math.log(2)
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(1e6):
            raise ConfigError(f"privacy.epsilon {target_epsilon:g} cannot be reached: raise it or lower privacy.steps")
    while excess(low) <= 0 and low > math.log(1e-2):
        low, high = low - math.log(2), low
    if excess(low) <= 0:
        return math.exp(low)
    found: float = brentq(excess, low, high, xtol=_LOG_TOLERANCE)
    while excess(found) > 0:
        found += _LOG_TOLERANCE
    return math.exp(found)


def search_epsilon(releases: Iterable[Release], delta: float, mean: float, shape: float = 1.0) -> float:
    """Epsilon of the best of many runs, of which nothing else is ever shown (Papernot and Steinke 2022, recalled).

    How many runs there are must be drawn at random beforehand, from a truncated negative binomial distribution (shape
    1: geometric; 0: logarithmic; infinite: Poisson), each run with settings drawn anew; the best is chosen by the
    released model alone, or with public data. By RDP, add or remove one record.

    Args:
        releases: the ledger of one run.
        delta: in (0, 1).
        mean: expected number of runs, above 1.
        shape: of the distribution.

    Raises:
        ConfigError: ``mean`` is not above 1, or ``shape`` is negative.

    Example:
        >>> one = [Release(1.1, 256 / 60000, 3525)]
        >>> round(epsilon(one, 1e-5, accountant="rdp"), 2), round(search_epsilon(one, 1e-5, mean=10), 2)
        (1.28, 2.67)
    """
    if not mean > 1 or not shape >= 0:
        raise ConfigError("a search needs a mean number of runs above 1 and a shape of 0 or more: correct them")
    merged = merge(releases)
    if any(release.noise_multiplier == 0 for release in merged):
        return math.inf

    def of(seen: tuple[Release, ...]) -> float:
        parts = [dp_accounting.SelfComposedDpEvent(_event(release), release.count) for release in seen]
        ledger = RdpAccountant(neighboring_relation=_RELATIONS["add_remove"])
        ledger.compose(RepeatAndSelectDpEvent(dp_accounting.ComposedDpEvent(parts), mean, shape))
        return float(ledger.get_epsilon(delta))

    return max(of(seen) for seen in _by_record(merged, "add_remove")) if merged else 0.0


def affordable_steps(
    spent: Sequence[Release],
    release: Release,
    target_epsilon: float,
    delta: float,
    most: int,
    adjacency: Adjacency = "add_remove",
    accountant: Accountant = "pld",
) -> int:
    """How many more times, up to ``most``, ``release`` fits into the budget after ``spent``."""

    def fits(count: int) -> bool:
        ahead = replace(release, count=count)
        return epsilon([*spent, ahead], delta, adjacency, accountant) <= target_epsilon

    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=4096)
def _pld(releases: tuple[Release, ...], delta: float, adjacency: Adjacency) -> float:
    """dp-accounting's PLD; the interval shrinks where its pessimism, at most interval * sqrt(steps) / 2, would show."""
    coarse = _pld_at(releases, delta, adjacency, 1e-4)
    pessimism = 1e-4 * math.sqrt(sum(release.count for release in releases)) / 2
    if pessimism < 0.04 * coarse:
        return coarse
    return min(coarse, _pld_at(releases, delta, adjacency, 1e-5))


def _pld_at(releases: tuple[Release, ...], delta: float, adjacency: Adjacency, interval: float) -> float:
    return float(_composed(releases, adjacency, interval).get_epsilon_for_delta(delta))


def _composed(releases: tuple[Release, ...], adjacency: Adjacency, interval: float) -> _PLD:
    return functools.reduce(_PLD.compose, [_composed_pld(release, adjacency, interval) for release in releases])


def _composed_pld(release: Release, adjacency: Adjacency, interval: float) -> _PLD:
    sigma, rate, count = release.noise_multiplier, release.sample_rate, release.count
    if rate == 1:
        # Full-batch Gaussians compose to a Gaussian, without discretising each of them.
        return _one_pld(sigma / math.sqrt(count), 1.0, adjacency, interval)
    return _one_pld(sigma, rate, adjacency, interval).self_compose(count)


@lru_cache(maxsize=64)
def _one_pld(sigma: float, rate: float, adjacency: Adjacency, interval: float) -> _PLD:
    """Kept, since it costs more than composing it, and one run asks for many numbers of steps."""
    return from_gaussian_mechanism(
        standard_deviation=sigma,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=_RELATIONS[adjacency],
    )


@lru_cache(maxsize=4096)
def _rdp(releases: tuple[Release, ...], delta: float, adjacency: Adjacency) -> float:
    if adjacency == "replace_one" and any(release.sample_rate < 1 for release in releases):
        raise ConfigError("privacy.accountant rdp has no replace_one bound for Poisson batches: use pld or add_remove")
    ledger = RdpAccountant(neighboring_relation=_RELATIONS["add_remove"])
    for release in releases:
        # Replacing a record moves a full-batch sum by twice the clip norm.
        ledger.compose(_event(release, halve=adjacency == "replace_one"), release.count)
    return float(ledger.get_epsilon(delta))


def _event(release: Release, halve: bool = False) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier / (2 if halve else 1))
    return gaussian if release.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(release.sample_rate, gaussian)


def _opacus_rdp(releases: tuple[Release, ...], delta: float, adjacency: Adjacency) -> float:
    if adjacency == "replace_one" and any(release.sample_rate < 1 for release in releases):
        return math.inf
    ledger = OpacusRDPAccountant()
    scale = 2 if adjacency == "replace_one" else 1
    ledger.history = [(release.noise_multiplier / scale, release.sample_rate, release.count) for release in releases]
    return max(0.0, float(ledger.get_epsilon(delta)))


@lru_cache(maxsize=4096)
def _prv(releases: tuple[Release, ...], delta: float, adjacency: Adjacency) -> float:
    # Opacus takes log(1 - q) at q = 1, and warns of a loose RDP bound that only sizes the grid.
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the largest alpha")
        if adjacency == "replace_one":
            return _prv_replace_one(releases, delta)
        ledger = PRVAccountant()
        ledger.history = [(release.noise_multiplier, release.sample_rate, release.count) for release in releases]
        return float(ledger.get_epsilon(delta))


class _ReplaceOnePRV:
    """Privacy loss of (1-q) N(0, s^2) + q N(1, s^2) against (1-q) N(0, s^2) + q N(-1, s^2), units of the clip norm.

    This is the pair dp-accounting uses for replace-one; Opacus has the add-remove pair only.
    """

    def __init__(self, sample_rate: float, noise_multiplier: float) -> None:
        self.sample_rate = sample_rate
        self.noise_multiplier = noise_multiplier

    def cdf(self, t: np.ndarray | float) -> np.ndarray:
        """Probability that the privacy loss is at most ``t``; the loss is odd and increasing in the output x."""
        q, sigma = self.sample_rate, self.noise_multiplier
        size = np.abs(t)
        # loss = t is a quadratic in u = exp(x / s^2): a u^2 - (1-q)(e^t - 1) u - a e^t = 0, a = q exp(-1 / (2 s^2)).
        # Everything is divided by e^t so that large losses do not overflow.
        half = (1 - q) * -np.expm1(-size)
        log_a = math.log(q) - 1 / (2 * sigma**2)
        root = half + np.sqrt(half**2 + 4 * np.exp(2 * log_a - size))
        x = np.sign(t) * sigma**2 * (size + np.log(root) - math.log(2) - log_a)
        return np.asarray((1 - q) * ndtr(x / sigma) + q * ndtr((x - 1) / sigma))


def _prv_replace_one(
    releases: tuple[Release, ...], delta: float, eps_error: float = 0.01, delta_share: float = 1e-3
) -> float:
    """Opacus' discretisation and composition of the replace-one losses, with its error terms added."""
    delta_error = delta * delta_share
    counts = [release.count for release in releases]
    # Tails as for a Gaussian of twice the sensitivity, which dominates the replace-one pair.
    wide = [PoissonSubsampledGaussianPRV(release.sample_rate, release.noise_multiplier / 2) for release in releases]
    bound = compute_safe_domain_size(wide, counts, eps_error, delta_error)
    mesh = eps_error / math.sqrt(sum(counts) * math.log(12 / delta_error) / 2)
    domain = Domain.create_aligned(-bound, bound, mesh)
    losses = [_ReplaceOnePRV(release.sample_rate, release.noise_multiplier) for release in releases]
    cut = [TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
    composed = compose_heterogeneous([discretize(loss, domain) for loss in cut], counts)
    return float(composed.compute_epsilon(delta, delta_error, eps_error)[2])

"""From attack scores and guesses to what they prove: ROC figures, caps under DP, lower bounds on epsilon, p-values.

Pure functions on NumPy arrays. A higher score always means "more likely a member". Lower bounds are statements about
the mechanism that was run, at a confidence; none of them shows that a mechanism is private.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_dp.privacy import gdp

# False alarms that a rate must be made of before it is a figure: 10 have a 95 % interval of half to twice the value.
_RESOLUTION = 10
_LARGEST_EPSILON = 60.0


@dataclass(frozen=True)
class Rate:
    """A rate with its 95 % Clopper-Pearson interval; NaN where too few non-members could be false alarms."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Roc:
    """How well scores tell members from non-members.

    Args:
        auc: area under the ROC curve; 0.5 is guessing.
        auc_error: its standard error (Hanley and McNeil 1982, recalled).
        advantage: largest TPR - FPR over all thresholds; biased upwards in small samples.
        fpr, tpr: the curve, ascending, from (0, 0) to (1, 1).
        members, non_members: how many of each.
    """

    auc: float
    auc_error: float
    advantage: float
    fpr: np.ndarray
    tpr: np.ndarray
    members: int
    non_members: int

    def tpr_at(self, fpr: float) -> Rate:
        """Share of the members found at a false positive rate of at most ``fpr``."""
        if self.non_members * fpr < _RESOLUTION:
            return Rate(math.nan, math.nan, math.nan)
        found = round(float(self.tpr[self.fpr <= fpr + 1e-12].max()) * self.members)
        return Rate(found / self.members, *clopper_pearson(found, self.members, 0.05))


def roc(members: np.ndarray, non_members: np.ndarray) -> Roc:
    """ROC of scores in float64, without binning or rescaling.

    Raises:
        ValueError: a side is empty, or a score is not a number.

    Example:
        >>> found = roc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
        >>> found.auc, found.advantage
        (0.875, 0.5)
    """
    m, n = len(members), len(non_members)
    if not m or not n:
        raise ValueError("an attack needs members and non-members")
    scores = np.concatenate([members, non_members]).astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    # infinite scores keep their place
    scores = np.nan_to_num(scores, posinf=np.finfo(np.float64).max, neginf=np.finfo(np.float64).min)
    truth = np.repeat([1, 0], [m, n])
    auc = float(roc_auc_score(truth, scores))
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (m - 1) * (one - auc**2) + (n - 1) * (two - auc**2)) / (m * n)
    return Roc(auc, math.sqrt(max(0.0, variance)), float((tpr - fpr).max()), fpr, tpr, m, n)


def clopper_pearson(successes: int, trials: int, p: float) -> tuple[float, float]:
    """Two-sided exact interval of a probability at confidence 1 - p."""
    low = 0.0 if successes == 0 else float(stats.beta.ppf(p / 2, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.ppf(1 - p / 2, successes + 1, trials - successes))
    return low, high


@dataclass(frozen=True)
class TradeOff:
    """What a mechanism allows an attacker, from its privacy curve; an upper bound on every attack.

    Args:
        epsilons: of both signs, ascending, with 0.
        deltas: smallest delta at each.
    """

    epsilons: np.ndarray
    deltas: np.ndarray

    @classmethod
    def of_curve(cls, epsilons: Sequence[float], deltas: Sequence[float]) -> "TradeOff":
        """From delta(epsilon) at epsilons >= 0; for add-remove the curve must be that of the worse direction."""
        above, bounds = np.asarray(epsilons, dtype=np.float64), np.asarray(deltas, dtype=np.float64)
        # the same bound with the two data sets exchanged
        mirrored = 1 - np.exp(-above) * (1 - bounds)
        order = np.argsort(-above)
        return cls(np.concatenate([-above[order], above]), np.concatenate([mirrored[order], bounds]))

    @classmethod
    def of_budget(cls, epsilon: float, delta: float) -> "TradeOff":
        """From one (epsilon, delta)."""
        return cls.of_curve([epsilon], [delta])

    @classmethod
    def of_gdp(cls, mu: float) -> "TradeOff":
        """Of a mu-GDP mechanism."""
        grid = np.linspace(0, max(1.0, 8 * mu + mu**2), 400)
        return cls.of_curve(grid.tolist(), [gdp.delta_of_mu(mu, value) for value in grid])

    def most_power(self, fpr: float) -> float:
        """Largest true positive rate of any attack at a false positive rate.

        Example:
            >>> round(TradeOff.of_budget(1.0, 1e-5).most_power(0.01), 3)
            0.027
        """
        return float(np.clip((self.deltas + np.exp(self.epsilons) * fpr).min(), 0.0, 1.0))

    def least_mistakes(self, power: float) -> float:
        """Smallest false positive rate of any attack with a true positive rate: the inverse of `most_power`."""
        return float(max(0.0, (np.exp(-self.epsilons) * (power - self.deltas)).max()))

    def largest_auc(self) -> float:
        """Largest area under the ROC curve of any attack.

        Example:
            >>> round(TradeOff.of_budget(1.0, 0.0).largest_auc(), 3), round(TradeOff.of_gdp(1.0).largest_auc(), 2)
            (0.731, 0.76)
        """
        grid = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 4000)])
        heights = np.clip((self.deltas[:, None] + np.exp(self.epsilons)[:, None] * grid).min(0), 0.0, 1.0)
        return float(np.trapezoid(heights, grid))

    def largest_advantage(self) -> float:
        """Largest TPR - FPR of any attack.

        Example:
            >>> round(TradeOff.of_budget(1.0, 0.0).largest_advantage(), 3)
            0.462
        """
        grid = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 4000)])
        heights = np.clip((self.deltas[:, None] + np.exp(self.epsilons)[:, None] * grid).min(0), 0.0, 1.0)
        return float((heights - grid).max())


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Largest probability of ``right`` or more right guesses under (epsilon, delta)-DP (Steinke, Nasr, Jagielski 2023).

    Every canary was in or out by a fair coin of its own; guesses may abstain. Theorem 5.2 of arXiv 2305.08846
    (recalled; re-derived in the method's specification): Binomial tail and a correction for delta.

    Args:
        canaries: all of them, with those that were abstained on.
        guesses: on how many a guess was made.
        right: how many of these were right.
        epsilon: claimed.
        delta: claimed.

    Example:
        >>> round(one_run_p_value(500, 100, 80, 1.0, 1e-5), 7)
        0.0722827
    """
    tails = stats.binom.sf(np.arange(right, -1, -1) - 1, guesses, expit(epsilon))  # at right, right - 1, ..., 0
    steps = np.arange(1, right + 1)
    extra = float(((tails[1:] - tails[0]) / steps).max()) if right else 0.0
    return min(1.0, float(tails[0]) + 2 * canaries * delta * extra)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, p: float = 0.05) -> float:
    """Largest epsilon that the guesses refute at level ``p``, for this delta; 0 if none.

    Example:
        >>> round(one_run_epsilon(1000, 100, 90, 1e-5), 5), one_run_epsilon(1000, 100, 50, 1e-5)
        (1.62614, 0.0)
    """
    return _largest(lambda epsilon: one_run_p_value(canaries, guesses, right, epsilon, delta) < p, _LARGEST_EPSILON)


def refutes(trade_off: Callable[[float], float], canaries: int, guesses: int, right: int, p: float) -> bool:
    """Whether the guesses refute a trade-off curve at level ``p`` (Mahloujifar, Melis, Chaudhuri 2024, recalled).

    Args:
        trade_off: power -> smallest false positive rate, convex (`TradeOff.least_mistakes`).
        canaries: all of them.
        guesses: on how many a guess was made.
        right: how many of these were right.
        p: level.
    """
    right_mass, wrong_mass = p * right / canaries, p * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        before = wrong_mass
        wrong_mass = max(wrong_mass, trade_off(right_mass))
        right_mass += i / (guesses - i) * (wrong_mass - before)
        if right_mass + wrong_mass > guesses / canaries:
            return True
    return False


def curve_p_value(trade_off: TradeOff, canaries: int, guesses: int, right: int) -> float:
    """Smallest level at which the guesses refute the curve itself: the p-value of the accountant's claim."""
    if right < 1 or not refutes(trade_off.least_mistakes, canaries, guesses, right, 1.0):
        return 1.0
    low, high = -40.0, 0.0  # of log10 p
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (
            (low, middle) if refutes(trade_off.least_mistakes, canaries, guesses, right, 10**middle) else (middle, high)
        )
    return float(10**high)


def gaussian_epsilon(canaries: int, guesses: int, right: int, delta: float, p: float = 0.05) -> float:
    """Epsilon at ``delta`` of the largest mu whose mu-GDP curve the guesses refute; 0 if none.

    It bounds the epsilon of mechanisms whose curve has a Gaussian's shape; print that assumption with it.

    Example:
        >>> round(gaussian_epsilon(1000, 100, 90, 1e-5), 3)
        2.456
    """

    def refuted(mu: float) -> bool:
        return refutes(lambda power: float(ndtr(ndtri(power) - mu)), canaries, guesses, right, p)

    mu = _largest(refuted, 20.0)
    return gdp.epsilon_of(mu, delta) if mu > 0 else 0.0


def counts_epsilon(misses: int, members: int, alarms: int, non_members: int, delta: float, p: float = 0.05) -> float:
    """Lower bound on epsilon from many independent runs at one threshold, by Clopper-Pearson; 0 if none.

    Args:
        misses: members that were called non-members.
        members: trials with the record.
        alarms: non-members that were called members.
        non_members: trials without.
        delta: claimed.
        p: level, split between the two rates.
    """
    fnr, fpr = clopper_pearson(misses, members, p)[1], clopper_pearson(alarms, non_members, p)[1]
    best = 0.0
    for wrong, other in ((fnr, fpr), (fpr, fnr)):
        if 1 - delta - wrong > other > 0:
            best = max(best, math.log((1 - delta - wrong) / other))
    return best


def joint_beta_epsilon(
    misses: int, members: int, alarms: int, non_members: int, delta: float, p: float = 0.05
) -> float:
    """Credible lower bound on epsilon from both rates together (Zanella-Béguelin et al. 2023, recalled).

    The posterior of the two rates is a product of Beta distributions with Jeffreys' prior. The result is the smallest
    epsilon whose permitted region holds the share ``p`` of it: with probability 1 - p the truth is above.
    """
    fnr = stats.beta(0.5 + misses, 0.5 + members - misses)
    fpr = stats.beta(0.5 + alarms, 0.5 + non_members - alarms)

    def inside(epsilon: float) -> float:
        """Posterior mass of what (epsilon, delta)-DP permits."""

        def of_fpr(x: float) -> float:
            low = max(1 - delta - math.exp(epsilon) * x, math.exp(-epsilon) * (1 - delta - x), 0.0)
            high = min(1 - max(math.exp(-epsilon) * (x - delta), 1 - (delta + math.exp(epsilon) * (1 - x)), 0.0), 1.0)
            return float(fpr.pdf(x) * max(0.0, fnr.cdf(high) - fnr.cdf(low)))

        centre, low, high = fpr.median(), fpr.ppf(1e-9), fpr.ppf(1 - 1e-9)
        return float(quad(of_fpr, low, high, points=[centre], limit=200)[0])

    if inside(0.0) >= p:
        return 0.0
    return float(brentq(lambda epsilon: inside(epsilon) - p, 0.0, _LARGEST_EPSILON, xtol=1e-4))


def gaussian_mu(misses: int, members: int, alarms: int, non_members: int, p: float = 0.05) -> float:
    """Lower bound on mu of a Gaussian mechanism from many trials at one threshold, by Clopper-Pearson; 0 if none.

    For a mechanism that is known to be Gaussian: mu is its sensitivity over its noise.

    Args:
        misses: members that were called non-members.
        members: trials with the record.
        alarms: non-members that were called members.
        non_members: trials without.
        p: level, split between the two rates.
    """
    fnr, fpr = clopper_pearson(misses, members, p)[1], clopper_pearson(alarms, non_members, p)[1]
    return max(0.0, float(ndtri(1 - fpr) - ndtri(fnr)))


Verdict = Literal["PASS", "FAIL", "UNDERPOWERED"]


@dataclass(frozen=True)
class OneRunAudit:
    """What the guesses on canaries of one run say of a claim.

    Args:
        verdict: FAIL: the claim is refuted at level ``p``. UNDERPOWERED: not even right guesses alone would refute
            it. PASS: they would have, and the guesses made did not; this is no proof of privacy.
        p_value: of the claimed curve, `curve_p_value`.
        best_p_value: the same if every guess were right.
        epsilon_lower: refuted by `one_run_epsilon` at level ``p``.
        epsilon_lower_gaussian: by `gaussian_epsilon`; holds for Gaussian mechanisms.
        cap: `one_run_epsilon` if every guess were right.
        canaries, guesses, right: how many.
        p: level.
    """

    verdict: Verdict
    p_value: float
    best_p_value: float
    epsilon_lower: float
    epsilon_lower_gaussian: float
    cap: float
    canaries: int
    guesses: int
    right: int
    p: float


def judge(scores: np.ndarray, inside: np.ndarray, guesses: int, claim: TradeOff, delta: float, p: float) -> OneRunAudit:
    """Guess "in" for the highest scores and "out" for the lowest, and hold the result against a claim.

    The number of guesses must be fixed before the scores are seen: the best of several is not valid.

    Args:
        scores: of all canaries, (n,).
        inside: the coins, boolean (n,).
        guesses: how many; half of them "in".
        claim: curve to be tested.
        delta: for the lower bounds.
        p: level.

    Raises:
        ValueError: fewer canaries than guesses, or a score is not a number.
    """
    n, top = len(scores), guesses // 2
    if not 2 <= guesses <= n or np.isnan(scores).any():
        raise ValueError(f"{guesses} guesses need as many canaries, with scores that are numbers; there are {n}")
    order = np.argsort(scores, kind="stable")
    out, into = order[: guesses - top], order[n - top :]
    right = int((~inside[out]).sum() + inside[into].sum())
    p_value, best = curve_p_value(claim, n, guesses, right), curve_p_value(claim, n, guesses, guesses)
    verdict: Verdict = "FAIL" if p_value < p else "PASS" if best < p else "UNDERPOWERED"
    return OneRunAudit(
        verdict,
        p_value,
        best,
        one_run_epsilon(n, guesses, right, delta, p),
        gaussian_epsilon(n, guesses, right, delta, p),
        one_run_epsilon(n, guesses, guesses, delta, p),
        n,
        guesses,
        right,
        p,
    )


def _largest(holds: Callable[[float], bool], most: float) -> float:
    """Largest value up to ``most`` at which a condition, true below some point only, still holds; 0 if nowhere."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, most
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low

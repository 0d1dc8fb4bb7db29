"""What a guarantee means to the people behind the records: caps on attackers, groups, and life without sampling."""

import math
from typing import Any

from lightning_dp.privacy import Release, gdp
from lightning_dp.privacy.accounting import Adjacency, delta_curve
from lightning_dp.privacy.auditing import TradeOff

CURVE = (0.0, *(1e-3 * 1e5 ** (i / 149) for i in range(150)))  # epsilons from 0.001 to 100
_SURE = 0.99  # an attacker who is right so often is stopped by nothing


def cap_of(releases: list[Release], adjacency: Adjacency) -> TradeOff:
    """What releases with noise allow any attacker."""
    return TradeOff.of_curve(CURVE, delta_curve(releases, CURVE, adjacency))


def meaning(releases: list[Release], epsilon: float, delta: float, adjacency: Adjacency) -> dict[str, Any]:
    """Plain figures that a guarantee implies.

    Args:
        releases: the ledger, with noise.
        epsilon: certified for ``delta``.
        delta: of the guarantee.
        adjacency: of the guarantee.

    Returns:
        ``membership_advantage``, ``auc`` and ``tpr_at_fpr_0.01``: the most that any attack on membership can reach, on
        the whole curve of the ledger. ``epsilon_without_amplification``: if it were known who is in which batch.
        ``group_size_meaningless``: so many records of one person, and group privacy no longer excludes an attacker who
        tells their presence from their absence with a certainty of 99 %.
    """
    cap = cap_of(releases, adjacency)
    return {
        "membership_advantage": cap.largest_advantage(),
        "auc": cap.largest_auc(),
        "tpr_at_fpr_0.01": cap.most_power(0.01),
        "epsilon_without_amplification": _without_amplification(releases, delta, adjacency),
        "group_size_meaningless": group_size(epsilon, delta),
    }


def group_size(epsilon: float, delta: float) -> int:
    """Smallest group that (epsilon, delta) does not protect in any useful way.

    A group of k has (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)) (Dwork and Roth 2014, recalled); an
    attacker is right with probability (1 + advantage) / 2 at most.

    Example:
        >>> group_size(1.0, 1e-5), group_size(8.0, 1e-5)
        (5, 1)
    """
    size = 1
    while True:
        grown = math.exp(min(size * epsilon, 700.0))
        of_group = delta * (grown - 1) / math.expm1(epsilon)
        advantage = (grown - 1 + 2 * of_group) / (grown + 1)
        if of_group >= 1 or (1 + advantage) / 2 >= _SURE:
            return size
        size += 1


def _without_amplification(releases: list[Release], delta: float, adjacency: Adjacency) -> float:
    """Closed form of Gaussian sums over all records; batches of a group count for the group."""
    groups = {release.group for release in releases} - {""} or {""}
    squares = [
        sum(release.count / release.noise_multiplier**2 for release in releases if release.group in ("", group))
        for group in groups
    ]
    return gdp.epsilon_of(math.sqrt(max(squares)) * (2 if adjacency == "replace_one" else 1), delta)

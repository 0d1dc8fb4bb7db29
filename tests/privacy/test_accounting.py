import math

import pytest
from scipy.optimize import brentq
from scipy.special import ndtr

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.accounting import (
    Release,
    affordable_steps,
    calibrate,
    calibrate_plan,
    epsilon,
    merge,
    second_opinion,
)

# (sample rate, noise multiplier, steps): epsilon under add-remove and replace-one at delta 1e-5, by PLD.
PINNED = {
    (1e-3, 0.5, 1000): (3.2389, None),
    (1e-3, 1.0, 1000): (0.1490, 0.2289),
    (0.01, 0.7, 1000): (4.6183, 5.7660),
    (0.01, 1.0, 1000): (1.8282, 2.8434),
    (0.1, 1.0, 100): (7.0466, 10.516),
    (0.5, 4.0, 100): (5.8687, 13.078),
    (1.0, 4.0, 1): (0.9263, 1.9931),
    (256 / 60000, 1.1, 3525): (1.1354, 1.9315),
    (4096 / 50000, 3.0, 1000): (3.8827, 8.3235),
}


@pytest.mark.parametrize(("setting", "pinned"), PINNED.items())
def test_epsilon_is_the_pinned_one(setting, pinned):
    rate, sigma, steps = setting
    for adjacency, value in zip(("add_remove", "replace_one"), pinned, strict=True):
        if value is not None:
            assert epsilon([Release(sigma, rate, steps)], 1e-5, adjacency) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("setting", PINNED)
@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_the_two_accountants_agree(setting, adjacency):
    rate, sigma, steps = setting
    releases = [Release(sigma, rate, steps)]
    pld, prv = epsilon(releases, 1e-5, adjacency), epsilon(releases, 1e-5, adjacency, "prv")
    assert 0 <= prv - pld <= 0.02


@pytest.mark.parametrize("setting", [(0.01, 1.0, 1000), (256 / 60000, 1.1, 3525), (1.0, 4.0, 1)])
def test_rdp_is_never_below_pld(setting):
    rate, sigma, steps = setting
    assert epsilon([Release(sigma, rate, steps)], 1e-5, accountant="rdp") >= epsilon(
        [Release(sigma, rate, steps)], 1e-5
    )


def gaussian_epsilon(mu, delta):
    """Balle and Wang 2018, theorem 8, for sensitivity over sigma ``mu``."""

    def excess(value):
        return ndtr(mu / 2 - value / mu) - math.exp(value) * ndtr(-mu / 2 - value / mu) - delta

    return brentq(excess, 0, 100)


@pytest.mark.parametrize(("adjacency", "sensitivity"), [("add_remove", 1), ("replace_one", 2)])
def test_full_batch_is_the_analytic_gaussian(adjacency, sensitivity):
    exact = gaussian_epsilon(sensitivity * math.sqrt(10) / 4, 1e-5)
    assert epsilon([Release(4.0, 1.0, 10)], 1e-5, adjacency) == pytest.approx(exact, abs=1e-3)


def test_epsilon_moves_the_right_way():
    base = epsilon([Release(1.0, 0.01, 1000)], 1e-5)
    assert epsilon([Release(1.0, 0.01, 1100)], 1e-5) > base
    assert epsilon([Release(1.0, 0.02, 1000)], 1e-5) > base
    assert epsilon([Release(1.1, 0.01, 1000)], 1e-5) < base
    assert epsilon([Release(1.0, 0.01, 1000)], 1e-6) > base
    assert epsilon([Release(1.0, 0.01, 1000)], 1e-5, "replace_one") > base


def test_nothing_released_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Release(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon([Release(1.0, 0.1), Release(0.0, 0.1)], 1e-5) == math.inf


def test_order_and_grouping_do_not_matter():
    first, second = Release(1.0, 0.01, 300), Release(2.0, 0.02, 200)
    assert epsilon([first, second], 1e-5) == pytest.approx(epsilon([second, first], 1e-5), rel=1e-6)
    split = [Release(1.0, 0.01, 100), Release(1.0, 0.01, 200), second]
    assert merge(split) == (first, second)


def test_small_delta_needs_rdp():
    with pytest.raises(ConfigError, match="use rdp"):
        epsilon([Release(1.0, 0.01, 10)], 1e-10)
    assert epsilon([Release(4.0, 0.01, 10)], 1e-10, accountant="rdp") > 0


def test_rdp_refuses_replace_one_for_poisson_batches():
    with pytest.raises(ConfigError, match="replace_one"):
        epsilon([Release(1.0, 0.01, 10)], 1e-5, "replace_one", "rdp")


@pytest.mark.parametrize("target", [0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_calibration_reaches_the_target_from_below(target, adjacency):
    sigma = calibrate(target, 1e-5, 0.05, 200, adjacency)
    reached = epsilon([Release(sigma, 0.05, 200)], 1e-5, adjacency)
    assert target * 0.995 <= reached <= target


def test_affordable_steps_is_the_last_that_fits():
    release = Release(1.0, 0.01)
    count = affordable_steps([Release(1.0, 0.01, 100)], release, 1.5, 1e-5, most=1000)
    assert 0 < count < 1000
    assert epsilon([Release(1.0, 0.01, 100 + count)], 1e-5) <= 1.5 < epsilon([Release(1.0, 0.01, 101 + count)], 1e-5)
    assert affordable_steps([Release(0.3, 0.5, 1)], release, 1.5, 1e-5, most=10) == 0


def test_replace_one_counts_in_every_function():
    one, twice = Release(4.0, 1.0, 3), Release(2.0, 1.0, 3)
    replaced = epsilon([one], 1e-5, "replace_one", "rdp")
    assert replaced == pytest.approx(epsilon([twice], 1e-5, "add_remove", "rdp"))
    assert second_opinion([one], 1e-5, "replace_one", "rdp")[0] == second_opinion([twice], 1e-5, "add_remove", "rdp")[0]
    release = Release(1.0, 0.01)
    fewer = affordable_steps([], release, 1.0, 1e-5, 1000, "replace_one")
    assert epsilon([Release(1.0, 0.01, fewer)], 1e-5, "replace_one") <= 1.0
    assert fewer < affordable_steps([], release, 1.0, 1e-5, 1000)


def test_second_opinion_is_another_accountant():
    releases = [Release(1.0, 0.01, 1000)]
    value, name = second_opinion(releases, 1e-5, "add_remove", "pld")
    assert name == "prv"
    assert 0 <= value - 1.8282 <= 0.02
    assert second_opinion(releases, 1e-5, "add_remove", "prv")[1] == "pld"
    # Where PRV would run for minutes.
    large, name = second_opinion([Release(0.7, 0.1, 1000)], 1e-5, "add_remove", "pld")
    assert name == "rdp (opacus)"
    assert large >= 54.02


def test_groups_compose_in_parallel_and_with_what_all_took_part_in():
    """Each record is in one group: the worst group counts, together with the releases without a group."""
    everyone, first, second = Release(2.0, 0.1, 50), Release(2.0, 0.1, 30, "a"), Release(2.0, 0.1, 70, "b")
    alone = epsilon([Release(2.0, 0.1, 70)], 1e-5)
    assert epsilon([first, second], 1e-5) == alone
    assert epsilon([first, everyone, second], 1e-5) == pytest.approx(epsilon([Release(2.0, 0.1, 120)], 1e-5), abs=1e-3)
    assert second_opinion([first, second], 1e-5, "add_remove", "pld")[0] == pytest.approx(alone, abs=0.02)
    assert merge([first, first, second]) == (Release(2.0, 0.1, 60, "a"), second)


def test_groups_are_refused_under_replacement():
    with pytest.raises(ConfigError, match="add_remove"):
        epsilon([Release(2.0, 0.1, 30, "a")], 1e-5, "replace_one")


def test_a_plan_is_calibrated_for_its_worst_group():
    plan = [Release(0.0, 0.1, 30, "a"), Release(0.0, 0.1, 70, "b")]
    assert calibrate_plan(1.0, 1e-5, plan) == pytest.approx(calibrate(1.0, 1e-5, 0.1, 70), rel=1e-3)

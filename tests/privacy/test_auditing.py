"""What scores and guesses prove: pinned values, and that claims that hold are not refuted too often."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from lightning_dp.privacy import Release, gdp
from lightning_dp.privacy import epsilon as certified
from lightning_dp.privacy.accounting import delta_curve
from lightning_dp.privacy.auditing import (
    TradeOff,
    clopper_pearson,
    counts_epsilon,
    curve_p_value,
    gaussian_epsilon,
    joint_beta_epsilon,
    one_run_epsilon,
    one_run_p_value,
    roc,
)

DELTA = 1e-5


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "one_run", "gaussian"),
    [
        (1000, 100, 90, DELTA, 1.62614, 2.4564),
        (1000, 600, 600, DELTA, 5.2704, 10.515),
        (5000, 500, 400, DELTA, 1.19522, 1.683),
        (500, 500, 300, 0.0, 0.25168, 0.520),
        (1000, 100, 50, DELTA, 0.0, 0.0),  # chance
    ],
)
def test_bounds_of_one_run(canaries, guesses, right, delta, one_run, gaussian):
    assert one_run_epsilon(canaries, guesses, right, delta) == pytest.approx(one_run, rel=1e-4)
    assert gaussian_epsilon(canaries, guesses, right, delta or DELTA) == pytest.approx(gaussian, rel=1e-3)


def test_p_values_of_one_run():
    assert one_run_p_value(500, 100, 80, 1.0, DELTA) == pytest.approx(0.0722827, rel=1e-5)
    assert one_run_p_value(500, 100, 80, 1.0, 0.0) < one_run_p_value(500, 100, 80, 1.0, DELTA)
    assert one_run_p_value(10, 5, 0, 1.0, 0.1) == 1.0


def test_randomized_response_is_refuted_as_often_as_stated():
    """The tight case: guesses are right with probability exactly e / (1 + e)."""
    right = np.random.default_rng(0).binomial(1000, math.e / (1 + math.e), 20_000)
    p_values = {v: one_run_p_value(1000, 1000, v, 1.0, 0.0) for v in np.unique(right)}
    violations = np.mean([p_values[v] < 0.05 for v in right])
    assert 0.035 < violations < 0.05


def test_the_true_curve_of_a_gaussian_is_refuted_no_more_often_than_stated_and_a_smaller_one_is_refuted():
    generator = np.random.default_rng(1)
    canaries, taken, epsilon = 1000, 100, 4.0
    mu, p_values = gdp.mu_of(epsilon, DELTA), []
    truth, claim = TradeOff.of_gdp(mu), TradeOff.of_gdp(mu / 3)
    refuted = 0
    for _ in range(60):
        coins = generator.random(canaries) < 0.5
        order = np.argsort(mu * coins + generator.standard_normal(canaries))
        right = int((~coins[order[:50]]).sum() + coins[order[-50:]].sum())
        p_values.append(curve_p_value(truth, canaries, taken, right))
        refuted += curve_p_value(claim, canaries, taken, right) < 0.05
    assert np.mean(np.array(p_values) < 0.05) <= 0.05
    assert refuted > 30


@pytest.mark.parametrize("right", [60, 80, 95])
def test_a_pure_budget_is_never_easier_to_refute_by_its_curve_than_by_the_binomial_tail_which_is_exact(right):
    exact = one_run_p_value(1000, 100, right, 1.0, 0.0)
    assert exact * 0.99 <= curve_p_value(TradeOff.of_budget(1.0, 0.0), 1000, 100, right) < max(3 * exact, 0.1) + 1e-9


def test_many_runs():
    assert joint_beta_epsilon(0, 487, 512, 513, DELTA) == pytest.approx(0.145, abs=0.005)
    assert counts_epsilon(0, 500, 0, 500, DELTA) == pytest.approx(math.log((1 - DELTA - 0.00735) / 0.00735), rel=0.01)
    assert counts_epsilon(250, 500, 250, 500, DELTA) == 0.0
    assert clopper_pearson(10, 10_000, 0.05) == pytest.approx((0.00048, 0.00184), abs=1e-5)
    assert clopper_pearson(0, 10, 0.05)[0] == 0.0
    assert clopper_pearson(10, 10, 0.05)[1] == 1.0


def test_gdp_figures():
    assert gdp.epsilon_of(1.0, DELTA) == pytest.approx(4.377178, abs=1e-5)
    assert gdp.mu_of(8.0, DELTA) == pytest.approx(1.66603, abs=1e-5)


@pytest.mark.parametrize(
    ("epsilon", "auc", "gaussian_auc"),
    [
        (0.1, 0.525, 0.509),
        (0.5, 0.6225, 0.540),
        (1, 0.731, 0.575),
        (2, 0.881, 0.639),
        (4, 0.982, 0.744),
        (8, 0.9997, 0.881),
    ],
)
def test_caps(epsilon, auc, gaussian_auc):
    budget, gaussian = TradeOff.of_budget(epsilon, DELTA), TradeOff.of_gdp(gdp.mu_of(epsilon, DELTA))
    assert budget.largest_auc() == pytest.approx(auc, abs=6e-4)
    assert gaussian.largest_auc() == pytest.approx(gaussian_auc, abs=6e-4)
    assert budget.largest_auc() == pytest.approx(1 - (1 - DELTA) ** 2 / (1 + math.exp(epsilon)), abs=1e-4)
    advantage = (math.exp(epsilon) - 1 + 2 * DELTA) / (math.exp(epsilon) + 1)
    assert budget.largest_advantage() == pytest.approx(advantage, abs=1e-3)


def test_power_and_mistakes_are_inverse_and_meet_the_gaussian():
    curve = TradeOff.of_gdp(1.0)
    for fpr in (1e-3, 0.01, 0.2, 0.7):
        power = curve.most_power(fpr)
        exact = float(torch.special.ndtr(torch.special.ndtri(torch.tensor(fpr, dtype=torch.float64)) + 1))
        assert power == pytest.approx(exact, abs=2e-4)
        assert curve.least_mistakes(power) == pytest.approx(fpr, abs=2e-4)


def test_the_ledgers_curve_meets_its_epsilon():
    releases = [Release(1.1, 0.01, 500), Release(1.1, 0.02, 100)]
    epsilon = certified(releases, DELTA)
    below, at = delta_curve(releases, [epsilon / 2, epsilon])
    assert at == pytest.approx(DELTA, rel=1e-3)
    assert below > at
    grouped = [Release(1.1, 0.01, 500, "a"), Release(1.1, 0.02, 700, "b")]
    assert delta_curve(grouped, [1.0]) == delta_curve([Release(1.1, 0.02, 700)], [1.0])
    assert delta_curve([Release(0.0, 0.5, 1)], [1.0]) == [1.0]
    assert delta_curve([], [1.0]) == [0.0]


def test_roc_is_exact_on_scores_that_saturate_in_single_precision():
    generator = np.random.default_rng(0)
    members, non_members = generator.normal(9, 4, 10_000), generator.normal(7.5, 4, 10_000)
    found = roc(members, non_members)
    scores = torch.from_numpy(np.concatenate([members, non_members]))
    scores = (scores - scores.min()) / (scores.max() - scores.min())  # torchmetrics squashes what is outside [0, 1]
    truth = torch.cat([torch.ones(10_000), torch.zeros(10_000)]).long()
    assert found.auc == pytest.approx(float(binary_auroc(scores, truth)), abs=1e-6)
    assert found.auc == pytest.approx(0.60619, abs=1e-5)
    threshold = np.sort(non_members)[-101]
    assert found.tpr_at(0.01).value == pytest.approx(np.mean(members > threshold), abs=1e-9)
    assert found.tpr_at(0.01).low < found.tpr_at(0.01).value < found.tpr_at(0.01).high
    assert found.auc_error == pytest.approx(0.0041, abs=2e-4)


def test_a_rate_below_the_resolution_is_not_a_number():
    scores = np.arange(1000.0)
    assert math.isnan(roc(scores, scores).tpr_at(0.001).value)
    assert roc(scores, scores).tpr_at(0.01).value == pytest.approx(0.01)


def test_ties_and_infinite_scores_are_kept_and_what_is_no_number_is_refused():
    assert roc(np.zeros(5), np.zeros(7)).auc == 0.5
    assert roc(np.array([math.inf, 1.0]), np.array([-math.inf, 0.0])).auc == 1.0
    for members, non_members in (([], [1.0]), ([math.nan], [0.0])):
        with pytest.raises(ValueError, match=r"members|number"):
            roc(np.array(members), np.array(non_members))

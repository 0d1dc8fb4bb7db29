"""Scores of attacks against the formulas, written out."""

import numpy as np
import pytest
from scipy import stats

from lightning_dp.privacy.attacks import lira, log_odds, population_threshold, rmia, shadow
from lightning_dp.privacy.auditing import roc


@pytest.fixture
def game():
    """Scores of a target and 80 references: 1 higher, over a standard deviation of 1, for those inside."""
    draw = np.random.default_rng(0)
    inside = draw.random((80, 300)).argsort(0) < 40
    member = draw.random(300) < 0.5
    ease = draw.normal(0, 3, 300)  # of records, which a global threshold cannot know
    target = ease + member + draw.normal(size=300)
    return target[None], (ease + inside + draw.normal(size=(80, 300)))[:, None], inside, member


def test_log_odds_are_exact_where_probabilities_round_to_one():
    logits = np.array([[[90.0, 0.0, 1.0]], [[1.0, 2.0, 3.0]]])
    p = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    found = log_odds(logits, np.array([0]))
    assert found[0, 0] == pytest.approx(90 - np.log(1 + np.e))
    assert found[1, 0] == pytest.approx(np.log(p[0] / (1 - p[0])))


@pytest.mark.parametrize("models", [80, 20])
def test_lira_is_the_ratio_of_normal_densities(game, models):
    target, references, inside, _ = game
    references, inside = references[:models], inside[:models]
    online, offline = (lira(target, references, inside, online) for online in (True, False))
    values, i = references[:, 0], 7
    into, out = values[inside[:, i], i], values[~inside[:, i], i]
    spreads = into.std(ddof=1), out.std(ddof=1)
    if models < 64:
        sides = [[v[s] for v, s in zip(values.T, side.T, strict=True)] for side in (inside, ~inside)]
        parts = [np.concatenate([part - part.mean() for part in side]) for side in sides]
        spreads = tuple(np.sqrt((part**2).sum() / (len(part) - 300)) for part in parts)
    high, low = stats.norm(into.mean(), spreads[0]), stats.norm(out.mean(), spreads[1])
    assert online[i] == pytest.approx(high.logpdf(target[0, i]) - low.logpdf(target[0, i]))
    assert offline[i] == pytest.approx(low.logcdf(target[0, i]))


def test_more_views_are_averaged(game):
    target, references, inside, _ = game
    once = lira(target, references, inside, True)
    twice = lira(np.repeat(target, 2, 0), np.repeat(references, 2, 1), inside, True)
    np.testing.assert_allclose(once, twice)


def test_references_beat_a_global_threshold_and_one_who_knows_nothing_is_not_helped(game):
    target, references, inside, member = game

    def auc(scores):
        return roc(scores[member], scores[~member]).auc

    likely, general = 1 / (1 + np.exp(-target[0])), 1 / (1 + np.exp(-references[:, 0]))
    others = np.flatnonzero(~member)
    assert auc(target[0]) < 0.62
    for found in (
        lira(target, references, inside, True),
        lira(target, references, inside, False),
        rmia(likely, general, inside, others, True),
        rmia(likely, general, inside, others, False),
    ):
        assert auc(found) > auc(target[0]) + 0.03
    nothing = lira(references[0], references[1:], inside[1:], True)
    assert abs(auc(nothing) - 0.5) < 0.12


def test_rmia_is_the_share_of_others_that_are_beaten():
    draw = np.random.default_rng(1)
    target, references = draw.random(40), draw.random((4, 40))
    inside = draw.random((4, 40)).argsort(0) < 2
    others = np.arange(30, 40)
    for online in (True, False):
        for gamma in (1.0, 1.5):
            found = rmia(target, references, inside, others, online, gamma=gamma)
            for x in (0, 33):

                def ratio(z, online=online):
                    without = references[~inside[:, z], z].mean()
                    with_it = references[inside[:, z], z].mean()
                    general = (with_it + without) / 2 if online else (1.3 * without + 0.7) / 2
                    return target[z] / general

                assert found[x] == np.mean([ratio(x) / ratio(z) >= gamma for z in others])


def test_a_population_sets_the_threshold_for_its_rate():
    population = np.arange(1000.0)
    assert population_threshold(np.array([988.0, 989.5, 995.0]), population, 0.01).tolist() == [False, False, True]
    assert population_threshold(population, population, 0.05).mean() <= 0.05


def test_shadow_models_teach_what_members_look_like():
    draw = np.random.default_rng(2)
    labels = np.arange(200) % 2
    inside = draw.random((8, 200)).argsort(0) < 4
    logits = draw.normal(size=(8, 200, 2))
    logits[:, np.arange(200), labels] += 2.0 * inside
    member = inside[0]
    scores = shadow(logits[0], logits[1:], inside[1:], labels)
    assert roc(scores[member], scores[~member]).auc > 0.8


def test_too_few_references_are_refused(game):
    target, references, inside, _ = game
    with pytest.raises(ValueError, match="two reference models"):
        lira(target, references[:2], inside[:2], True)
    all_in = np.ones_like(inside[:2])
    with pytest.raises(ValueError, match="without it"):
        rmia(target[0], references[:2, 0], all_in, np.arange(3), False)

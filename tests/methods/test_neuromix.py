"""NeuroMix: what one record can change, what is counted, and what comes out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from lightning_dp.callbacks import PrivacyCard
from lightning_dp.data import load_release
from lightning_dp.errors import ConfigError
from lightning_dp.methods import GammaWeights, NearestMean, NeuroMix, RidgeHead
from lightning_dp.methods.neuromix import (
    best_degree,
    draw_gates,
    neural_collapse,
    published_epsilon,
    published_sigma,
)
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig, Release, gdp
from lightning_dp.privacy import epsilon as certified
from tests.methods.runs import make_data, make_trainer

PRIVACY = PrivacyConfig(num_examples=1240, expected_batch_size=1, steps=60, delta=1e-5, noise_multiplier=1.0, seed=7)
BUDGET = replace(PRIVACY, epsilon=8.0, noise_multiplier=None)
GATED = {"open_classes": 2, "labels": "noisy"}
WEIGHTED = {"weights": GammaWeights(0.5, bound=2.0)}
MODES = [{}, {"open_classes": 1}, GATED, WEIGHTED]


def make(privacy=PRIVACY, **settings):
    net = LinearHead(1, 8, 10, max_length=settings.pop("max_length", 1.0))
    settings = {"head": NearestMean(), "degree": 30, "outputs_per_step": 25, **settings}
    return NeuroMix(net, privacy=privacy, **settings)


def fit(folder, module, data=None, **settings):
    trainer = make_trainer(folder, **{"max_steps": module.privacy.steps, **settings})
    trainer.fit(module, datamodule=make_data(module.privacy) if data is None else data)
    return trainer


def silent(**settings):
    """Without noise, so that sums can be looked at."""
    return make(replace(PRIVACY, noise_multiplier=0.0), **settings)


def watched(monkeypatch):
    """What every call of `bounded_sums` was given and what it returned."""
    calls, original = [], NeuroMix.bounded_sums

    def bounded_sums(self, outputs, records, count, weights):
        found = original(self, outputs, records, count, weights)
        state = self._features.clone(), self._factors.clone(), self._labels.copy(), weights
        calls.append((outputs.copy(), records.copy(), count, found, state))
        return found

    monkeypatch.setattr(NeuroMix, "bounded_sums", bounded_sums)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_those_of_the_contributions_and_a_record_moves_each_by_at_most_one(tmp_path, monkeypatch, mode):
    calls = watched(monkeypatch)
    module = silent(max_length=None, feature_norm=0.7, noise_split=2.0, **mode)  # nearly all features are longer
    fit(tmp_path, module)
    outputs, records, count, found, (*_, weights) = calls[1]
    if weights is not None:
        assert 0 <= weights.min() < 0.2
        assert 0.99 < weights.max() <= 1
    private = module.datamodule.role("private")
    inputs = module.datamodule.normalize(private.images)
    parts = [module.contribution(inputs[i], private.labels[i]) for i in records]
    lengths = torch.stack([torch.cat([part.flatten() for part in parts_i.values()]).norm() for parts_i in parts])
    assert lengths.max() <= 1.0
    assert lengths.max() > 0.99  # tight: clipped records use the bound
    for name, total in found.items():
        expected = torch.zeros(count, *parts[0][name].shape)
        whole = torch.stack([part[name] for part in parts])
        scales = torch.ones(len(whole)) if weights is None else torch.from_numpy(weights)
        expected.index_add_(0, torch.from_numpy(outputs), whole * scales.view(-1, *[1] * (whole.ndim - 1)))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_is_not_finite_adds_no_feature(tmp_path, monkeypatch, mode):
    data = make_data(silent().privacy)
    monkeypatch.setattr(
        data,
        "normalize",
        lambda images: torch.where(images.sum((1, 2, 3), keepdim=True) % 2 == 0, images / 16, math.inf),
    )
    calls = watched(monkeypatch)
    fit(tmp_path, silent(max_length=None, **mode), data)
    assert all(call[3]["inputs"].isfinite().all() for call in calls)
    assert (calls[0][4][1] == 0).any()


def test_plain_draws_are_poisson_at_the_accounted_rate(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    module = make(replace(PRIVACY, steps=2000), outputs_per_step=500)
    fit(tmp_path, module)
    members = len(calls[0][4][2])
    sizes = np.concatenate([np.bincount(outputs, minlength=count) for outputs, _, count, _, _ in calls])
    mean, variance = members * 30 / 1240, members * 30 / 1240 * (1 - 30 / 1240)
    assert abs(sizes.mean() - mean) < 4 * math.sqrt(variance / 2000)
    assert abs(sizes.var() / variance - 1) < 4 * math.sqrt(2 / 2000)
    assert all(len(set(zip(o, r, strict=True))) == len(o) for o, r, *_ in calls)  # nobody twice in one output
    assert module.mechanism.ledger.releases == (Release(module.mechanism.noise_multiplier, 30 / 1240, 2000),)


def test_gated_draws_are_counted_by_class_at_the_rate_within_the_class(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    module = make(replace(PRIVACY, steps=1000), open_classes=2, outputs_per_step=300)
    fit(tmp_path, module)
    gates = module.gates(module.privacy)
    rate = 30 / (1240 * 2 / 10)
    start = 0
    for outputs, records, count, _, (_, _, labels, _) in calls:
        assert gates[start + outputs, labels[records]].all()  # nobody behind a closed gate
        start += count
    releases = module.mechanism.ledger.releases
    for k in range(10):
        counted = sum(release.count for release in releases if release.group == f"class {k}")
        assert counted == gates[:, k].sum() == 200
    assert {release.sample_rate for release in releases} == {rate}
    drawn = sum(len(records) for _, records, *_ in calls)
    expected = 200 * rate * len(labels)
    assert abs(drawn - expected) < 4 * math.sqrt(expected)


def test_a_closed_gate_is_no_amplification():
    """The flaw of hierarchical sampling as published: at equal noise, rarer gates cost more, not the same."""
    sigma, spent = 1.26, []
    for open_classes in (1, 10):
        module = make(replace(PRIVACY, noise_multiplier=sigma, steps=2000), open_classes=open_classes)
        mechanism = module.new_mechanism(module.privacy, None)
        rate, share = 30 / (124 * open_classes), open_classes / 10
        spent.append(certified([Release(sigma, rate, round(share * 2000))], 1e-5))
        assert mechanism._shares is not None
        assert set(mechanism._shares.values()) == {round(share * 2000)}
    assert spent[0] > 1.5 * spent[1]


@pytest.mark.parametrize("mode", [{}, GATED])
def test_the_release_holds_the_budget_and_is_written_before_it_leaves(tmp_path, mode):
    module = make(BUDGET, **mode)
    fit(tmp_path, module, callbacks=[PrivacyCard()])
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    assert 0.9 * 8 < card["epsilon"] <= 8
    assert card["epsilon"] == pytest.approx(module.mechanism.epsilon())
    assert "NOT a guarantee" in card["claims"][0]
    assert "Certified: epsilon" in card["claims"][0]
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()[1:]
    openings = sum(json.loads(line)["count"] for line in lines)
    assert openings == sum(release.count for release in module.mechanism.ledger.releases)
    assert openings == 60 * (1 if not mode else mode["open_classes"])
    published = load_release(tmp_path / "release")
    assert len(published.inputs) == len(published.targets) == 60
    assert (tmp_path / "release" / "privacy_card.md").is_file()
    assert published.about["guarantee"] == module.mechanism.summary()


def test_noise_has_the_scale_of_the_accounted_multiplier(tmp_path):
    """Released minus exact, on features and labels; three percent off is seen."""
    privacy = replace(PRIVACY, steps=1000)
    noisy = make(privacy, feature_norm=0.5, label_norm=0.8, noise_split=2.0)
    fit(tmp_path / "a", noisy)
    sigma = noisy.mechanism.noise_multiplier
    exact = make(replace(privacy, noise_multiplier=0.0), feature_norm=0.5, label_norm=0.8, noise_split=2.0)
    fit(tmp_path / "b", exact)
    found, true = (load_release(tmp_path / name / "release") for name in "ab")
    x, y = found.inputs - true.inputs, found.targets - true.targets
    assert x.std().item() == pytest.approx(sigma * math.sqrt(5) / 2 * 0.5 / 30, rel=0.03)
    assert y.std().item() == pytest.approx(sigma * math.sqrt(5) * 0.8 / 30, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([x[:, 0], x[:, 1]]))[0, 1]) < 0.15


def test_public_labels_are_the_expected_masses(tmp_path):
    sizes = [100, 148] * 5
    module = silent(open_classes=2, class_sizes=sizes)
    fit(tmp_path, module)
    gates = module.gates(module.privacy)
    expected = gates * np.array(sizes) * (30 / 248) / 30
    np.testing.assert_allclose(load_release(tmp_path / "release").targets.numpy(), expected, rtol=1e-5)


def test_neighbours_get_the_same_draws_of_the_others_in_law(tmp_path):
    """Gates, degree, rates and noise do not move when a private record does."""
    plans = []
    for audit in (100, 101):
        module = make(BUDGET, open_classes=2, degree="auto")
        fit(tmp_path / str(audit), module, make_data(BUDGET, audit=audit))
        plans.append((module.mechanism.noise_multiplier, module.mechanism.config, module.mechanism.ledger.releases))
    assert plans[0] == plans[1]


def test_a_release_is_not_continued(tmp_path):
    module = make()
    with pytest.raises(ConfigError, match="start anew"):
        module.new_mechanism(PRIVACY, {"ledger": {}})


@pytest.mark.parametrize(
    ("privacy", "settings", "word"),
    [
        ({"expected_batch_size": 60}, {}, "model.degree"),
        ({"max_norm": 2.0}, {}, "max_norm"),
        ({}, {"degree": "auto"}, "privacy.epsilon"),
        ({}, {"as_published": True}, "privacy.epsilon"),
        ({"adjacency": "replace_one"}, {"open_classes": 2}, "add_remove"),
        ({}, {"open_classes": 11}, "open_classes"),
        ({}, {"open_classes": 2, "class_sizes": [3]}, "class_sizes"),
        ({}, {"noise_split": 0.0}, "noise_split"),
        ({}, {"open_classes": 1, "weights": GammaWeights(1.0)}, "noisy"),
        ({}, {"degree": 0}, "degree"),
    ],
)
def test_settings_that_break_the_accounting_are_refused(privacy, settings, word):
    with pytest.raises(ConfigError, match=word):
        make(replace(PRIVACY, **privacy), **settings)


def test_a_gate_that_would_need_more_than_its_class_is_refused():
    with pytest.raises(ConfigError, match="at most 124"):
        make(open_classes=1, degree=125).new_mechanism(PRIVACY, None)


def test_the_best_degree_is_the_maximum_of_the_signal():
    mu, n, outputs = gdp.mu_of(1.0, 1e-5), 60_000, 60_000
    nu = minimize_scalar(lambda nu: -nu * math.log1p(mu**2 / nu**2), bounds=(0.01 * mu, 10 * mu)).x
    privacy = PrivacyConfig(num_examples=n, expected_batch_size=1, steps=outputs, delta=1e-5, epsilon=1.0)
    assert best_degree(privacy, (outputs, 1.0)) == round(nu * n / math.sqrt(outputs))


@pytest.mark.parametrize(("claimed", "sigma"), [(0.1, 8.829), (1, 1.2602), (2, 0.8440), (8, 0.5306)])
def test_the_published_noise_is_that_of_theorem_3_1(claimed, sigma):
    assert published_sigma(claimed, 1e-5, 50_000, 50_000, 64) == pytest.approx(sigma, rel=1e-3)
    assert published_epsilon(sigma, 1e-5, 50_000, 50_000, 64) == pytest.approx(claimed, rel=5e-3)


def test_the_published_noise_is_taken_when_asked_for_and_certified(tmp_path):
    module = make(BUDGET, as_published=True, open_classes=1)
    fit(tmp_path, module)
    assert module.mechanism.noise_multiplier == published_sigma(8.0, 1e-5, 1240, 60, 30)
    assert module.mechanism.epsilon() > 2 * 8


PLAIN = [  # claimed, sigma of Theorem 3.1, certified; n = T = 50,000, m = 64
    (0.1, 8.829, 0.1001), (0.2, 4.719, 0.2003), (0.5, 2.129, 0.5022), (1, 1.2602, 1.0100), (2, 0.8440, 2.0609),
    (4, 0.6405, 4.4482), (8, 0.5306, 9.2262),
]  # fmt: skip
BY_DEGREE = [  # claimed, m, certified
    (1, 4, 3.51), (1, 16, 1.42), (1, 32, 1.038), (1, 128, 1.005), (1, 256, 1.003), (1, 1024, 1.001),
    (8, 4, 10.50), (8, 16, 10.46), (8, 32, 10.02), (8, 128, 8.44), (8, 256, 8.12), (8, 1024, 8.02),
]  # fmt: skip
# claimed -> certified with gates open in a share p of the outputs
GATES = {
    0.03: [0.68, 1.37, 3.57, 7.62, 16.4, 32.3, 54.8],
    0.1: [0.35, 0.71, 1.80, 3.72, 7.98, 16.7, 30.6],
    0.3: [0.194, 0.39, 0.97, 1.98, 4.15, 8.93, 17.4],
    0.5: [0.148, 0.293, 0.735, 1.49, 3.08, 6.65, 13.3],
}


@pytest.mark.parametrize(("claimed", "sigma", "epsilon"), PLAIN)
def test_plain_mixtures_certify_at_the_tabled_epsilon(claimed, sigma, epsilon):
    found = published_sigma(claimed, 1e-5, 50_000, 50_000, 64)
    assert certified([Release(found, 64 / 50_000, 50_000)], 1e-5) == pytest.approx(epsilon, rel=0.01)


@pytest.mark.parametrize(("claimed", "degree", "epsilon"), BY_DEGREE)
def test_the_published_noise_by_degree_certifies_at_the_tabled_epsilon(claimed, degree, epsilon):
    sigma = published_sigma(claimed, 1e-5, 50_000, 50_000, degree)
    assert certified([Release(sigma, degree / 50_000, 50_000)], 1e-5) == pytest.approx(epsilon, rel=0.01)


@pytest.mark.parametrize("share", GATES)
@pytest.mark.parametrize("place", range(7))
def test_gated_mixtures_certify_at_the_tabled_epsilon(share, place):
    claimed, epsilon = PLAIN[place][0], GATES[share][place]
    sigma = published_sigma(claimed, 1e-5, 50_000, 50_000, 64)
    release = Release(sigma, 64 / (50_000 * share), round(share * 50_000), "class 0")
    found = certified([release], 1e-5)
    # at 0.148 the table's own discretisation shows: ours, finer, is 1.2 % below
    assert 0.985 * epsilon < found < 1.01 * epsilon


def test_gates_open_equally_often():
    gates = draw_gates(1000, 7, 3, seed=1)
    assert (gates.sum(1) == 3).all()
    assert gates.sum(0).max() - gates.sum(0).min() <= 1
    together = gates[:, 0] & gates[:, 1]
    assert 0.08 < together.mean() < 0.22  # 1/7, not always or never together
    assert not np.array_equal(gates, draw_gates(1000, 7, 3, seed=2))


def test_neural_collapse_of_tight_and_loose_classes():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    means = 4 * torch.eye(3, 20)
    tight, loose = (neural_collapse(means[labels] + s * torch.randn(300, 20), labels) for s in (0.1, 1.0))
    assert tight[0] < 0.02 * loose[0]
    assert tight[1] == pytest.approx(4 * math.sqrt(2), rel=0.02)
    # against the definition, with the whole pseudo-inverse
    features = (means[labels] + torch.randn(300, 20)).double()
    centres = torch.stack([features[labels == k].mean(0) for k in range(3)])
    within = sum((features[labels == k] - centres[k]).T @ (features[labels == k] - centres[k]) for k in range(3)) / 300
    apart = centres - centres.mean(0)
    expected = torch.trace(within @ torch.linalg.pinv(apart.T @ apart / 3, rtol=1e-9)) / 3
    assert neural_collapse(features, labels)[0] == pytest.approx(float(expected), rel=1e-6)


def test_random_weights_are_undone_in_the_release(tmp_path):
    """Their mean is below 1 by the bound; their noise is larger by it."""
    module = silent(weights=GammaWeights(2.0, bound=3.0))
    fit(tmp_path, module)
    mass = load_release(tmp_path / "release").targets.sum(1)
    drawn = module.weights.draw(100_000, np.random.default_rng(0)).mean()
    assert mass.mean().item() == pytest.approx(drawn, rel=0.15)
    noisy = make(weights=GammaWeights(2.0, bound=3.0))
    fit(tmp_path / "noisy", noisy)
    assert noisy.noise_std == pytest.approx(3 * math.sqrt(2) / 30)


def test_the_head_learns_from_mixtures(tmp_path):
    # fewer mixtures say less of the covariance, so the ridge is larger than the default, which is for 60,000
    head = RidgeHead(ridge=0.3)
    module = make(replace(PRIVACY, steps=1500, noise_multiplier=0.6), head=head, open_classes=1, degree=12)
    trainer = fit(tmp_path, module)
    accuracy = trainer.test(module, datamodule=make_data(module.privacy), verbose=False)[0]["test/accuracy"]
    assert accuracy > 0.85

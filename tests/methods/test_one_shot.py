"""One noisy sum: bounded, noised as accounted, and turned into a head in closed form."""

from dataclasses import replace

import pytest
import torch

from lightning_dp.errors import ConfigError
from lightning_dp.methods import ClassSums, SufficientStatistics
from lightning_dp.methods.mixture_heads import MixtureHead, NearestMean, RidgeHead, head_gradient, means_as_head
from lightning_dp.methods.one_shot import _packed, _unpacked
from lightning_dp.models import LinearHead
from lightning_dp.privacy import Mechanism, PrivacyConfig, clipped_sum
from lightning_dp.privacy.clipping import flatten
from tests.methods.runs import make_data, make_trainer

PRIVACY = PrivacyConfig(num_examples=1240, expected_batch_size=1240, steps=1, delta=1e-5, epsilon=8.0, seed=7)
METHODS = [ClassSums, SufficientStatistics]


def fit(folder, method, privacy=PRIVACY, **settings):
    module = method(LinearHead(1, 8, 10), privacy=privacy, physical_batch_size=300, **settings)
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(module, datamodule=make_data(privacy))
    return module, trainer


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_is_that_of_contributions_of_at_most_one(tmp_path, monkeypatch, method):
    given = []
    original = method.clipped_sum
    monkeypatch.setattr(method, "clipped_sum", lambda self, records: given.append(records) or original(self, records))
    module, _ = fit(tmp_path, method)
    records = tuple(tensor[:50] for tensor in given[0])
    expected = clipped_sum(
        module.contribution, records, module.template(), max_norm=1.0, chunk=50, prepare=module.prepare
    )
    torch.testing.assert_close(flatten(original(module, records)), flatten(expected), rtol=1e-4, atol=1e-4)
    inputs, labels = module.prepare(*records)
    alone = [flatten(module.contribution(image, label)).norm() for image, label in zip(inputs, labels, strict=True)]
    assert 0.99 < max(alone) <= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_a_record_that_is_not_finite_adds_nothing(tmp_path, method):
    module, _ = fit(tmp_path, method)
    module.prepare = lambda inputs, coins, labels: (inputs, labels)
    inputs = torch.rand(4, 1, 8, 8)
    inputs[2] = float("inf")
    labels, coins = torch.arange(4), torch.zeros(4, 0)
    with_it = module.clipped_sum((inputs, coins, labels))
    keep = [0, 1, 3]
    without = module.clipped_sum((inputs[keep], coins[keep], labels[keep]))
    torch.testing.assert_close(flatten(with_it), flatten(without))


@pytest.mark.parametrize("method", METHODS)
def test_noise_reaches_what_is_released_at_the_accounted_scale(tmp_path, monkeypatch, method):
    released = []
    original = Mechanism.release

    def release(self, total, *args, **kwargs):
        mean = original(self, total, *args, **kwargs)
        released.append((flatten(mean) * 1240 - flatten(total)).std() / self.noise_multiplier)
        return mean

    monkeypatch.setattr(Mechanism, "release", release)
    module, _ = fit(tmp_path, method)
    assert len(released) == len(module.mechanism.ledger) == 1
    assert float(released[0]) == pytest.approx(1.0, rel=0.12)  # 640 and 2,795 values
    assert module.mechanism.epsilon() <= 8.0


@pytest.mark.parametrize(("method", "least"), [(ClassSums, 0.72), (SufficientStatistics, 0.88)])
def test_the_head_is_good(tmp_path, method, least):
    module, trainer = fit(tmp_path, method)
    assert trainer.test(module, datamodule=make_data(PRIVACY), verbose=False)[0]["test/accuracy"] > least


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [{"steps": 2}, {"expected_batch_size": 600}, {"max_norm": 2.0}])
def test_other_mechanisms_are_refused(method, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        method(LinearHead(1, 8, 10), privacy=replace(PRIVACY, **change))


def test_packing_keeps_length_and_comes_back():
    torch.manual_seed(0)
    half = torch.randn(7, 7)
    matrix = half + half.T
    assert _packed(matrix).norm() == pytest.approx(float(matrix.norm()), rel=1e-5)
    torch.testing.assert_close(_unpacked(_packed(matrix), 7), matrix)


def test_the_heads_gradient_is_autograds_and_bounded_by_row():
    torch.manual_seed(0)
    head, inputs, targets = torch.randn(3, 6), torch.randn(9, 5), torch.rand(9, 3)
    free = head.clone().requires_grad_()
    log_p = (inputs @ free[:, :-1].T + free[:, -1]).log_softmax(1)
    # generalised KL: sum of p log(p / q) - p + q, and q sums to 1
    loss = (targets * (targets.log() - log_p) - targets).sum(1) + 1
    loss.mean().backward()
    torch.testing.assert_close(head_gradient(head, inputs, targets, None), free.grad)
    one = head_gradient(head, inputs[:1], targets[:1], 0.1)
    assert one.norm() == pytest.approx(0.1, rel=1e-4)


def test_a_head_of_means_finds_the_nearest():
    torch.manual_seed(0)
    means, points = torch.randn(4, 6), torch.randn(50, 6)
    head = means_as_head(means)
    found = (points @ head[:, :-1].T + head[:, -1]).argmax(1)
    assert torch.equal(found, torch.cdist(points, means).argmin(1))
    labels = torch.arange(4).repeat(5)
    head = NearestMean()(means[labels], torch.nn.functional.one_hot(labels).float(), 0.0)
    torch.testing.assert_close(head[:, :-1], means)


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"lr": 0.0}, {"batch_size": 0}, {"max_grad": 0.0}])
def test_heads_refuse_what_cannot_train(setting):
    with pytest.raises(ConfigError, match="MixtureHead"):
        MixtureHead(**setting)


def test_ridge_takes_the_noise_out_of_the_covariance():
    """With much noise in the inputs the head of the clean inputs comes back, and not a shrunk one."""
    torch.manual_seed(0)
    labels = torch.arange(60_000) % 3
    spread = torch.diag(torch.tensor([1.0, 0.3, 0.3, 0.1]))
    clean = 2 * torch.eye(3, 4)[labels] + torch.randn(60_000, 4) @ spread
    targets = torch.nn.functional.one_hot(labels).float()
    expected = RidgeHead()(clean, targets, 0.0)
    noisy = clean + 0.5 * torch.randn(60_000, 4)
    corrected, plain = RidgeHead(0.01)(noisy, targets, 0.5), RidgeHead(0.01)(noisy, targets, 0.0)
    assert (corrected - expected).norm() < 0.1 * expected.norm()
    assert (plain - expected).norm() > 0.2 * expected.norm()


def test_ridge_without_noise_is_least_squares():
    torch.manual_seed(0)
    inputs, targets = torch.randn(200, 5).double(), torch.randn(200, 3).double()
    ones = torch.cat([inputs, torch.ones(200, 1)], dim=1)
    expected = torch.linalg.lstsq(ones, targets).solution.T
    torch.testing.assert_close(RidgeHead()(inputs, targets, 0.0), expected, rtol=1e-4, atol=1e-4)

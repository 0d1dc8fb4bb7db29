"""Private Set Generation: what is released, what one record can change, and that all else is post-processing."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.func import functional_call, grad
from torch.nn import functional as F

from lightning_dp.callbacks import PrivacyCard
from lightning_dp.data import OneOfAffine, load_release
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, PSG, ReleaseTraining, Tasks
from lightning_dp.methods.psg import gradient_distance
from lightning_dp.methods.release_training import reset
from lightning_dp.models import ConvNet, ImageGenerator
from lightning_dp.privacy import PrivacyConfig, Release
from lightning_dp.privacy import epsilon as certified
from tests.methods.runs import make_data, make_trainer

PRIVACY = PrivacyConfig(num_examples=1240, expected_batch_size=60, steps=8, delta=1e-5, noise_multiplier=1.0, seed=7)
SILENT = replace(PRIVACY, noise_multiplier=0.0, max_norm=float("inf"))
FIVE = Tasks([[0, 1], [2, 3], [4, 5], [6, 7]])
FAST = ReleaseTraining(epochs=2)
# Certified epsilon (PLD) and sigma of the published settings: shared figures of the method's specification, section 3.
PUBLISHED = [
    (256 / 60000, 10_000, 1.879, 0.913),
    (256 / 60000, 10_000, 0.604, 8.86),
    (256 / 60000, 100_000, 5.510, 0.916),
    (256 / 60000, 100_000, 0.966, 9.29),
    (256 / 60000, 200_000, 7.756, 0.918),
    (256 / 60000, 200_000, 1.214, 9.31),
    (256 / 50000, 10_000, 2.205, 0.913),
    (256 / 50000, 100_000, 1.084, 9.30),
    (256 / 12000, 20_000, 12.24, 0.915),
    (256 / 12000, 20_000, 1.749, 9.30),
]


def make(privacy=PRIVACY, **settings):
    settings = {"images_per_class": 2, "outer_loops": 1, "inner_epochs": 0, "training": FAST, **settings}
    settings = {"optimizer": partial(torch.optim.SGD, lr=1.0, momentum=0.5), **settings}
    return PSG(settings.pop("net", None) or ConvNet(1, 8, 10, width=8, depth=1), privacy=privacy, **settings)


def fit(folder, module, data=None, ckpt_path=None, **settings):
    trainer = make_trainer(folder, **{"max_steps": module.privacy.steps, **settings})
    trainer.fit(module, datamodule=make_data(module.privacy) if data is None else data, ckpt_path=ckpt_path)
    return module


def watched(monkeypatch):
    """The batch, the sum and the weights of every call of `clipped_sum`."""
    calls, original = [], PSG.clipped_sum

    def clipped_sum(self, records):
        found = original(self, records)
        state = {name: value.clone() for name, value in self.net.state_dict().items()}
        calls.append((tuple(part.clone() for part in records), found, state))
        return found

    monkeypatch.setattr(PSG, "clipped_sum", clipped_sum)
    return calls


@pytest.mark.parametrize(("rate", "steps", "sigma", "expected"), PUBLISHED)
def test_published_noise_is_certified_as_computed(rate, steps, sigma, expected):
    assert certified([Release(sigma, rate, steps)], 1e-5) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("matched", [None, ["head."]])
def test_without_noise_and_bound_the_sum_is_that_of_the_gradients(tmp_path, monkeypatch, matched):
    calls = watched(monkeypatch)
    module = fit(tmp_path, make(SILENT, matched=matched))
    (images, _, labels), found, state = calls[3]

    def total(weights):
        inputs = module.datamodule.normalize(images)
        return F.cross_entropy(functional_call(module.net, {**state, **weights}, (inputs,)), labels, reduction="sum")

    expected = grad(total)({name: state[name] for name in found})
    assert set(found) == ({"blocks.0.weight", "head.weight"} if matched is None else {"head.weight"})
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_one_record_moves_the_sum_by_at_most_the_clip_norm(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    module = fit(tmp_path, make(replace(PRIVACY, max_norm=0.1)))
    records, whole, _ = calls[-1]
    module.net.load_state_dict(calls[-1][2])
    without = module.engine.clipped_sum(
        tuple(part[1:] for part in records), module.template(), max_norm=0.1, chunk=64, prepare=module.prepare
    )
    moved = torch.cat([(whole[name] - without[name]).flatten() for name in whole]).norm()
    assert 0.099 < moved <= 0.1 + 1e-5


def test_images_depend_on_private_records_through_the_released_means_alone(tmp_path, monkeypatch):
    """Replay the released means into a run on other records: the same images, bit for bit."""
    released, original = [], PSG.update

    def update(self, mean):
        released.append(mean)
        original(self, mean)

    monkeypatch.setattr(PSG, "update", update)
    first = fit(tmp_path / "a", make(outer_loops=2, inner_epochs=1, releases_per_point=2, updates_per_release=2))
    means = iter(list(released))
    monkeypatch.setattr(PSG, "update", lambda self, mean: original(self, next(means)))
    other = make(replace(PRIVACY, seed=99), outer_loops=2, inner_epochs=1, releases_per_point=2, updates_per_release=2)
    second = fit(tmp_path / "b", other)
    assert torch.equal(first.images, second.images)
    for ours, theirs in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_each_release_is_one_step_and_one_entry_however_often_it_is_used(tmp_path):
    module = fit(tmp_path, make(updates_per_release=5))
    assert len(module.mechanism.ledger) == module.trainer.global_step == 8


def test_more_updates_from_the_same_releases_move_the_images_further(tmp_path):
    once, often = (fit(tmp_path / str(r), make(updates_per_release=r)) for r in (1, 5))
    start = torch.randn(often.images.shape, generator=torch.Generator().manual_seed(0))
    assert (often.images - start).norm() > 2 * (once.images - start).norm()


def test_row_cosine_does_not_see_the_scale_of_the_released_gradient():
    torch.manual_seed(0)
    ours = {"a": torch.randn(4, 3, 2, 2), "b": torch.randn(5, 7)}
    theirs = {name: torch.randn_like(value) for name, value in ours.items()}
    larger = {name: 1e3 * value for name, value in theirs.items()}
    for distance in ("rows", "cosine"):
        near = gradient_distance(theirs, ours, distance)
        torch.testing.assert_close(near, gradient_distance(larger, ours, distance), rtol=1e-4, atol=1e-5)
    assert gradient_distance(larger, ours, "mse") > 100 * gradient_distance(theirs, ours, "mse")


def test_global_generators_are_left_alone_and_do_not_decide(tmp_path):
    torch.manual_seed(1)
    first = fit(tmp_path / "a", make(outer_loops=2, inner_epochs=1, siamese=OneOfAffine()))
    torch.manual_seed(2)
    module = make(outer_loops=2, inner_epochs=1, siamese=OneOfAffine())
    before = torch.get_rng_state()
    second = fit(tmp_path / "b", module)
    assert torch.equal(first.images, second.images)  # the seed of privacy.seed and of the networks are the same
    assert torch.equal(before, torch.get_rng_state())
    third = fit(tmp_path / "c", make(replace(PRIVACY, seed=None)))
    fourth = fit(tmp_path / "d", make(replace(PRIVACY, seed=None)))
    assert not torch.equal(third.images, fourth.images)


def test_networks_are_fresh_at_each_point_of_their_own(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    module = fit(tmp_path, make(releases_per_point=2, outer_loops=2, inner_epochs=3))
    weights = [call[2]["head.weight"] for call in calls]
    same = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert same == [True, False, True, False, True, False, True]
    for index in (0, 1):
        reset(module.net, 0, index)
        assert torch.equal(module.net.head.weight, weights[4 * index])
    assert (weights[2] - weights[0]).norm() < 0.2 * weights[0].norm()  # a few epochs from the same weights
    assert (weights[4] - weights[0]).norm() > 0.5 * weights[0].norm()


def test_loops_are_the_published_ones_unless_given():
    module = make(images_per_class=10, outer_loops=None, inner_epochs=None)
    assert (module.outer_loops, module.inner_epochs) == (10, 50)
    with pytest.raises(ConfigError, match="no published loops"):
        make(images_per_class=7, outer_loops=None)


def test_an_empty_batch_is_pure_noise_and_counts(tmp_path):
    privacy = replace(PRIVACY, expected_batch_size=1, steps=6, seed=3)
    module = fit(tmp_path, make(privacy))
    assert len(module.mechanism.ledger) == 6
    assert module.images.isfinite().all()


def test_the_release_teaches_and_the_network_is_trained_on_it(tmp_path):
    privacy = replace(PRIVACY, expected_batch_size=400, steps=60)
    settings = {"matched": ["head."], "releases_per_point": 1, "updates_per_release": 5}
    module = make(privacy, training=ReleaseTraining(epochs=300), net=ConvNet(1, 8, 10, width=16, depth=1), **settings)
    module.make_optimizer = partial(torch.optim.SGD, lr=5.0, momentum=0.5)
    fit(tmp_path, module, callbacks=[PrivacyCard()])
    published = load_release(tmp_path / "release")
    assert published.inputs.shape == (20, 1, 8, 8)
    assert torch.equal(published.inputs, module.images.detach())
    assert published.targets.argmax(1).tolist() == [k // 2 for k in range(20)]
    assert "epsilon" in published.about["guarantee"]
    assert (tmp_path / "release" / "privacy_card.md").is_file()
    test = module.datamodule.role("test")
    right = (module.net(module.datamodule.normalize(test.images)).argmax(1) == test.labels).float().mean()
    assert right > 0.6


def test_a_prior_is_learnt_in_the_place_of_pixels(tmp_path):
    module = fit(tmp_path, make(prior=ImageGenerator(1, 8, latent_dim=4, width=4)))
    fresh = make(prior=ImageGenerator(1, 8, latent_dim=4, width=4))
    assert module.images is None
    assert set(module.trainable()) == {f"prior.{name}" for name, _ in fresh.prior.named_parameters()}
    assert load_release(tmp_path / "release").inputs.shape == (20, 1, 8, 8)


def test_a_killed_run_goes_on_to_the_same_images(tmp_path):
    settings = {"outer_loops": 2, "inner_epochs": 1, "releases_per_point": 3}
    whole = fit(tmp_path / "whole", make(**settings))
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path / "cut", make(**settings), max_steps=4, callbacks=[keep], enable_checkpointing=True)
    resumed = fit(tmp_path / "cut", make(**settings), ckpt_path=tmp_path / "kept" / "step=4.ckpt")
    torch.testing.assert_close(whole.images, resumed.images)
    assert len(resumed.mechanism.ledger) == 8


@pytest.mark.parametrize("method", [PSG, DPSGD])
def test_tasks_keep_records_of_their_own_and_are_counted_apart(tmp_path, monkeypatch, method):
    privacy = replace(PRIVACY, steps=8, epsilon=4.0, noise_multiplier=None)
    seen, original = [], method.clipped_sum

    def clipped_sum(self, records):
        seen.append(records[2].unique().tolist())
        return original(self, records)

    monkeypatch.setattr(method, "clipped_sum", clipped_sum)
    if method is PSG:
        module = make(privacy, tasks=FIVE)
    else:
        net = ConvNet(1, 8, 10, width=8, depth=1)
        module = DPSGD(net, partial(torch.optim.SGD, lr=0.1), privacy=privacy, tasks=FIVE)
    fit(tmp_path, module)
    assert seen == [[0, 1]] * 2 + [[2, 3]] * 2 + [[4, 5]] * 2 + [[6, 7]] * 2
    sigma, rate = module.mechanism.noise_multiplier, 60 / 1240
    assert module.mechanism.ledger.releases == tuple(Release(sigma, rate, 2, f"task {k}") for k in range(4))
    assert module.mechanism.epsilon() == pytest.approx(certified([Release(sigma, rate, 2)], 1e-5))
    assert 3.9 < module.mechanism.epsilon() <= 4.0


def test_only_images_of_the_task_move(tmp_path, monkeypatch):
    moved, original = [], PSG.update

    def update(self, mean):
        before = self.images.detach().clone()
        original(self, mean)
        moved.append((self.images - before).flatten(1).norm(dim=1).nonzero().flatten().tolist())

    monkeypatch.setattr(PSG, "update", update)
    fit(tmp_path, make(tasks=FIVE, optimizer=partial(torch.optim.SGD, lr=1.0)))
    assert moved[0] == [0, 1, 2, 3]
    assert moved[-1] == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adjacency": "replace_one"}, "add_remove"),
        ({"steps": 7}, "multiple"),
    ],
)
def test_tasks_that_the_accounting_does_not_cover_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, make(replace(PRIVACY, **change), tasks=FIVE))


def test_refusals():
    for classes in ([], [[0], []], [[0, 1], [1]]):
        with pytest.raises(ConfigError, match="no class twice"):
            Tasks(classes)
    with pytest.raises(ConfigError, match="names no weight"):
        make(matched=["tail."])
    with pytest.raises(ConfigError, match="cannot be drawn anew"):
        make(
            net=torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.PReLU(), torch.nn.Linear(8, 10)
            )
        )
    with pytest.raises(ConfigError, match="must be above 0"):
        make(updates_per_release=0)


def test_epsilon_of_the_card_is_that_of_the_planned_steps(tmp_path):
    """The released code makes one iteration more than it accounts for."""
    privacy = replace(PRIVACY, epsilon=3.0, noise_multiplier=None)
    fit(tmp_path, make(privacy), callbacks=[PrivacyCard()])
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    assert card["releases"][0][2] == 8
    assert 2.9 < card["epsilon"] <= 3.0

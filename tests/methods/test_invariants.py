"""What must not change the result, and what must: on whole runs."""

import dataclasses
from functools import partial

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_dp.callbacks import PrivacyBudget, PrivacyCard
from lightning_dp.data import RecordDataset, Records, Shift
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, SGD, DPAdamBC, DPModule
from lightning_dp.models import LinearHead
from lightning_dp.privacy.accounting import Release
from lightning_dp.privacy.ledger import read
from lightning_dp.privacy.randomness import Randomness
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module, weights


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("reference"))


def test_one_step_is_one_release_and_one_ledger_entry(reference_run):
    assert reference_run.mechanism.ledger.releases == (Release(1.0, 60 / 1240, STEPS),)
    assert reference_run.trainer.global_step == STEPS
    run, written = read(reference_run.mechanism.ledger.path)
    assert (run, written) == (reference_run.mechanism.ledger.run, reference_run.mechanism.ledger.releases)


@pytest.mark.parametrize("chunk", [7, 512])
def test_chunk_size_changes_nothing(tmp_path, reference_run, chunk):
    other = fit(tmp_path, make_module(physical_batch_size=chunk))
    torch.testing.assert_close(weights(other), weights(reference_run), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 512])
def test_chunk_size_changes_nothing_under_augmentation(tmp_path, chunk):
    whole = fit(tmp_path / "whole", make_module(), make_data(augment=Shift(1)))
    other = fit(tmp_path / "other", make_module(physical_batch_size=chunk), make_data(augment=Shift(1)))
    plain = fit(tmp_path / "plain")
    torch.testing.assert_close(weights(other), weights(whole), rtol=0, atol=1e-5)
    assert (weights(whole) - weights(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{"gradient_memory": 0}, {"gradient_memory": 4096}])
def test_gradient_memory_changes_nothing(tmp_path, reference_run, settings):
    other = fit(tmp_path, make_module(**settings))
    torch.testing.assert_close(weights(other), weights(reference_run), rtol=0, atol=1e-5)


def test_the_engine_and_the_reference_train_the_same_weights(tmp_path, reference_run, monkeypatch):
    assert not reference_run.engine.uses_reference
    monkeypatch.setattr(DPSGD, "clipped_sum", DPModule.clipped_sum)
    other = fit(tmp_path)
    torch.testing.assert_close(weights(other), weights(reference_run), rtol=0, atol=1e-5)
    assert not torch.equal(weights(other), weights(reference_run))  # another order of the same sums


def test_loader_workers_change_nothing(tmp_path, reference_run):
    other = fit(tmp_path, data=make_data(num_workers=2))
    torch.testing.assert_close(weights(other), weights(reference_run), rtol=0, atol=1e-5)


def test_callbacks_and_loggers_change_nothing(tmp_path, reference_run):
    callbacks = [PrivacyBudget(1), PrivacyCard(), ModelCheckpoint(tmp_path, every_n_train_steps=5)]
    other = fit(tmp_path, callbacks=callbacks, logger=True, enable_checkpointing=True)
    assert torch.equal(weights(other), weights(reference_run))
    assert other.mechanism.ledger.releases == reference_run.mechanism.ledger.releases


def test_the_global_seed_changes_nothing_private(tmp_path, reference_run):
    torch.manual_seed(12345)
    assert torch.equal(weights(fit(tmp_path)), weights(reference_run))


def test_without_a_seed_every_run_is_different(tmp_path):
    privacy = dataclasses.replace(PRIVACY, seed=None)
    torch.manual_seed(0)
    first = fit(tmp_path / "a", make_module(privacy))
    torch.manual_seed(0)
    second = fit(tmp_path / "b", make_module(privacy))
    assert (weights(first) - weights(second)).abs().max() > 1e-3


def test_empty_batches_are_steps(tmp_path):
    privacy = dataclasses.replace(PRIVACY, expected_batch_size=1)
    module = fit(tmp_path, make_module(privacy))
    assert len(module.mechanism.ledger) == STEPS
    assert weights(module).isfinite().all()


def test_without_noise_and_clipping_it_is_full_batch_gradient_descent(tmp_path):
    """DP-SGD at sigma 0, no clip and rate 1, and the SGD control, equal torch.optim's own run."""
    data = make_data(None)
    data.setup("test")
    private = data.role("private")
    images, labels = data.normalize(private.images), private.labels
    net = LinearHead(1, 8, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    expected = torch.cat([value.detach().reshape(-1) for value in net.parameters()])

    size = len(labels)
    privacy = dataclasses.replace(
        PRIVACY, num_examples=size, expected_batch_size=size, noise_multiplier=0.0, max_norm=float("inf")
    )
    for method in (DPSGD, SGD):
        module = fit(tmp_path / method.__name__, make_module(privacy, method=method))
        torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-5)


def test_noise_reaches_the_weights_at_the_accounted_scale(tmp_path):
    """With a zero learning signal (an empty contribution), one step moves the weights by sigma C / B exactly."""

    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(200_000))

        def forward(self, images):
            return images.flatten(1)[:, :10] + 0 * self.weight.sum()

    privacy = dataclasses.replace(PRIVACY, steps=1, noise_multiplier=1.7, max_norm=0.4)
    module = make_module(privacy, net=Deaf(), optimizer=partial(torch.optim.SGD, lr=1.0))
    moved = weights(fit(tmp_path, module))
    expected = 1.7 * 0.4 / 60
    assert moved.std().item() == pytest.approx(expected, rel=4 / (2 * 200_000) ** 0.5)


def test_a_record_moves_one_step_by_at_most_the_clip_norm(tmp_path):
    """Whole runs on neighbouring data: same coins, one record replaced; the weights differ by <= 2 lr C / B."""
    full = dataclasses.replace(PRIVACY, steps=1, num_examples=1237, expected_batch_size=1237)
    step = partial(torch.optim.SGD, lr=1.0)
    first = fit(tmp_path / "a", make_module(full, optimizer=step))

    neighbour = make_data(full)
    neighbour.setup("fit")
    original = neighbour._datasets["private"]
    images, labels = original.__getitems__(range(len(original)))
    images, labels = images.clone(), labels.clone()
    images[3] = 255 - images[3]
    labels[3] = (labels[3] + 1) % 10
    neighbour._datasets["private"] = RecordDataset(Records(images, labels))
    second = fit(tmp_path / "b", make_module(full, optimizer=step), neighbour)
    difference = (weights(first) - weights(second)).norm().item()
    assert 0 < difference <= 2 * 1.0 / 1237 * (1 + 1e-4)


def test_schedules_step_once_per_logical_step(tmp_path):
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = fit(tmp_path, make_module(scheduler=decay, physical_batch_size=7))
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.5**STEPS)


def test_noise_aware_optimizers_are_told_the_noise(tmp_path):
    module = fit(tmp_path, make_module(optimizer=partial(DPAdamBC, lr=0.01)))
    assert module.optimizers().param_groups[0]["noise_std"] == pytest.approx(1.0 / 60)


def test_weight_averaging_is_lightnings_own(tmp_path):
    module = make_module()
    averaged = fit(tmp_path, module, callbacks=[EMAWeightAveraging(decay=0.5)])
    plain = fit(tmp_path / "plain")
    assert (weights(averaged) - weights(plain)).abs().max() > 1e-4
    assert len(averaged.mechanism.ledger) == STEPS


def test_bf16_forward_stays_close(tmp_path, reference_run):
    module = fit(tmp_path, precision="bf16-mixed")
    assert weights(module).dtype == torch.float32
    torch.testing.assert_close(weights(module), weights(reference_run), rtol=0, atol=0.02)


def test_frozen_parameters_stay_and_cost_no_noise(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    net[1].requires_grad_(False)
    before = net[1].weight.clone()
    module = fit(tmp_path, make_module(net=net))
    assert torch.equal(net[1].weight, before)
    assert set(module.template()) == {"3.weight", "3.bias"}


def test_nothing_private_is_logged(tmp_path):
    module = make_module()
    fit(tmp_path, module, callbacks=[PrivacyBudget(1)], logger=True)
    shown = {*module.trainer.logged_metrics, *module.trainer.callback_metrics, *module.trainer.progress_bar_metrics}
    assert shown == {"epsilon(1e-05, add_remove, pld)", "sigma", "steps_left"}


class Noises(Callback):
    """Keeps the released gradients of a run on zero records: noise and nothing else."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([value.grad.flatten() for value in pl_module.net.parameters()]))


@pytest.mark.parametrize("secure", [False, True])
def test_no_noise_is_used_twice_over_two_fits_of_one_module(tmp_path, secure):
    """Steps are counted from 0 again, so the streams need a fresh key: equal noise would cancel."""
    module = make_module(dataclasses.replace(PRIVACY, seed=None, noise_multiplier=1000.0, secure=secure))
    first, second = Noises(), Noises()
    fit(tmp_path / "a", module, callbacks=[first])
    fit(tmp_path / "b", module, callbacks=[second])
    every = torch.stack([*first.seen, *second.seen])
    assert len(every) == 2 * STEPS
    correlations = torch.corrcoef(every)
    assert (correlations - torch.eye(len(every))).abs().max() < 0.25


def test_dropout_masks_do_not_follow_the_public_seed(tmp_path):
    """Two real runs with equal public seeds and no noise: batches are equal (full), so only masks can differ."""
    privacy = dataclasses.replace(
        PRIVACY, seed=None, num_examples=1237, expected_batch_size=1237, noise_multiplier=0.0, steps=1
    )

    def run(folder):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        torch.manual_seed(0)
        return weights(fit(folder, make_module(privacy, net=net)))

    assert (run(tmp_path / "a") - run(tmp_path / "b")).abs().max() > 1e-6


def test_augmentation_does_not_follow_a_public_seed(tmp_path):
    privacy = dataclasses.replace(
        PRIVACY, seed=None, num_examples=1237, expected_batch_size=1237, noise_multiplier=0.0, steps=1
    )

    def run(folder):
        torch.manual_seed(0)
        return weights(fit(folder, make_module(privacy), make_data(privacy, augment=Shift(1))))

    assert (run(tmp_path / "a") - run(tmp_path / "b")).abs().max() > 1e-6


def test_a_whole_step_in_bf16_stays_inside_the_clip_norm(tmp_path):
    """Equal records, one more or less: the released sums differ by at most C, also under autocast."""
    full = dataclasses.replace(PRIVACY, steps=1, num_examples=1237, expected_batch_size=1237, noise_multiplier=0.0)
    ends = []
    for count in (1237, 1236):
        data = make_data(full)
        data.setup("fit")
        images, labels = data._datasets["private"].__getitems__([0] * count)
        data._datasets["private"] = RecordDataset(Records(images, labels))
        module = make_module(full, optimizer=partial(torch.optim.SGD, lr=1.0), physical_batch_size=2000)
        ends.append(weights(fit(tmp_path / str(count), module, data, precision="bf16-mixed")))
    assert 0 < (ends[0] - ends[1]).norm() * 1237 <= 1.0 + 1e-3


def test_an_update_that_does_not_step_is_stopped_at_the_second_release(tmp_path):
    """Batches and noise are addressed by the trainer's step; the same step twice would repeat both."""

    class Keeps(DPModule):
        def contribution(self, image, label):
            return {"w": image.flatten()}

        def template(self):
            return {"w": torch.zeros(64)}

        def update(self, mean):
            self.kept = mean

    module = make_module(method=Keeps)
    with pytest.raises(ConfigError, match="step 0 was released before"):
        fit(tmp_path, module)
    assert len(module.mechanism.ledger) == 1


def test_the_secure_option_reaches_the_sampler(tmp_path):
    def draw(secure):
        privacy = dataclasses.replace(PRIVACY, secure=secure, steps=1)
        module = fit(tmp_path / str(secure), make_module(privacy))
        sampler = module.trainer.train_dataloader.batch_sampler
        expected = Randomness.from_seed(PRIVACY.seed, secure).numpy("sampling", 0).random(sampler.num_records)
        assert sampler.draw(0).tolist() == (expected < sampler.sample_rate).nonzero()[0].tolist()
        return sampler.draw(0).tolist()

    assert draw(True) != draw(False)


def test_training_leaves_the_global_generator_alone(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    module, data = make_module(net=net), make_data()
    states = []

    class States(Callback):
        def on_train_batch_start(self, *_):
            states.append(torch.get_rng_state())

    fit(tmp_path, module, data, callbacks=[States()])
    assert all(torch.equal(state, states[0]) for state in states)

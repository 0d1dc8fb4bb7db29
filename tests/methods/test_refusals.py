"""Every setting that would break the mechanism is refused, in one line that names it, before anything is released."""

import dataclasses
from functools import partial

import pytest
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ThroughputMonitor,
)
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.errors import ConfigError
from lightning_dp.methods import SGD
from lightning_dp.methods.refusals import check_fit
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module, make_trainer

TRAINER = {
    "trainer.gradient_clip_val": {"gradient_clip_val": 1.0},
    "trainer.accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "trainer.limit_train_batches": {"limit_train_batches": 3},
    "trainer.limit_train_batches 1": {"limit_train_batches": 1},
    "trainer.overfit_batches": {"overfit_batches": 1},
    "trainer.precision bf16-true": {"precision": "bf16-true"},
    "LearningRateFinder": {"callbacks": [LearningRateFinder(num_training_steps=2)]},
    "BatchSizeFinder": {"callbacks": [BatchSizeFinder()]},
    "ThroughputMonitor": {"callbacks": [ThroughputMonitor(batch_size_fn=len)], "logger": True},
    "GradientAccumulationScheduler": {"callbacks": [GradientAccumulationScheduler({0: 2})]},
    "EarlyStopping monitors private_val/loss": {"callbacks": [EarlyStopping("private_val/loss")]},
    "ModelCheckpoint monitors private_val/accuracy": {
        "callbacks": [ModelCheckpoint(monitor="private_val/accuracy")],
        "enable_checkpointing": True,
    },
}


def refused(match, folder, module=None, **settings):
    module = make_module() if module is None else module
    with pytest.raises(ConfigError, match=match) as error:
        fit(folder, module, **settings)
    assert "\n" not in str(error.value)
    assert not module.was_trained or len(module.mechanism.ledger) == 0
    assert not list(folder.glob("**/ledger*.jsonl")) or module.mechanism.ledger.releases == ()


@pytest.mark.parametrize(("setting", "given"), TRAINER.items())
def test_trainer_settings(tmp_path, setting, given):
    refused(setting.replace(".", r"\."), tmp_path, **given)


def test_16_mixed(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused("trainer.precision 16-mixed", tmp_path, plugins=[plugin])


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharded_strategies(tmp_path, strategy):
    trainer = make_trainer(tmp_path)
    trainer.strategy.__class__ = strategy  # they need an accelerator, or a package, to be constructed
    with pytest.raises(ConfigError, match=f"{strategy.__name__} splits the parameters"):
        check_fit(trainer, nn.Linear(1, 1), False)


def test_lr_find_and_the_batch_size_scaler(tmp_path):
    module, data = make_module(), make_data()
    for scale in (Tuner.lr_find, partial(Tuner.scale_batch_size, method="fit")):
        with pytest.raises(ConfigError, match="Finder trains on private records"):
            scale(Tuner(make_trainer(tmp_path)), module, datamodule=data)
    assert not module.was_trained


def test_a_private_validation_metric_by_any_name(tmp_path):
    data = make_data(dataclasses.replace(PRIVACY, num_examples=1190), validation="private", validation_private=50)
    refused(
        "EarlyStopping monitors val/loss", tmp_path, make_module(data.privacy), data=data,
        callbacks=[EarlyStopping("val/loss")],
    )  # fmt: skip


def test_a_public_validation_metric_may_be_monitored(tmp_path):
    module = fit(tmp_path, data=make_data(validation="public"), callbacks=[EarlyStopping("val/loss", patience=100)])
    assert len(module.mechanism.ledger) == STEPS


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_in_train_mode(tmp_path, frozen):
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    if frozen:
        net[0].requires_grad_(False)
    refused("BatchNorm", tmp_path, make_module(net=net))


def test_batch_norm_frozen_in_eval_mode_is_a_function_of_one_record(tmp_path):
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    net[0].requires_grad_(False).eval()
    mean = net[0].running_mean.clone()
    module = fit(tmp_path, make_module(net=net))
    assert torch.equal(net[0].running_mean, mean)
    assert len(module.mechanism.ledger) == STEPS


def test_a_foreign_loader(tmp_path):
    images, labels = torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    for shuffle in (True, False):
        module = make_module()
        with pytest.raises(ConfigError, match="must come from DPDataModule"):
            make_trainer(tmp_path).fit(module, DataLoader(TensorDataset(images, labels), 10, shuffle=shuffle))
        assert not module.was_trained


@pytest.mark.parametrize("method", [None, SGD])
def test_a_data_module_with_another_loader(tmp_path, monkeypatch, method):
    data = make_data()
    other = DataLoader(TensorDataset(torch.zeros(100, 1, 8, 8), torch.zeros(100).long()), 10, shuffle=True)
    monkeypatch.setattr(data, "train_dataloader", lambda: other)
    module = make_module() if method is None else make_module(method=method)
    with pytest.raises(ConfigError, match="draws batches with BatchSampler"):
        fit(tmp_path, module, data)


def test_data_that_samples_at_another_rate(tmp_path):
    refused("the same privacy section", tmp_path, data=make_data(dataclasses.replace(PRIVACY, expected_batch_size=30)))


@pytest.mark.parametrize("changes", [{"seed": None}, {"delta": 7e-5}, {"num_examples": 124, "expected_batch_size": 6}])
def test_data_and_model_with_different_sections(tmp_path, changes):
    """A data module with a known seed would make the batches of an unseeded model public."""
    refused(
        "different privacy sections", tmp_path, make_module(dataclasses.replace(PRIVACY, **changes)), data=make_data()
    )


def test_a_section_that_changes_between_two_fits(tmp_path):
    module = fit(tmp_path / "a")
    module.privacy = dataclasses.replace(PRIVACY, max_norm=5.0)
    with pytest.raises(ConfigError, match="changed between two fits"):
        fit(tmp_path / "b", module)
    assert len(module.mechanism.ledger) == STEPS


@pytest.mark.parametrize("in_place", [False, True])
def test_a_network_that_keeps_statistics_of_its_own(tmp_path, in_place):
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1, 64))
            self.linear = nn.Linear(64, 10)

        def forward(self, images):
            flat = images.flatten(1)
            if in_place:
                self.mean.copy_(flat.detach())
            else:
                self.mean = 0.9 * self.mean + 0.1 * flat.detach()
            return self.linear(flat)

    module = make_module(net=Running(), physical_batch_size=1)
    with pytest.raises((ConfigError, RuntimeError)):
        fit(tmp_path, module)
    assert len(module.mechanism.ledger) == 0


def test_an_encoder_that_mixes_records(tmp_path):
    """Evaluation mode does not help a BatchNorm without running statistics."""
    encoder = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten())
    refused("depend on its batch", tmp_path, data=make_data(encoder=encoder, cache=tmp_path))


def test_a_network_with_nothing_to_train(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    refused("no parameter to train", tmp_path, make_module(net=net))


def test_data_made_for_another_rank(tmp_path, monkeypatch):
    data = make_data()
    made = type(data).train_dataloader

    def second_half():
        loader = made(data)
        loader.batch_sampler.rank, loader.batch_sampler.world_size = 1, 2
        return loader

    monkeypatch.setattr(data, "train_dataloader", second_half)
    refused("serves rank 1 of 2", tmp_path, data=data)


def test_wrong_size_of_the_private_role(tmp_path):
    refused(
        r"num_examples is 5000 .* about 1240", tmp_path, make_module(dataclasses.replace(PRIVACY, num_examples=5000))
    )


def test_no_privacy_section(tmp_path):
    refused("privacy section", tmp_path, make_module(None), data=make_data(PRIVACY))


def test_a_schedule_that_follows_a_metric(tmp_path):
    refused("ReduceLROnPlateau", tmp_path, make_module(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau))


@pytest.mark.parametrize("waiting", [{"min_steps": 10_000}, {"min_epochs": 3, "max_epochs": 5}])
def test_the_budget_ends_the_run_whatever_the_trainer_waits_for(tmp_path, waiting):
    """Lightning ignores should_stop until min_steps and min_epochs are met."""
    privacy = dataclasses.replace(PRIVACY, noise_multiplier=1.0, epsilon=1.5, steps=500)
    module = fit(tmp_path, make_module(privacy), **{"max_steps": -1, **waiting})
    assert 0 < len(module.mechanism.ledger) < 20
    assert module.mechanism.epsilon() <= 1.5
    assert module.trainer.global_step == len(module.mechanism.ledger)


def test_steps_are_a_limit_without_an_epsilon_too(tmp_path):
    assert len(fit(tmp_path, max_steps=-1, max_epochs=50).mechanism.ledger) == STEPS


def test_fast_dev_run_is_a_few_honest_steps(tmp_path):
    assert len(fit(tmp_path, fast_dev_run=2).mechanism.ledger) == 2

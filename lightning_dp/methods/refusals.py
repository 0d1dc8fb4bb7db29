"""Settings of a Trainer under which a private run would not be the accounted mechanism. Each is refused by name."""

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ThroughputMonitor,
)
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_dp.errors import ConfigError
from lightning_dp.models import EncoderClassifier, validate
from lightning_dp.privacy import PrivacyConfig
from lightning_dp.privacy.sampling import PoissonBatchSampler


def check_fit(trainer: Trainer, net: nn.Module, validation_is_private: bool) -> None:
    """Refuse what breaks the mechanism, before anything is set up.

    Raises:
        ConfigError: naming the setting and the way out.
    """
    _check_gradients(trainer)
    _check_batches(trainer)
    _check_callbacks(trainer, validation_is_private)
    _check_constants(trainer, net)
    if problems := validate(net):
        raise ConfigError(
            problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more like it)"
        )


def check_loader(loader: object, privacy: PrivacyConfig, rank: int, world_size: int) -> None:
    """Refuse a training loader whose batches are not the accounted Poisson draws.

    Raises:
        ConfigError: another sampler, another rate, or another share of the batch.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if type(sampler) is not PoissonBatchSampler:
        raise ConfigError(
            f"the training loader draws batches with {type(sampler).__name__}, but Poisson sampling is accounted: "
            "pass DPDataModule and no train_dataloaders, and leave trainer.use_distributed_sampler false"
        )
    if sampler.sample_rate != privacy.sample_rate:
        raise ConfigError(
            f"the training loader samples at rate {sampler.sample_rate:g} but {privacy.sample_rate:g} is accounted: "
            "give DPDataModule and the model the same privacy section"
        )
    if (sampler.rank, sampler.world_size) != (rank, world_size):
        raise ConfigError(
            f"the training loader serves rank {sampler.rank} of {sampler.world_size}, but this is rank {rank} of "
            f"{world_size}: let the trainer make the loader (pass the data module, not a loader)"
        )


def _check_constants(trainer: Trainer, net: nn.Module) -> None:
    source = trainer.datamodule.source  # type: ignore[attr-defined]  # a DPDataModule, by Classifier.datamodule
    if not isinstance(net, EncoderClassifier) or net.constants is None:
        return
    if net.constants != (tuple(source.mean), tuple(source.std)):
        raise ConfigError(
            f"model.net EncoderClassifier undoes mean and std {net.constants}, but data.source {source.name} has "
            f"{tuple(source.mean)} and {tuple(source.std)}, so the encoder would see wrong images: set these"
        )


def _check_gradients(trainer: Trainer) -> None:
    # By exact class: DeepSpeed's and XLA's are subclasses of DDP's.
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ConfigError(
            f"trainer.strategy {type(trainer.strategy).__name__} splits the parameters, so a record's norm is not "
            "known on any device: use auto or ddp"
        )
    if trainer.gradient_clip_val is not None:
        raise ConfigError(
            "trainer.gradient_clip_val clips the batch, not the record, and would act on noise: remove it and set "
            "privacy.max_norm"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} would put several Poisson batches in "
            "one step: remove it and set privacy.expected_batch_size (memory: model.physical_batch_size)"
        )
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise ConfigError(
            f"trainer.precision {trainer.precision} scales or rounds what is clipped: use 32-true or bf16-mixed"
        )


def _check_batches(trainer: Trainer) -> None:
    if trainer.overfit_batches != 0:  # type: ignore[attr-defined]  # set by Lightning, not declared
        raise ConfigError(
            "trainer.overfit_batches repeats a batch and evaluates on private records: remove it and train on the "
            "digits data to debug"
        )
    limited = trainer.limit_train_batches != 1.0 or isinstance(trainer.limit_train_batches, int)
    if limited and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError(
            f"trainer.limit_train_batches {trainer.limit_train_batches} ends epochs early: remove it and set "
            "privacy.steps"
        )


def _check_callbacks(trainer: Trainer, validation_is_private: bool) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise ConfigError(
                f"{type(callback).__name__} trains on private records and rewinds, so its releases would not be "
                "counted: remove it and tune on public data or on the digits"
            )
        if isinstance(callback, GradientAccumulationScheduler):
            raise ConfigError("GradientAccumulationScheduler: remove it and set privacy.expected_batch_size")
        if isinstance(callback, ThroughputMonitor):
            raise ConfigError("ThroughputMonitor logs the sizes of the batches, which are private: remove it")
        monitor = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
        if monitor is not None and (monitor.startswith("private") or (validation_is_private and "val" in monitor)):
            raise ConfigError(
                f"{type(callback).__name__} monitors {monitor}, computed from private records without noise, so the "
                "choice would leak them: monitor val/... with data.validation public, or drop the monitor"
            )

"""What every classifier shares: a network, an optimizer, evaluation. Nothing in this file touches private records."""

import warnings
from abc import ABC
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.data import DPDataModule
from lightning_dp.errors import ConfigError
from lightning_dp.methods.refusals import check_fit
from lightning_dp.privacy import PrivacyConfig

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule, ABC):
    """Abstract base: a network trained by manual optimization, one optimizer step per logical batch.

    Evaluation logs ``val/accuracy`` and ``val/loss`` (``private_val/...`` if the validation records are private, which
    may not be monitored) and ``test/accuracy`` and ``test/loss``. Nothing is logged during training.

    Args:
        net: (n, channels, height, width) or features (n, ...) -> logits (n, classes).
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning rate schedule, stepped once per logical step.
        physical_batch_size: records per forward pass and device; performance only.
        privacy: the public numbers, linked from the ``privacy`` section; None for evaluation only.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        physical_batch_size: int = 256,
        privacy: PrivacyConfig | None = None,
    ) -> None:
        super().__init__()
        if physical_batch_size < 1:
            raise ConfigError(f"model.physical_batch_size {physical_batch_size} must be at least 1")
        self.automatic_optimization = False
        self._save_plain_hyperparameters()
        self.net = net
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.physical_batch_size = physical_batch_size
        self.privacy = privacy
        self.val_accuracy = MulticlassAccuracy(average="micro")
        self.test_accuracy = MulticlassAccuracy(average="micro")

    @property
    def datamodule(self) -> DPDataModule:
        """The data module of the running trainer.

        Raises:
            ConfigError: the trainer was given plain loaders or another data module.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if not isinstance(datamodule, DPDataModule):
            raise ConfigError("the data must come from DPDataModule, whose sampler is the accounted one: set --data")
        return datamodule

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of the network that are trained, by name."""
        return {name: value for name, value in self.net.named_parameters() if value.requires_grad}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of normalised images (n, channels, height, width)."""
        logits: Tensor = self.net(images)
        return logits

    def configure_callbacks(self) -> list[Any]:
        """No callbacks; the first hook of a fit, so that our refusals come before Lightning's less helpful ones."""
        if self.trainer.state.fn == "fit":
            check_fit(self.trainer, self.net, self.datamodule.validation_is_private)
        return []

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule so that checkpoints carry it; `step_optimizer` steps both."""
        if not self.trainable():
            raise ConfigError("model.net has no parameter to train: unfreeze one")
        optimizer = self.make_optimizer(iter(self.trainable().values()))
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError("model.scheduler ReduceLROnPlateau follows a metric during training: choose one by step")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def step_optimizer(self, gradients: dict[str, Tensor]) -> None:
        """One logical step with the given gradients, named as in `trainable`."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        for name, parameter in self.trainable().items():
            parameter.grad = gradients[name].to(parameter.dtype)
        optimizer.step()  # type: ignore[union-attr]  # one optimizer, by configure_optimizers
        optimizer.zero_grad()  # type: ignore[union-attr]
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def sum_over_ranks(self, flat: Tensor) -> Tensor:
        """Sum of a tensor over all processes; the only collective of a training step."""
        total: Tensor = self.trainer.strategy.reduce(flat, reduce_op="sum")
        return total

    def prepare(self, images: Tensor, coins: Tensor, labels: Tensor) -> Batch:
        """Normalise and augment a chunk on the device, each record by itself with its own coins."""
        inputs = self.datamodule.normalize(images)
        augment = self.datamodule.augment
        return (inputs if augment is None else augment(inputs, coins)), labels

    def record_coins(self, records: int, generator: np.random.Generator) -> Tensor:
        """Coins of this rank's ``records`` in the augmentation of one step, shape (records, coins), in [0, 1).

        Row i belongs to place ``rank + i * world_size`` of the global batch, so the coins of a record do not depend
        on the number of ranks.
        """
        augment = self.datamodule.augment
        width = 0 if augment is None else augment.num_coins
        rank, world = self.trainer.global_rank, self.trainer.world_size
        coins = generator.random((records * world, width), dtype=np.float32)[rank::world]
        return torch.from_numpy(coins).to(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and loss on the validation role."""
        prefix = "private_val" if self.datamodule.validation_is_private else "val"
        self._evaluate(batch, self.val_accuracy, prefix)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and loss on the test role."""
        self._evaluate(batch, self.test_accuracy, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities (n, classes)."""
        probabilities: Tensor = self(batch[0]).softmax(1)
        return probabilities

    def _evaluate(self, batch: Batch, accuracy: MulticlassAccuracy, prefix: str) -> None:
        images, labels = batch
        # A rank may get an empty last batch, so that all ranks see the same number of batches.
        logits = self(images).float()
        total = F.cross_entropy(logits, labels, reduction="sum")
        accuracy.update(logits, labels)
        self.log(f"{prefix}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        mean = total / max(1, len(labels))
        self.log(f"{prefix}/loss", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))

    def _save_plain_hyperparameters(self) -> None:
        """Under LightningCLI the configuration of every argument; otherwise only plain values.

        A live network or factory would be pickled into the checkpoint, which then no longer loads with
        ``weights_only=True``.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
            self.save_hyperparameters(ignore=["privacy"])
        for hparams in (self.hparams, self._hparams_initial):
            assert isinstance(hparams, dict)
            for name in [name for name, value in hparams.items() if callable(value)]:
                del hparams[name]

"""Ordinary training on a release, without privacy: the release is public."""

from typing import Any, final

from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.data.release import ReleaseDataModule
from lightning_dp.errors import ConfigError

Batch = tuple[Tensor, Tensor]


@final
class ReleaseClassifier(LightningModule):
    """Any network on a release; logs ``train/loss``, ``test/accuracy`` and ``test/loss``.

    The loss is the generalised Kullback-Leibler divergence from the soft labels, clamped at 0, up to a constant: the
    cross entropy with labels that need not sum to 1. For hard labels it is the usual one.

    Args:
        net: inputs of the release (n, ...) -> logits (n, classes).
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning rate schedule, stepped once per epoch.
    """

    def __init__(
        self, net: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.test_accuracy = MulticlassAccuracy(average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes) of inputs (n, ...)."""
        logits: Tensor = self.net(inputs)
        return logits

    def configure_callbacks(self) -> list[Any]:
        """No callbacks; the first hook of a fit.

        Raises:
            ConfigError: the data are not a release.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if self.trainer.state.fn == "fit" and not isinstance(data, ReleaseDataModule):
            raise ConfigError("ReleaseClassifier learns without privacy, from a release: set data to ReleaseDataModule")
        return []

    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule."""
        optimizer = self.make_optimizer(self.net.parameters())
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss; free to be logged, as everything computed from a release."""
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs), targets.clamp(min=0))
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and loss on the test side of the source."""
        inputs, labels = batch
        logits = self(inputs)
        self.test_accuracy.update(logits, labels)
        self.log("test/accuracy", self.test_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        loss = F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
        self.log("test/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))

"""An exponential moving average of the weights, looked at beside the weights themselves."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.errors import ConfigError
from lightning_dp.methods import Classifier


class WeightEMA(Callback):
    """Averages the trained weights once per logical step, and logs their accuracy.

    Post-processing: it reads released weights only, and the run goes on as without it. After t updates the decay is
    min(decay, (1 + t) / (10 + t)), as in the runs of De et al. 2022 (arXiv 2204.13650); the first update copies.
    Logged: ``val_ema/accuracy`` (``private_val_ema/accuracy`` if the validation records are private) and
    ``test_ema/accuracy``, beside those of the raw weights. Lightning's own `EMAWeightAveraging` shows the average only,
    and leaves it in the place of the weights.

    The average is kept in the checkpoint, under the callback's state, and is restored by a resumed fit and by a test of
    the checkpoint with this callback.

    Args:
        decay: weight of the past at each update, in (0, 1).

    Raises:
        ConfigError: ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"WeightEMA.decay {decay} must lie between 0 and 1: 0.99 averages the last 100 steps")
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {}
        self._accuracy = MulticlassAccuracy(average="micro")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of an earlier fit; one that is resumed gets its own back after this."""
        if stage == "fit":
            self.updates, self.weights = 0, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average; one batch is one logical step."""
        assert isinstance(pl_module, Classifier)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        for name, value in pl_module.trainable().items():
            new = value.detach()
            old = self.weights.get(name, new).to(new.device)
            self.weights[name] = torch.lerp(old, new, 1 - decay)
        self.updates += 1

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what the average gets right."""
        self._count(trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what the average gets right."""
        self._count(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the average."""
        assert isinstance(pl_module, Classifier)
        self._log(pl_module, "private_val_ema" if pl_module.datamodule.validation_is_private else "val_ema")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the average."""
        self._log(pl_module, "test_ema")

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the stored average."""
        self.updates, self.weights = state_dict["updates"], state_dict["weights"]

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: tuple[Tensor, Tensor]) -> None:
        assert isinstance(pl_module, Classifier)
        if not self.weights:
            return
        images, labels = batch
        weights = {name: value.to(images.device) for name, value in self.weights.items()}
        with trainer.precision_plugin.val_step_context():
            logits = functional_call(pl_module.net, weights, (images,))
        self._accuracy.to(images.device).update(logits.float(), labels)

    def _log(self, pl_module: LightningModule, prefix: str) -> None:
        if self.weights:
            pl_module.log(f"{prefix}/accuracy", self._accuracy.compute(), sync_dist=True)
            self._accuracy.reset()

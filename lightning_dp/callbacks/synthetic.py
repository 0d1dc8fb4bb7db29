"""What a synthetic set looks like and what it teaches, while it is learnt. All of it is post-processing."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, PSG, ReleaseTraining


class SyntheticImages(Callback):
    """Draws the synthetic images of `PSG` into TensorBoard, a row a class, and at the end into ``release/images.png``.

    They may be shown freely: they are made of noisy sums alone.

    Args:
        every_n_steps: steps between two pictures.

    Raises:
        ConfigError: it is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"SyntheticImages.every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw."""
        if isinstance(pl_module, PSG) and trainer.is_global_zero and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw for the last time, and save the picture beside the release."""
        if not isinstance(pl_module, PSG) or not trainer.is_global_zero:
            return
        grid = self._draw(trainer, pl_module)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "release"
        if folder.is_dir():
            save_image(grid, folder / "images.png")

    @staticmethod
    @torch.no_grad()
    def _draw(trainer: Trainer, module: PSG) -> Tensor:
        images, source = module.synthetic()[0].cpu(), module.datamodule.source
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))
        grid: Tensor = make_grid((images * std + mean).clamp(0, 1), nrow=module.images_per_class)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("release/images", grid, trainer.global_step)
        return grid


class ReleaseAccuracy(Callback):
    """Trains the network of `PSG` anew on the present synthetic set, and logs ``release/accuracy`` on the test role.

    For reports: the number of steps must not be chosen by it, nor anything else.

    Args:
        every_n_steps: steps between two looks; each trains a network.
        training: how.

    Raises:
        ConfigError: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int = 100, training: ReleaseTraining | None = None) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"ReleaseAccuracy.every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.training = ReleaseTraining() if training is None else training

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, at the moment and on the first process."""
        if not isinstance(pl_module, PSG) or trainer.global_step % self.every_n_steps or not trainer.is_global_zero:
            return
        classes = list(range(pl_module.datamodule.num_classes))
        accuracy = taught_accuracy(pl_module, self.training, classes)
        for logger in trainer.loggers:
            logger.log_metrics({"release/accuracy": accuracy}, step=trainer.global_step)
        rank_zero_info(f"step {trainer.global_step}: a network trained on the synthetic set has {accuracy:.4f}")


class TaskAccuracy(Callback):
    """Accuracy on the classes seen so far, after each task of `DPSGD` or `PSG`; for continual learning.

    Logs ``tasks/accuracy`` by task, draws the curve into TensorBoard and writes ``tasks.json``. A network trained on
    all synthetic images so far is looked at for `PSG`, the network itself for `DPSGD`. Test records only.

    Args:
        training: how the network is trained on synthetic images.
    """

    def __init__(self, training: ReleaseTraining | None = None) -> None:
        self.training = ReleaseTraining() if training is None else training
        self.accuracies: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the end of a task."""
        if not isinstance(pl_module, DPSGD | PSG) or pl_module.tasks is None:
            return
        tasks, steps = pl_module.tasks, pl_module.mechanism.config.steps
        ended = tasks.at(trainer.global_step - 1, steps)
        if trainer.global_step * len(tasks.classes) % steps or not trainer.is_global_zero:
            return
        seen = tasks.seen(ended)
        if isinstance(pl_module, PSG):
            self.accuracies.append(taught_accuracy(pl_module, self.training, seen))
        else:
            self.accuracies.append(accuracy_among(pl_module.net, pl_module, seen))
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tasks.json").write_text(json.dumps({"accuracy": self.accuracies}) + "\n", encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_metrics({"tasks/accuracy": self.accuracies[-1]}, step=len(self.accuracies))
            if isinstance(logger, TensorBoardLogger):
                figure, axes = plt.subplots(figsize=(4, 3))
                axes.plot(range(1, len(self.accuracies) + 1), self.accuracies, marker="o")
                axes.set(xlabel="tasks seen", ylabel="accuracy on their classes", ylim=(0, 1))
                logger.experiment.add_figure("tasks/curve", figure, len(self.accuracies))


def taught_accuracy(module: PSG, training: ReleaseTraining, classes: list[int]) -> float:
    """Accuracy among ``classes`` of the module's network, trained on their images; its weights are put back."""
    net, before = module.net, {name: value.clone() for name, value in module.net.state_dict().items()}
    images, labels = (part.detach() for part in module.synthetic())
    rows = torch.isin(labels, torch.tensor(classes, device=labels.device))
    targets = F.one_hot(labels[rows], module.datamodule.num_classes).float()
    training(net, images[rows], targets, module.network_seed)
    accuracy = accuracy_among(net, module, classes)
    net.load_state_dict(before)
    return accuracy


@torch.no_grad()
def accuracy_among(net: nn.Module, module: DPSGD | PSG, classes: list[int]) -> float:
    """Share of the test records of ``classes`` that ``net`` tells from one another rightly."""
    data = module.datamodule
    test, chosen = data.role("test"), torch.tensor(classes)
    rows = torch.isin(test.labels, chosen)
    images, labels = data.normalize(test.images[rows]), test.labels[rows]
    logits = torch.cat([net(part.to(module.device)).cpu() for part in torch.split(images, 500)])
    return float((chosen[logits[:, chosen].argmax(1)] == labels).double().mean())

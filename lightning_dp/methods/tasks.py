"""Continual learning: disjoint sets of classes, one after the other.

A record can only be in the sums of the task that its class belongs to; in those of other tasks it is nothing, whatever
the coin. So every record pays for its own task alone (parallel composition), and the budget is that of one task. The
class of a record is part of it: with replaced records, which could change task, this would not hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch
from lightning_dp.privacy import Mechanism, PrivacyConfig, Release


@final
@dataclass(frozen=True)
class Tasks:
    """Which classes are learnt in which task; each task takes the same number of steps.

    A batch is drawn from all private records at ``privacy.sample_rate`` and then reduced to those of the task, which
    is a Poisson batch of them at the same rate.

    Args:
        classes: one list of classes for each task; no class twice.

    Raises:
        ConfigError: a class is in two tasks, or a task is empty.

    Example:
        >>> tasks = Tasks([[0, 1], [2, 3]])
        >>> [tasks.at(step, 10) for step in (0, 4, 5, 9)]
        [0, 0, 1, 1]
    """

    classes: list[list[int]]

    def __post_init__(self) -> None:
        every = [k for task in self.classes for k in task]
        if not self.classes or not all(self.classes) or len(set(every)) < len(every):
            raise ConfigError("tasks.classes must be lists of classes, none empty and no class twice: correct it")

    def at(self, step: int, steps: int) -> int:
        """Index of the task of ``step``; the last one's after the end."""
        return min(step * len(self.classes) // steps, len(self.classes) - 1)

    def members(self, labels: Tensor, task: int) -> Tensor:
        """Which of ``labels`` (n,) belong to the task, bool (n,)."""
        return torch.isin(labels, torch.tensor(self.classes[task], device=labels.device))

    def seen(self, task: int) -> list[int]:
        """All classes up to and with the task."""
        return [k for classes in self.classes[: task + 1] for k in classes]

    def check(self, num_classes: int, privacy: PrivacyConfig | None) -> None:
        """Refuse what the accounting does not cover.

        Raises:
            ConfigError: naming the setting.
        """
        if max(k for task in self.classes for k in task) >= num_classes or min(map(min, self.classes)) < 0:
            raise ConfigError(f"tasks.classes {self.classes} has a class that the data do not: they have {num_classes}")
        if privacy is None:
            return
        if privacy.adjacency != "add_remove":
            raise ConfigError("tasks need privacy.adjacency add_remove: a replaced record may change its task")
        if privacy.steps % len(self.classes):
            raise ConfigError(
                f"privacy.steps {privacy.steps} must be a multiple of the {len(self.classes)} tasks: change it"
            )

    def new_mechanism(self, privacy: PrivacyConfig, previous: dict[str, Any] | None) -> Mechanism:
        """The mechanism of all tasks, at the noise that one of them needs.

        Raises:
            ConfigError: a checkpoint was given.
        """
        if previous is not None:
            raise ConfigError("a run with tasks is not continued: start anew without ckpt_path; its ledger stays")
        steps = privacy.steps // len(self.classes)
        return Mechanism(
            privacy, plan=[Release(0.0, privacy.sample_rate, steps, _group(task)) for task in range(len(self.classes))]
        )

    def takes_part(self, batch: Batch, step: int, mechanism: Mechanism) -> tuple[Batch, Sequence[Release]]:
        """The part of a Poisson batch that belongs to the task of ``step``, and its entry in the ledger."""
        images, labels = batch
        task = self.at(step, mechanism.config.steps)
        rows = self.members(labels, task)
        release = Release(mechanism.noise_multiplier, mechanism.config.sample_rate, 1, _group(task))
        return (images[rows], labels[rows]), [release]


def _group(task: int) -> str:
    return f"task {task}"

"""Watches the mechanism at work and stops the run if it is not the one that is accounted."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dp.errors import ConfigError
from lightning_dp.methods import PSG, DPModule, GradientModule
from lightning_dp.privacy import Release
from lightning_dp.privacy.conformance import DrawStatistics, NoiseStatistics
from lightning_dp.privacy.sampling import PoissonBatchSampler

_ROUNDING = 1e-5


class ViolationError(ConfigError):
    """The running mechanism is not the accounted one."""


@final
class Conformance(Callback):
    """Checks the first releases of a run on what really happened, and raises where it is not what is accounted.

    Noise: its scale (chi-square of what was added to the sum) and that none repeats. Batches: nobody twice, the rate,
    and that records come back as often as in independent draws, which shuffled batches do not. Clipping: single records
    of each batch, summed alone, stay within the clip norm. Ledger: as many entries as releases. Several processes: the
    same weights on all. An observer: batches, noise and weights are bit for bit those of a run without it.

    Args:
        steps: releases that are looked at; None for all.
        records: records of each batch that are clipped alone.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(self, steps: int | None = 20, records: int = 2) -> None:
        if (steps is not None and steps < 1) or records < 1:
            raise ConfigError("Conformance.steps and records must be at least 1: correct them")
        self.steps = steps
        self.records = records
        self._found: str | None = None
        self._listening = False
        self.summary: str | None = None
        """What was looked at and found right, for the card; None before a fit."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        if not isinstance(pl_module, DPModule):
            return
        self._found, self._seen, self._noisy, self._module = None, 0, False, pl_module
        self._first, self._released = trainer.global_step, 0
        self._before = len(pl_module.mechanism.ledger)
        self._noise = NoiseStatistics()
        loader: Any = trainer.train_dataloader
        sampler = loader.batch_sampler
        assert isinstance(sampler, PoissonBatchSampler)
        self._draws, self._sampler = DrawStatistics(sampler.num_records, sampler.sample_rate), sampler
        sampler.observers.append(self._drawn)
        pl_module.mechanism.observers.append(self._noised)
        self._listening = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Clip some records of the batch alone."""
        if isinstance(pl_module, GradientModule | PSG) and self._watching(trainer):
            self._clip_alone(pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare ledger and replicas, and raise on all processes what any of them found."""
        if not isinstance(pl_module, DPModule) or self._seen == 0:
            return
        self._seen = 0
        counted = len(pl_module.mechanism.ledger) - self._before
        if counted != self._released:
            self._note(f"{self._released} releases were made and {counted} are in the ledger")
        if trainer.world_size > 1:
            self._compare(trainer, pl_module)
        if self._found is not None:
            raise ViolationError(
                f"conformance: {self._found}. What was released up to here does not have the stated guarantee"
            )
        self.summary = (
            f"Noise, batches, clipping and ledger of the first {self._released} releases were watched while they were "
            "made (Conformance) and are as accounted."
        )
        if not self._watching(trainer):
            self._let_go()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching."""
        if isinstance(pl_module, DPModule):
            self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        if isinstance(pl_module, DPModule):
            self._let_go()

    def _watching(self, trainer: Trainer) -> bool:
        return self.steps is None or trainer.global_step - self._first < self.steps

    def _let_go(self) -> None:
        if self._listening:
            self._module.mechanism.observers.remove(self._noised)
            self._sampler.observers.remove(self._drawn)
            self._listening = False

    def _note(self, found: str | None) -> None:
        self._found = self._found or found

    def _drawn(self, drawn: np.ndarray) -> None:
        self._note(self._draws.add(drawn))

    def _noised(self, before: Tensor, after: Tensor, entries: Sequence[Release], rank: int) -> None:
        self._released += sum(entry.count for entry in entries)
        self._seen += 1
        self._noisy = self._noisy or rank == 0
        std = self._module.mechanism.noise_std_of_mean * self._module.mechanism.config.expected_batch_size
        if rank == 0 and std > 0:
            self._note(self._noise.add(((after - before) / std).cpu().numpy()))

    def _clip_alone(self, module: GradientModule | PSG, batch: Any) -> None:
        images, labels = batch
        bound = module.mechanism.config.max_norm
        coins = module.record_coins(len(labels), np.random.default_rng(0))
        for i in range(min(self.records, len(labels))):
            record = slice(i, i + 1)
            with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
                total = module.clipped_sum((images[record], coins[record], labels[record]))
            norm = float(torch.cat([value.flatten().double() for value in total.values()]).norm())
            if not norm <= bound * (1 + _ROUNDING):
                self._note(f"a single record adds {norm:.4g}, above the clip norm {bound:.4g}")

    def _compare(self, trainer: Trainer, module: DPModule) -> None:
        flat = torch.cat([value.detach().flatten().double() for value in module.trainable().values()])
        flags = torch.tensor([float(self._found is not None), float(self._noisy)]).to(flat)
        every: Tensor = trainer.strategy.all_gather(torch.cat([flat.sum()[None], flat.square().sum()[None], flags]))
        if not torch.equal(every[:, :2], every[:1, :2].expand(len(every), -1)):
            self._note("the processes have different weights")
        if not every[:, 3].any():
            self._note("no process added noise")
        if every[:, 2].any():
            self._note("another process found a violation; see its message")

"""Private methods as Lightning modules: a clipped contribution per record, a release, an update.

`DPModule.training_step` reads as the algorithm. One Lightning batch is one logical Poisson batch, one release, one
entry of the ledger and one ``global_step``; physical chunks are a loop inside the step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import grad

from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch, Classifier
from lightning_dp.methods.refusals import check_loader
from lightning_dp.privacy import Ledger, Mechanism, PrivacyConfig, Release, clipped_sum
from lightning_dp.privacy.clipping import Tensors
from lightning_dp.privacy.dataset_ledger import DatasetLedger
from lightning_dp.privacy.engines import OneBackward


class DPModule(Classifier, ABC):
    """Learns from noisy clipped sums over Poisson batches, and from nothing else.

    Guarantee: (epsilon, delta) of the module's ledger, under the adjacency of ``privacy``, for everything the training
    leaves behind: weights, optimizer state, logs and all checkpoints together.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        physical_batch_size: int = 256,
        privacy: PrivacyConfig | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler, physical_batch_size, privacy)
        self._mechanism: Mechanism | None = None
        self._previous: dict[str, Any] | None = None
        self._disclosed: list[str] = []
        self._declared = privacy
        self._dataset_ledger: DatasetLedger | None = None

    @abstractmethod
    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """What one record adds, before clipping. ``image`` (channels, height, width), ``label`` ()."""

    @abstractmethod
    def template(self) -> Tensors:
        """Tensors of the shapes of a contribution."""

    @abstractmethod
    def update(self, mean: Tensors) -> None:
        """Use a released mean. Everything here is post-processing."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One release: bound every record, sum, add noise and record it, update."""
        step, rank = self.trainer.global_step, self.trainer.global_rank
        (images, labels), draws = self.takes_part(batch, step)
        coins = self.record_coins(len(labels), self.mechanism.randomness.numpy("augment", step))
        buffers = _buffer_versions(self.net)
        with self._secret_coins(step, rank):
            total = self.clipped_sum((images, coins, labels))
        if _buffer_versions(self.net) != buffers:
            raise ConfigError(
                "the network writes to its own buffers in the forward pass, so records see each other and the buffers "
                "are released without noise: take out running statistics (make_private_ready does for known layers)"
            )
        self.update(self.mechanism.release(total, step, rank, self.sum_over_ranks, draws))

    def takes_part(self, batch: Batch, step: int) -> tuple[Batch, Sequence[Release] | None]:
        """The records of a Poisson batch that the sum of ``step`` is about, chosen each by itself.

        With them their entry in the ledger, where that is not the one of `Mechanism.release`.
        """
        return batch, None

    def clipped_sum(self, records: tuple[Tensor, ...]) -> Tensors:
        """Sum of the clipped contributions of ``records``: images, coins and labels, as `prepare` takes them."""
        return clipped_sum(
            self.contribution,
            records,
            self.template(),
            max_norm=self.mechanism.config.max_norm,
            clipping=self.mechanism.config.clipping,
            chunk=self.physical_batch_size,
            prepare=self.prepare,
        )

    @final
    def disclose(self, what: str) -> None:
        """Note what is written from private records without noise, because it was asked for; before it is written."""
        if what not in self._disclosed:
            self._disclosed.append(what)

    @final
    def private_diagnostics(self) -> list[str]:
        """What this run, or one that it goes on from, disclosed; it goes on the card."""
        return list(self._disclosed)

    def new_mechanism(self, privacy: PrivacyConfig, previous: dict[str, Any] | None) -> Mechanism:
        """The mechanism of a run that begins, or goes on from ``previous``."""
        return Mechanism(privacy, previous)

    def claims(self) -> list[str]:
        """What others say of this mechanism, for the card; each beside the certified value."""
        return []

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism of this run; holds the ledger.

        Raises:
            ConfigError: nothing was trained with this module yet.
        """
        if self._mechanism is None:
            raise ConfigError("this module has not been trained, so it has no privacy ledger: run fit first")
        return self._mechanism

    @property
    def dataset_ledger(self) -> DatasetLedger | None:
        """What all runs on the same records have cost; on rank 0, once training has begun, if it can be written."""
        return self._dataset_ledger

    @property
    def was_trained(self) -> bool:
        """Whether there is a mechanism, and so a ledger, in this process."""
        return self._mechanism is not None

    def configure_optimizers(self) -> Any:
        """The optimizer."""
        # The first hook of a fit after the checkpoint was read: here it is known whether a run is new or continued.
        self._start_mechanism()
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        """Check the live loader, take hold of the ledger's file, and work out what may still be released."""
        trainer, mechanism = self.trainer, self.mechanism
        assert self.privacy is not None
        check_loader(trainer.train_dataloader, self.privacy, trainer.global_rank, trainer.world_size)
        if self.datamodule.privacy != self.privacy:
            raise ConfigError(
                "DPDataModule and the model have different privacy sections, so batches would not be the accounted "
                "ones: give both the same"
            )
        self._attach(mechanism)
        planned = mechanism.planned_releases(trainer.global_step)
        if (missing := mechanism.config.steps - trainer.global_step - planned) > 0:
            lost = len(mechanism.ledger) - trainer.global_step
            rank_zero_warn(
                f"the budget covers {planned} more steps, {missing} fewer than privacy.steps asks for"
                + (f": {lost} releases were made apart from this checkpoint's steps and count" if lost else "")
            )
        self._enter_dataset_ledger()
        self._stop_when_spent()

    def on_train_end(self) -> None:
        """Tell the data's own ledger that this run has ended."""
        if self.trainer.is_global_zero and self._dataset_ledger is not None:
            self._dataset_ledger.end(self.mechanism.ledger.run, self.mechanism.ledger.path)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Skip the rest of the epoch if the budget covers no further release."""
        return -1 if self._stop_when_spent() else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop before the release that would cross the budget."""
        self._stop_when_spent()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the ledger, in plain numbers, and what was disclosed outside the guarantee."""
        state = self._previous if self._mechanism is None else self._mechanism.state_dict()
        checkpoint["privacy"] = None if state is None else {**state, "diagnostics": self._disclosed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the ledger: whoever trains these weights further goes on spending from it."""
        self._previous = checkpoint.get("privacy")
        if self._previous is None:
            raise ConfigError(
                "the checkpoint has no privacy ledger, so it is not known what its weights reveal: load one made by a "
                "private method, or public weights through the network's own arguments"
            )
        for what in self._previous.get("diagnostics", []):
            self.disclose(what)

    def teardown(self, stage: str) -> None:
        """Let go of the ledger's file."""
        if self._mechanism is not None:
            self._mechanism.ledger.close()

    @contextmanager
    def _secret_coins(self, step: int, rank: int) -> Iterator[None]:
        """Dropout and its like draw from the mechanism's key, not from the public ``seed_everything``.

        Their masks go by place in the batch. Known masks would let one record less shift those of all records after
        it, and the sum would move by more than the clip norm; unknown, independent masks are part of the mechanism.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.mechanism.randomness.torch_seed(f"dropout of rank {rank}", step))
            yield

    def _start_mechanism(self) -> None:
        if self.privacy is None:
            raise ConfigError(
                "no privacy section: set privacy.epsilon, privacy.delta and the rest, or use the SGD class"
            )
        if self._mechanism is None:
            mechanism = self.new_mechanism(self.privacy, self._previous)
            if self._previous is not None:
                self._find_ledger(mechanism.ledger)
                # Before anybody asks what was spent: the file may know of more releases than the checkpoint.
                self._attach(mechanism)
            self._mechanism, self._declared = mechanism, self.privacy
            return
        if self._declared != self.privacy:
            raise ConfigError("the privacy section changed between two fits of one module: make a new module")
        self._mechanism.renew_randomness()
        if self._previous is not None and self._previous["ledger"]["run"] != self._mechanism.ledger.run:
            raise ConfigError(
                "this module has spent from one ledger and the checkpoint from another: make a new module"
            )

    def _enter_dataset_ledger(self) -> None:
        """Write this run down beside the private data, with all that it may release; refuse it above their limit."""
        if not self.trainer.is_global_zero:
            return
        config, mechanism, most = self.mechanism.config, self.mechanism, self.trainer.max_steps
        file = DatasetLedger(self.datamodule.ledger_file())
        try:
            file.begin(
                mechanism.ledger.run,
                type(self).__name__,
                mechanism.ledger.path,
                mechanism.whole_plan(math.inf if most < 0 else most - self.trainer.global_step),
                config.delta,
                config.adjacency,
                config.dataset_epsilon,
            )
        except OSError as error:
            if config.dataset_epsilon is not None:
                raise ConfigError(
                    f"privacy.dataset_epsilon needs the dataset ledger {file.path}, which cannot be written ({error}): "
                    "set LIGHTNING_DP_LEDGER to a folder that can"
                ) from error
            rank_zero_warn(f"this run is in no dataset ledger: {file.path} cannot be written ({error})")
            return
        self._dataset_ledger = file

    def _attach(self, mechanism: Mechanism) -> None:
        """Open the ledger's file on rank 0, tell all ranks what it holds, and work out what may still be released."""
        folder = self.trainer.log_dir  # asks rank 0, so every rank has to ask
        if self.trainer.is_global_zero:
            mechanism.ledger.open(Path(folder or self.trainer.default_root_dir))
        mechanism.ledger.releases = self.trainer.strategy.broadcast(mechanism.ledger.releases)
        mechanism.renew_allowance()

    def _find_ledger(self, ledger: Ledger) -> None:
        """Follow a run that was moved as a whole: its ledger lies beside the folder of its checkpoints."""
        checkpoint = self.trainer.ckpt_path
        if ledger.path is None or ledger.path.is_file() or checkpoint is None:
            return
        moved = Path(checkpoint).parent.parent / ledger.path.name
        if moved.is_file():
            ledger.path = moved

    def _stop_when_spent(self) -> bool:
        if self.mechanism.releases_left >= 1:
            return False
        self.trainer.should_stop = True
        # Lightning ignores should_stop until these are met.
        self.trainer.fit_loop.min_epochs = None
        self.trainer.fit_loop.epoch_loop.min_steps = None
        return True


class GradientModule(DPModule, ABC):
    """DP-SGD and its relatives: the contribution is a gradient, the update an optimizer step.

    Args:
        net: classifier without BatchNorm, (n, channels, height, width) -> logits (n, classes).
        optimizer: parameters -> optimizer; sees only released gradients.
        scheduler: optimizer -> learning rate schedule, stepped once per logical step.
        physical_batch_size: records per forward pass and device; performance only.
        privacy: linked from the ``privacy`` section; None for evaluation only.
        gradient_memory: MiB that gradients of single records may take beyond an ordinary backward pass, where that
            is faster; performance only.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        physical_batch_size: int = 256,
        privacy: PrivacyConfig | None = None,
        gradient_memory: int = 64,
    ) -> None:
        super().__init__(net, optimizer, scheduler, physical_batch_size, privacy)
        if gradient_memory < 0:
            raise ConfigError(f"model.gradient_memory {gradient_memory} must be 0 or above")
        self.engine = OneBackward(self.record_loss, gradient_memory << 20)

    @abstractmethod
    def record_loss(self, parameters: Tensors, image: Tensor, label: Tensor) -> Tensor:
        """Loss of one record at ``parameters``, a scalar; sees no other private record."""

    @final
    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """Gradient of `record_loss` at the current parameters."""
        gradients: Tensors = grad(self.record_loss)(self.template(), image, label)
        return gradients

    @final
    def clipped_sum(self, records: tuple[Tensor, ...]) -> Tensors:
        """The same sum as `DPModule.clipped_sum`, in about the time of an ordinary backward pass."""
        return self.engine.clipped_sum(
            records,
            self.template(),
            max_norm=self.mechanism.config.max_norm,
            clipping=self.mechanism.config.clipping,
            chunk=self.physical_batch_size,
            prepare=self.prepare,
        )

    @final
    def template(self) -> Tensors:
        """The trained parameters, detached."""
        return {name: value.detach() for name, value in self.trainable().items()}

    @final
    def update(self, mean: Tensors) -> None:
        """Optimizer and schedule, one step; a noise-aware optimizer finds the noise in its parameter groups."""
        for group in self.trainer.optimizers[0].param_groups:
            group["noise_std"] = self.mechanism.noise_std_of_mean
        with torch.no_grad():
            self.step_optimizer(mean)


def _buffer_versions(net: nn.Module) -> list[tuple[int, int]]:
    """Changes when a buffer is written to, or replaced by another tensor."""
    return [(id(buffer), buffer._version) for buffer in net.buffers()]

"""Canaries: records of the auditor's own among the private ones, each in or out by the toss of a coin."""

from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp.data.datamodule import Batch, DPDataModule
from lightning_dp.data.loaders import record_loader
from lightning_dp.data.records import RecordDataset, Records
from lightning_dp.data.roles import Roles
from lightning_dp.errors import ConfigError
from lightning_dp.models.canary import canary_codes
from lightning_dp.privacy.randomness import Randomness
from lightning_dp.privacy.sampling import PoissonBatchSampler

CanaryKind = Literal["mislabelled", "random", "dirac"]


@final
class CanaryDataModule(DPDataModule):
    """`DPDataModule` with canaries at the end of the private role, for an audit of one run.

    All canaries have a place: the sample rate, the expected batch and ``privacy.num_examples`` (which counts all of
    them) do not depend on the coins. A canary whose coin fell to "out" is drawn like everybody and then left out by the
    sampler. Coins are independent and fair; a fixed number of heads would give the last one away.

    Canaries change the model a little: with them, test accuracy is that of an audited run.

    Args:
        canaries: how many.
        kind: "mislabelled": audit records with wrong labels, which leave the audit role. "random": noise images with
            random labels. "dirac": codes that `DiracCanaries` around the network turns into gradients of one
            coordinate each.
        settings: those of `DPDataModule`.

    Raises:
        ConfigError: too few audit records for the canaries, or ``kind`` does not go with the other settings.
    """

    def __init__(self, canaries: int = 1000, kind: CanaryKind = "mislabelled", **settings: Any) -> None:
        super().__init__(**settings)
        if canaries < 10:
            raise ConfigError(f"data.canaries {canaries} must be at least 10: raise it")
        if kind == "mislabelled" and self.split_settings.audit < canaries:
            raise ConfigError(
                f"data.canaries {canaries} mislabelled records are taken from the {self.split_settings.audit} of "
                "data.audit: raise data.audit, or choose data.kind random"
            )
        if kind == "dirac" and self.augment is not None:
            raise ConfigError("data.augment would change the codes of dirac canaries: leave it out")
        self.num_canaries = canaries
        self.kind: CanaryKind = kind
        self._inside: np.ndarray | None = None
        self._records: Records | None = None

    @property
    def inside(self) -> np.ndarray:
        """Which canaries take part, boolean (canaries,): the coins."""
        assert self._inside is not None, "setup() comes first"
        return self._inside

    @property
    def canaries(self) -> Records:
        """The canaries, as the private role serves its records."""
        assert self._records is not None, "setup() comes first"
        return self._records

    def setup(self, stage: str = "fit") -> None:
        """As `DPDataModule.setup`; and toss the coins, once and alike on all ranks."""
        if self._inside is None:
            seed = None if self.privacy is None else self.privacy.seed
            randomness = Randomness.from_seed(seed)
            if self.trainer is not None:
                randomness = self.trainer.strategy.broadcast(randomness)
            self._inside = randomness.numpy("canaries", 0).random(self.num_canaries) < 0.5
        super().setup(stage)

    def train_dataloader(self) -> DataLoader[Batch]:
        """As `DPDataModule.train_dataloader`, without the canaries that are out."""
        batches = super().train_dataloader().batch_sampler
        assert isinstance(batches, PoissonBatchSampler)
        dataset = self._datasets["private"]
        batches.absent = len(dataset) - self.num_canaries + np.flatnonzero(~self.inside)
        return record_loader(dataset, batches, self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """With the coins, so that a run that goes on keeps them."""
        return {**super().state_dict(), "canaries": [int(coin) for coin in self.inside]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the coins of the run that goes on.

        Raises:
            ConfigError: it was trained on another split, or with another number of canaries.
        """
        coins = np.array(state_dict.get("canaries", ()), dtype=bool)
        if len(coins) != self.num_canaries:
            raise ConfigError(
                f"the checkpoint was trained with {len(coins)} canaries, not {self.num_canaries}: set data.canaries"
            )
        self._inside = coins
        super().load_state_dict(state_dict)

    def _load(self) -> Roles:
        roles = super()._load()
        canaries = self._made()
        private = self._datasets["private"]
        # copied out: a memory map cannot grow
        served = private.gather()
        images = torch.cat([served.images, canaries.images.to(served.images.dtype)])
        self._records = canaries
        self._datasets["private"] = RecordDataset(Records(images, torch.cat([served.labels, canaries.labels])))
        return roles

    def _made(self) -> Records:
        """The canaries of this kind: a public choice, the same in every run of a split seed."""
        draw, count, classes = (
            np.random.RandomState(self.split_settings.split_seed),
            self.num_canaries,
            self.num_classes,
        )
        if self.kind == "mislabelled":
            audit = self._datasets["audit"]
            self._datasets["audit"] = RecordDataset(audit.records, audit.rows[count:].numpy())
            records = RecordDataset(audit.records, audit.rows[:count].numpy()).gather()
            wrong = torch.from_numpy(draw.randint(1, classes, count))
            return Records(records.images, (records.labels + wrong) % classes)
        labels = torch.from_numpy(draw.randint(1, classes, count))  # not 0, whose logit the codes move
        shape = tuple(self._datasets["private"][0][0].shape)
        if self.kind == "dirac":
            return Records(canary_codes(count, shape, self.encoder is None), labels)
        size = self.source.image_size
        noise = draw.randint(0, 256, (count, self.source.channels, size, size)).astype(np.uint8)
        records = Records(torch.from_numpy(noise), labels)
        return records if self.encoder is None else _served(self._encode(records, self.encoder))


def _served(records: Records) -> Records:
    images: Tensor = records.images.float()
    return Records(images, records.labels)

"""A public data set, offered as it is: for models that learn without privacy, and so may see no private record."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_dp.data.loaders import record_loader
from lightning_dp.data.pool import folder_of
from lightning_dp.data.records import RecordDataset, content_hashes
from lightning_dp.data.sources import Source
from lightning_dp.data.splits import digest
from lightning_dp.errors import ConfigError


@final
class PublicDataModule(LightningDataModule):
    """The training side of one source, declared public, in shuffled batches of uint8 images.

    There are no roles here and no split, hence no private role: whoever trains on this module has declared the whole
    training side of ``source`` public. The declaration is written into every checkpoint.

    Args:
        source: public data set; only its training side is opened.
        root: folder that holds all data sets; the environment variable LIGHTNING_DP_DATA, if set, replaces it.
        download: fetch what is missing.
        batch_size: records per step, over all devices.
        num_workers: loader processes; performance only.
        seed: of the order of the records; public.

    Raises:
        ConfigError: ``batch_size`` or ``num_workers`` is out of range.
    """

    def __init__(
        self,
        source: Source,
        root: Path = Path("data"),
        download: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigError("data.batch_size must be at least 1 and data.num_workers at least 0: correct them")
        self.source = source
        self.root = Path(os.environ.get("LIGHTNING_DP_DATA", root))
        self.download = download
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._dataset: RecordDataset | None = None

    def prepare_data(self) -> None:
        """Fetch and decode what is missing, in one process."""
        self.source.load(self.root, train=True, download=self.download)

    def setup(self, stage: str = "fit") -> None:
        """Read the training side."""
        if self._dataset is None:
            self._dataset = RecordDataset(self.source.load(self.root, train=True, download=False))

    def state_dict(self) -> dict[str, Any]:
        """What the weights of the checkpoint were trained on: the source's name, folder if it is one, and a digest."""
        hashes = None if self._dataset is None else digest(content_hashes(self._dataset.records.images))
        folder = folder_of(self.source)
        return {"source": self.source.name, "digest": hashes} | ({} if folder is None else {"folder": str(folder)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training on other data: the checkpoint would name only the last.

        Raises:
            ConfigError: the checkpoint was trained on another source, or on other records.
        """
        now = self.state_dict()
        other = any(state_dict[key] != now[key] for key in ("source", "digest"))
        if other and self.trainer is not None and self.trainer.state.fn == "fit":
            raise ConfigError(
                f"the checkpoint was trained on other public data ({state_dict['source']}, digest "
                f"{state_dict['digest']}; now {now['source']}, {now['digest']}), and its manifest would name only the "
                "last: make a new run, without ckpt_path"
            )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches: uint8 images (n, channels, height, width) and labels (n,)."""
        assert self._dataset is not None, "setup() comes first"
        trainer = self.trainer
        batches = ShuffledBatches(
            len(self._dataset),
            self.batch_size,
            self.seed,
            epoch=lambda: 0 if trainer is None else trainer.current_epoch,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )
        return record_loader(self._dataset, batches, self.num_workers)


@final
class ShuffledBatches(Sampler[list[int]]):
    """Every record at most once an epoch, in an order that depends on the seed and the epoch only; the rest is dropped.

    Args:
        num_records: records to draw from.
        batch_size: records per batch over all ranks.
        seed: public.
        epoch: number of the current epoch.
        rank: index of this process; it takes its share of every batch.
        world_size: number of processes.

    Raises:
        ConfigError: there are fewer records than one batch takes.
    """

    def __init__(
        self, num_records: int, batch_size: int, seed: int, epoch: Callable[[], int], rank: int, world_size: int
    ) -> None:
        if num_records < batch_size:
            raise ConfigError(f"data.batch_size {batch_size} exceeds the {num_records} public records: lower it")
        self.num_records = num_records
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch()]).permutation(self.num_records)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return self.num_records // self.batch_size

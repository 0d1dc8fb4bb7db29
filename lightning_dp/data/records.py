"""Records: what every source serves, what every role holds and what every loader indexes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Records:
    """Labelled images, or their features; row i of both tensors is record i.

    Args:
        images: uint8 of shape (n, channels, height, width), or features (n, ...) of any floating dtype; either
            possibly memory-mapped.
        labels: int64 of shape (n,).

    Raises:
        ValueError: the two lengths differ.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)


class RecordDataset(Dataset[tuple[Tensor, Tensor]]):
    """A role: some rows of ``records``, without copying them (they may be a memory map larger than memory).

    Features are served as float32, in whatever precision they are kept.

    Args:
        records: where the rows are.
        rows: which rows, in order, shape (n,); None for all.
    """

    def __init__(self, records: Records, rows: np.ndarray | None = None) -> None:
        self.records = records
        self.rows = torch.arange(len(records)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        self._whole: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        return _served(self.records.images[row]), self.records.labels[row]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch in one indexing call: images (n, ...) and labels (n,); n is 0 for an empty list.

        The full batch is copied out once and then handed out again and again: not to be written to.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(self) and torch.equal(chosen, torch.arange(len(self))):
            if self._whole is None:
                self._whole = _served(self.records.images[self.rows]), self.records.labels[self.rows]
            return self._whole
        rows = self.rows[chosen]
        return _served(self.records.images[rows]), self.records.labels[rows]

    def gather(self) -> Records:
        """The role's records as tensors of their own."""
        return Records(_served(self.records.images[self.rows]), self.records.labels[self.rows])


def _served(images: Tensor) -> Tensor:
    return images.float() if images.is_floating_point() else images


def as_is(batch: Any) -> Any:
    """Collate function of batches that `RecordDataset` already returns whole; a module-level name can be pickled."""
    return batch


def content_hashes(images: Tensor) -> np.ndarray:
    """One 16-byte BLAKE2b digest per record, of its pixels and shape; the label does not count.

    Args:
        images: uint8, shape (n, channels, height, width); read record by record, so a memory map stays on disk.

    Returns:
        Array of shape (n,), dtype S16.

    Example:
        >>> hashes = content_hashes(torch.tensor([0, 1, 0], dtype=torch.uint8).view(3, 1, 1, 1))
        >>> bool(hashes[0] == hashes[2]), bool(hashes[0] == hashes[1])
        (True, False)
    """
    array = images.numpy() if images.is_contiguous() else images.contiguous().numpy()
    start = hashlib.blake2b(repr(array.shape[1:]).encode(), digest_size=16)
    digests = []
    for record in array:
        digest = start.copy()
        digest.update(record)
        digests.append(digest.digest())
    return np.array(digests, dtype="S16")

"""Evaluation batches: each record once over all ranks, and the same number of batches on every rank."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_dp.data.records import RecordDataset, as_is


class EvalBatchSampler(Sampler[list[int]]):
    """Global batches in order, dealt out to the ranks.

    Guarantee: over all ranks every record occurs exactly once (PyTorch's DistributedSampler repeats some), and every
    rank yields the same number of batches, the last possibly empty (otherwise collectives would hang).

    Args:
        num_records: records to evaluate.
        batch_size: records per batch and rank, at most.
        rank: index of this process.
        world_size: number of processes.

    Example:
        >>> [list(EvalBatchSampler(5, 2, rank, 2)) for rank in range(2)]
        [[[0, 2], [4]], [[1, 3], []]]
    """

    def __init__(self, num_records: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_records = num_records
        self.step = batch_size * world_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_records, self.step):
            batch = range(start, min(start + self.step, self.num_records))
            yield list(batch[self.rank :: self.world_size])

    def __len__(self) -> int:
        return -(-self.num_records // self.step)


def record_loader(
    dataset: RecordDataset, batches: Sampler[list[int]], num_workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Loader whose batch is one indexing call, (images (n, ...), labels (n,)); it leaves PyTorch's global RNG alone."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=as_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # without one, every pass of a loader draws a worker seed from the global generator
        generator=torch.Generator(),
    )

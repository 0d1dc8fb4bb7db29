"""The only place where private records are chosen: Poisson batches, addressed by step."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class PoissonBatchSampler(Sampler[list[int]]):
    """One logical Poisson batch per step; every record takes part independently with probability ``sample_rate``.

    Guarantee: the global draw of a step depends on the step's own generator and on nothing else: not on the data's
    contents, on earlier draws, on the number of ranks, or on how far a loader has read ahead. Each rank yields its
    slice ``[rank::world_size]`` of the global draw, so a record is on at most one rank. Empty slices are yielded:
    a dropped empty batch would change both the mechanism and the number of steps that the ranks agree on.
    At ``sample_rate`` 1 every batch is the whole data set (full batch).

    Args:
        num_records: records in the private role.
        sample_rate: probability per record and step, in (0, 1].
        steps_per_epoch: batches per pass of the iterator; a public constant.
        generator: step -> fresh generator of that step's draw; the same on every rank.
        first_step: the step whose batch comes first when iteration starts (the trainer's step, so that a resumed
            run goes on where it stopped and read-ahead is never counted).
        rank: index of this process.
        world_size: number of processes.
        absent: places of ``num_records`` that are drawn like all others and then left out, ascending, as if the record
            had not been there; for audits.

    Example:
        >>> import numpy as np
        >>> sampler = PoissonBatchSampler(1000, 0.1, 3, lambda step: np.random.default_rng(step), lambda: 0)
        >>> [len(batch) for batch in sampler]
        [89, 92, 80]
    """

    def __init__(
        self,
        num_records: int,
        sample_rate: float,
        steps_per_epoch: int,
        generator: Callable[[int], np.random.Generator],
        first_step: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        absent: np.ndarray | None = None,
    ) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must lie in (0, 1], got {sample_rate}")
        self.num_records = num_records
        self.sample_rate = sample_rate
        self.steps_per_epoch = steps_per_epoch
        self.generator = generator
        self.first_step = first_step
        self.rank = rank
        self.world_size = world_size
        self.absent = np.empty(0, np.int64) if absent is None else absent
        # Called with every whole draw, absent places among them. They are told, and change nothing.
        self.observers: list[Callable[[np.ndarray], None]] = []

    def draw(self, step: int) -> np.ndarray:
        """Indices of the whole logical batch of ``step``, ascending, over all ranks."""
        return np.flatnonzero(self.generator(step).random(self.num_records) < self.sample_rate)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first_step()
        for step in range(first, first + self.steps_per_epoch):
            drawn = self.draw(step)
            for observer in self.observers:
                observer(drawn)
            there = np.setdiff1d(drawn, self.absent, assume_unique=True) if len(self.absent) else drawn
            yield there[self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return self.steps_per_epoch


def poisson_draws(
    num_records: int, sample_rate: float, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Many Poisson batches at once: in each, every record takes part independently with probability ``sample_rate``.

    The size is binomial and, given the size, all sets of records are equally likely: the same law as one coin a record,
    at the price of the records that are drawn.

    Args:
        num_records: records to draw from.
        sample_rate: probability per record and batch, in [0, 1].
        count: number of batches.
        generator: source of the draws.

    Returns:
        Indices of all batches, one after the other, and the place (count,) where each batch begins.

    Example:
        >>> indices, starts = poisson_draws(1000, 0.003, 3, np.random.default_rng(0))
        >>> np.split(indices, starts[1:])[1].tolist()
        [812, 649]
    """
    sizes = generator.binomial(num_records, sample_rate, count)
    draws = [generator.choice(num_records, size, replace=False, shuffle=False) for size in sizes]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return np.concatenate([np.empty(0, np.int64), *draws]), starts

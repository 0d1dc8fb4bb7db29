import math

import numpy as np
import pytest

from lightning_dp.privacy.randomness import Randomness
from lightning_dp.privacy.sampling import PoissonBatchSampler, poisson_draws

RECORDS, RATE, STEPS = 400, 0.1, 3000


def make(rank=0, world_size=1, first_step=0, rate=RATE, records=RECORDS, steps=STEPS, seed=0):
    randomness = Randomness.from_seed(seed)
    return PoissonBatchSampler(
        records, rate, steps, lambda step: randomness.numpy("sampling", step), lambda: first_step, rank, world_size
    )


@pytest.fixture(scope="module")
def inclusion():
    """(steps, records) of 0 and 1."""
    table = np.zeros((STEPS, RECORDS))
    for step, batch in enumerate(make()):
        table[step, batch] = 1
    return table


def test_inclusion_counts_are_binomial(inclusion):
    counts = inclusion.sum(0)
    mean, variance = STEPS * RATE, STEPS * RATE * (1 - RATE)
    assert abs(counts.mean() - mean) < 4 * np.sqrt(variance / RECORDS)
    # Shuffling would give variance 0; the variance of a sample variance is about 2 variance^2 / n.
    assert abs(counts.var(ddof=1) - variance) < 4 * variance * np.sqrt(2 / RECORDS)


def test_records_and_steps_are_independent(inclusion):
    centred = (inclusion - RATE) / np.sqrt(RATE * (1 - RATE))
    pairs = centred.T @ centred / STEPS
    off_diagonal = pairs[~np.eye(RECORDS, dtype=bool)]
    assert abs(off_diagonal.mean()) < 4 / np.sqrt(STEPS * RECORDS**2 / 2)
    assert abs((centred[1:] * centred[:-1]).mean()) < 4 / np.sqrt(STEPS * RECORDS)


def test_batch_sizes_vary_and_empty_batches_are_yielded():
    sizes = [len(batch) for batch in make(records=10, rate=0.05, steps=200)]
    assert len(sizes) == 200
    assert min(sizes) == 0
    assert len(set(sizes)) > 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_global_draw(world_size):
    whole = list(make(steps=20))
    slices = [list(make(rank, world_size, steps=20)) for rank in range(world_size)]
    for step in range(20):
        assert sorted(index for rank in slices for index in rank[step]) == whole[step]


def test_ranks_agree_on_the_number_of_steps_though_slices_are_empty():
    slices = [list(make(rank, 3, records=6, rate=0.2, steps=50)) for rank in range(3)]
    assert [len(batches) for batches in slices] == [50, 50, 50]
    assert any(not batch for batch in slices[2])


def test_a_batch_is_addressed_by_its_step():
    whole = list(make(steps=20))
    assert list(make(first_step=7, steps=13)) == whole[7:]


def test_rate_one_is_full_batch():
    assert list(make(rate=1.0, steps=2)) == [list(range(RECORDS))] * 2


def test_a_neighbour_leaves_the_other_records_draws_alone():
    """Adding a record must not move the coins of the others."""
    smaller, larger = make(steps=50), make(steps=50, records=RECORDS + 1)
    for one, other in zip(smaller, larger, strict=True):
        assert one == [index for index in other if index < RECORDS]


def test_sampling_ignores_the_global_generators():
    np.random.seed(0)
    first = next(iter(make(seed=None)))
    np.random.seed(0)
    assert next(iter(make(seed=None))) != first


@pytest.mark.parametrize("rate", [0.0, 1.1])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="sample_rate"):
        make(rate=rate)


def test_many_draws_at_once_are_poisson_and_hold_nobody_twice():
    indices, starts = poisson_draws(40, 0.3, 5000, np.random.default_rng(1))
    batches = np.split(indices, starts[1:])
    assert len(batches) == 5000
    assert all(len(set(batch)) == len(batch) for batch in batches)
    taken = np.zeros((5000, 40), dtype=bool)
    for row, batch in zip(taken, batches, strict=True):
        row[batch] = True
    assert abs(taken.mean(0) - 0.3).max() < 4.5 * math.sqrt(0.3 * 0.7 / 5000)
    pairs = np.corrcoef(taken.T.astype(float)) - np.eye(40)
    assert abs(pairs).max() < 5.5 / math.sqrt(5000)  # a record's coin says nothing of another's


@pytest.mark.parametrize(("records", "rate", "sizes"), [(5, 1.0, 5), (5, 0.0, 0), (0, 0.5, 0)])
def test_draws_of_all_and_of_none(records, rate, sizes):
    indices, starts = poisson_draws(records, rate, 3, np.random.default_rng(0))
    assert len(indices) == 3 * sizes
    assert starts.tolist() == [0, sizes, 2 * sizes]

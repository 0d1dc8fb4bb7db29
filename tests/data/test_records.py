import numpy as np
import pytest
import torch

from lightning_dp.data import EvalBatchSampler, RecordDataset, Records, content_hashes
from lightning_dp.data.loaders import record_loader
from tests.data.made import records


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        Records(torch.zeros(3, 1, 2, 2), torch.zeros(2))


def test_hashes_tell_contents_and_shapes_apart():
    images = torch.zeros(3, 1, 2, 8, dtype=torch.uint8)
    images[1, 0, 1, 7] = 1
    hashes = content_hashes(images)
    assert hashes.shape == (3,)
    assert hashes.itemsize == 16
    assert hashes[0] == hashes[2] != hashes[1]
    assert content_hashes(images.view(3, 1, 4, 4))[0] != hashes[0]


def test_hashes_do_not_depend_on_memory_layout():
    images = records(10).images
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert np.array_equal(content_hashes(images), content_hashes(turned))


def test_batch_is_the_rows_of_the_role():
    whole, rows = records(10), np.array([1, 4, 7, 8])
    role = RecordDataset(whole, rows)
    images, labels = role.__getitems__([3, 0])
    assert torch.equal(images, whole.images[[8, 1]])
    assert torch.equal(labels, whole.labels[[8, 1]])
    assert torch.equal(role[2][0], whole.images[7])
    assert torch.equal(role.gather().images, whole.images[rows])


def test_batch_is_one_indexing_call():
    class Counting:
        calls = 0

        def __init__(self, tensor):
            self.tensor = tensor

        def __len__(self):
            return len(self.tensor)

        def __getitem__(self, rows):
            self.calls += 1
            return self.tensor[rows]

    whole = records(10)
    images, labels = Counting(whole.images), Counting(whole.labels)
    batch = RecordDataset(Records(images, labels)).__getitems__([1, 2, 3, 5])
    assert (images.calls, labels.calls) == (1, 1)
    assert torch.equal(batch[0], whole.images[[1, 2, 3, 5]])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_empty_batch_travels_with_its_shape(num_workers):
    loader = record_loader(RecordDataset(records(4)), [[], [2]], num_workers)
    sizes = [(images.shape, images.dtype, labels.shape, labels.dtype) for images, labels in loader]
    assert sizes == [
        ((0, 1, 4, 4), torch.uint8, (0,), torch.int64),
        ((1, 1, 4, 4), torch.uint8, (1,), torch.int64),
    ]


@pytest.mark.parametrize("num_records", [1, 10, 11, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_record_is_evaluated_once_in_equally_many_batches(num_records, world_size):
    samplers = [EvalBatchSampler(num_records, 2, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert all(len(of_rank) == len(sampler) for of_rank, sampler in zip(batches, samplers, strict=True))
    assert all(len(batch) <= 2 for of_rank in batches for batch in of_rank)
    assert sorted(index for of_rank in batches for batch in of_rank for index in batch) == list(range(num_records))


def test_loader_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    assert len(list(record_loader(RecordDataset(records(9)), EvalBatchSampler(9, 4), 0))) == 3
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_full_batch_is_copied_once_and_is_the_role():
    records = Records(torch.arange(12.0).view(6, 2), torch.arange(6))
    dataset = RecordDataset(records, np.array([0, 2, 5]))
    first, second = dataset.__getitems__([0, 1, 2]), dataset.__getitems__([0, 1, 2])
    assert first[0].data_ptr() == second[0].data_ptr()
    assert first[0].tolist() == records.images[[0, 2, 5]].tolist()
    assert dataset.__getitems__([1, 0, 2])[1].tolist() == [2, 0, 5]
    assert len(dataset.__getitems__([])[1]) == 0

import builtins

import numpy as np
import pytest
import torch

from lightning_dp.data import USPS, Digits, DPDataModule, PublicDataModule
from lightning_dp.data.public import ShuffledBatches
from lightning_dp.errors import ConfigError


def batches(epoch=0, rank=0, world_size=1, seed=0):
    return list(ShuffledBatches(25, 8, seed, lambda: epoch, rank, world_size))


def test_an_epoch_takes_every_record_at_most_once_in_whole_batches():
    drawn = batches()
    assert [len(batch) for batch in drawn] == [8, 8, 8]
    assert len({row for batch in drawn for row in batch}) == 24


def test_the_order_depends_on_seed_and_epoch_only():
    assert batches() == batches()
    assert batches() != batches(epoch=1)
    assert batches() != batches(seed=1)


def test_the_ranks_share_a_batch():
    shares = [batches(rank=rank, world_size=3) for rank in range(3)]
    for whole, *parts in zip(batches(), *shares, strict=True):
        assert sorted(whole) == sorted(row for part in parts for row in part)


def test_only_the_training_side_is_opened(tmp_path, monkeypatch):
    load, opened = Digits.load, []
    monkeypatch.setattr(
        Digits, "load", lambda self, root, train, download: opened.append(train) or load(self, root, train, download)
    )
    data = PublicDataModule(Digits(), tmp_path, batch_size=32)
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8
    assert images.shape == (32, 1, 8, 8)
    assert labels.shape == (32,)
    assert set(opened) == {True}
    assert data.state_dict()["source"] == "Digits"
    assert len(data.state_dict()["digest"]) == 32


def test_it_has_no_roles_and_is_no_private_data():
    data = PublicDataModule(Digits())
    assert not isinstance(data, DPDataModule)
    assert not {"roles", "role", "privacy"} & set(dir(data))


def test_sizes_out_of_range_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch_size"):
        PublicDataModule(Digits(), batch_size=0)
    data = PublicDataModule(Digits(), tmp_path, batch_size=2000)
    data.setup()
    with pytest.raises(ConfigError, match="exceeds the 1437 public records"):
        data.train_dataloader()


def write_usps(root, num=3):
    h5py = pytest.importorskip("h5py")
    (root / "usps").mkdir()
    pixels = np.random.default_rng(0).random((num, 256), dtype=np.float32)
    with h5py.File(root / "usps" / "usps.h5", "w") as file:
        for side in ("train", "test"):
            file[f"{side}/data"] = pixels
            file[f"{side}/target"] = np.arange(num, dtype=np.int32)
    return pixels


def test_usps_as_published(tmp_path):
    pixels = write_usps(tmp_path)
    loaded = USPS().load(tmp_path, True, False)
    assert loaded.images.dtype == torch.uint8
    assert loaded.labels.tolist() == [0, 1, 2]
    assert np.array_equal(loaded.images.numpy(), np.rint(pixels * 255).reshape(3, 1, 16, 16).astype(np.uint8))


def test_usps_in_the_frame_of_mnist(tmp_path):
    write_usps(tmp_path)
    images = USPS(28).load(tmp_path, False, False).images
    assert images.shape == (3, 1, 28, 28)
    assert images[..., 4:24, 4:24].float().mean() > 100
    assert images.sum() == images[..., 4:24, 4:24].sum()


def test_usps_says_where_it_comes_from(tmp_path):
    pytest.importorskip("h5py")
    with pytest.raises(ConfigError, match=r"usps\.h5: put usps\.h5 of github\.com/\S+ there.*not downloaded"):
        USPS().load(tmp_path, True, True)


def test_usps_without_h5py_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"lightning_dp\[usps\]"):
        USPS().load(tmp_path, True, False)

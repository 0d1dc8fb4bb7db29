import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from lightning_dp.data import (
    CIFAR10,
    CIFAR100,
    EMNIST,
    KMNIST,
    MNIST,
    SUN397,
    SVHN,
    Caltech256,
    Digits,
    EuroSAT,
    FashionMNIST,
    Flowers102,
    ImageFolder,
    OxfordIIITPet,
)
from lightning_dp.errors import ConfigError
from tests.data import made

DOWNLOADED = [MNIST(), FashionMNIST(), KMNIST(), EMNIST(), CIFAR10(), CIFAR100(), SVHN()]
DECODED = [EuroSAT(), Flowers102(), OxfordIIITPet(), Caltech256(), SUN397()]


def check(source, records, num):
    assert records.images.dtype == torch.uint8
    assert records.images.shape == (num, source.channels, source.image_size, source.image_size)
    assert records.images.is_contiguous()
    assert records.labels.dtype == torch.int64
    assert 0 <= records.labels.min() <= records.labels.max() < source.num_classes
    assert len(source.mean) == len(source.std) == source.channels


def test_digits(tmp_path):
    train, test = (Digits().load(tmp_path, side, False) for side in (True, False))
    check(Digits(), train, 1437)
    check(Digits(), test, 360)
    assert train.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert train.labels.bincount().min() > 120


@pytest.mark.parametrize("source", [MNIST(), FashionMNIST(), KMNIST()])
def test_mnist_family(source, tmp_path):
    images = made.write_mnist(tmp_path / source.name, 12)
    records = source.load(tmp_path, True, False)
    check(source, records, 12)
    assert np.array_equal(records.images[:, 0].numpy(), images)
    check(source, source.load(tmp_path, False, False), 12)


@pytest.mark.parametrize(("split", "first_label"), [("balanced", 0), ("letters", 1)])
def test_emnist_stands_upright_and_counts_from_zero(tmp_path, split, first_label):
    prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
    images = made.write_mnist(tmp_path / "EMNIST", 12, prefixes, first_label)
    records = EMNIST(split).load(tmp_path, False, False)
    check(EMNIST(split), records, 12)
    assert records.labels.min() == 0
    assert np.array_equal(records.images[:, 0].numpy(), images.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("source", "folder", "train", "key", "meta", "meta_key"),
    [
        (
            CIFAR10(),
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)],
            "labels",
            "batches.meta",
            "label_names",
        ),
        (CIFAR100(), "cifar-100-python", ["train"], "fine_labels", "meta", "fine_label_names"),
    ],
)
def test_cifar(source, folder, train, key, meta, meta_key, tmp_path, monkeypatch):
    images = made.write_cifar(tmp_path / folder, [*train, "test_batch", "test"], key, meta, meta_key, 10)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    records = source.load(tmp_path, True, False)
    check(source, records, 10 * len(train))
    assert np.array_equal(records.images[:10].numpy(), images)
    check(source, source.load(tmp_path, False, False), 10)


def test_svhn(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": images, "y": np.arange(12)[:, None] % 10 + 1})
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5: True)
    records = SVHN().load(tmp_path, True, False)
    check(SVHN(), records, 12)
    assert np.array_equal(records.images.numpy(), images.transpose(3, 2, 0, 1))
    assert records.labels[9] == 0  # the files call the digit 0 class 10


def write_eurosat(root):
    made.write_folder(root / "eurosat" / "2750", 2, 10)
    return 16, 4


def write_flowers(root):
    folder = root / "flowers-102"
    for index in range(1, 8):
        made.write_image(folder / "jpg" / f"image_{index:05d}.jpg", index)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 8)})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [7, 1], "valid": [2, 3], "tstid": [4, 5, 6]})
    return 4, 3


def write_pets(root):
    annotations = root / "oxford-iiit-pet" / "annotations"
    annotations.mkdir(parents=True)
    for split, names in (("trainval", ["Cat_1", "dog_1", "dog_2"]), ("test", ["Cat_2", "dog_3"])):
        for number, name in enumerate(names):
            made.write_image(root / "oxford-iiit-pet" / "images" / f"{name}.jpg", number)
        (annotations / f"{split}.txt").write_text("".join(f"{name} {1 + (name[0] == 'd')} 1 1\n" for name in names))
    return 3, 2


def write_caltech(root):
    folder = root / "caltech256" / "256_ObjectCategories"
    for label, name in enumerate(["001.a", "002.b"]):
        for index in range(1, 6):
            made.write_image(folder / name / f"{label + 1:03d}_{index:04d}.jpg", index)
    made.write_image(folder / "001.a" / "stray" / "001_0009.jpg", 0)
    return 8, 2


def write_sun(root):
    (root / "SUN397").mkdir()
    (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/b/bar/indoor\n")
    for folder in ("a/abbey", "b/bar/indoor"):
        for index in range(5):
            made.write_image(root / "SUN397" / folder / f"sun_{index}.jpg", index)
    return 8, 2


@pytest.mark.parametrize(
    ("source", "write"),
    [
        (EuroSAT(image_size=6), write_eurosat),
        (Flowers102(image_size=6), write_flowers),
        (OxfordIIITPet(image_size=6), write_pets),
        (Caltech256(image_size=6), write_caltech),
        (SUN397(image_size=6), write_sun),
    ],
)
def test_decoded_sets_have_two_disjoint_sides(source, write, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    num_train, num_test = write(tmp_path)
    check(source, source.load(tmp_path, True, False), num_train)
    check(source, source.load(tmp_path, False, False), num_test)
    train, test = (source.files(tmp_path, side, False) for side in (True, False))
    assert not set(train) & set(test)
    assert {label for _, label in train + test} >= {0, 1}


def test_sun_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    write_sun(tmp_path)
    expected = SUN397().files(tmp_path, True, False)

    class Backwards(datasets.SUN397):
        def __init__(self, root, download):
            super().__init__(root, download=download)
            self._image_files.reverse()
            self._labels.reverse()

    monkeypatch.setattr(datasets, "SUN397", Backwards)
    assert SUN397().files(tmp_path, True, False) == expected


@pytest.mark.parametrize("source", DOWNLOADED + DECODED, ids=lambda source: source.name)
def test_missing_files_give_one_line_that_says_what_to_do(source, tmp_path):
    with pytest.raises(ConfigError) as caught:
        source.load(tmp_path, True, False)
    assert str(caught.value) == (
        f"{source.name} was not found below {tmp_path}/: add `--data.init_args.download true` to fetch it, "
        "or set `--data.init_args.root` (or LIGHTNING_DP_DATA) to the folder that holds it"
    )
    assert not any(tmp_path.iterdir())


def test_failed_download_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ConfigError, match=r"MNIST could not be fetched .no route.: check the connection"):
        MNIST().load(tmp_path, True, True)


def test_image_folder(tmp_path):
    made.write_folder(tmp_path / "mine" / "train", 3, 4)
    made.write_folder(tmp_path / "mine" / "test", 3, 2)
    source = ImageFolder("mine/train", 3, tmp_path / "mine" / "test", image_size=5)
    check(source, source.load(tmp_path, True, False), 12)
    assert source.load(tmp_path, True, False).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    check(source, source.load(tmp_path, False, False), 6)
    assert len(ImageFolder("mine/train", 3, image_size=5).load(tmp_path, False, False)) == 0


def test_image_folder_refuses_folders_that_do_not_fit(tmp_path):
    made.write_folder(tmp_path / "train", 3, 1)
    made.write_folder(tmp_path / "test", 2, 1)
    with pytest.raises(ConfigError, match=r"num_classes is 2, but .* has 3 class folders"):
        ImageFolder(tmp_path / "train", 2).load(tmp_path, True, False)
    with pytest.raises(ConfigError, match=r"ImageFolder.test .* other class folders"):
        ImageFolder(tmp_path / "train", 3, tmp_path / "test").load(tmp_path, False, False)
    with pytest.raises(ConfigError, match=r"ImageFolder.train: .*nowhere has no class folders"):
        ImageFolder("nowhere", 3).load(tmp_path, True, False)

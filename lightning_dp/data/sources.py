"""Where records come from: one class per data set that is read as an array.

Means and standard deviations are published constants, never computed from the data at hand: any public numbers serve.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lightning_dp.data.records import Records
from lightning_dp.data.splits import fixed_split
from lightning_dp.errors import ConfigError

T = TypeVar("T")


class Source(ABC):
    """A data set with a training and a test side. All its attributes are public."""

    name: str
    """Name for messages, cards and file names."""
    mean: tuple[float, ...]
    """Per channel, in units of [0, 1] intensity."""
    std: tuple[float, ...]
    """Per channel, in units of [0, 1] intensity."""
    num_classes: int
    image_size: int
    """Height and width in pixels."""
    channels: int

    @abstractmethod
    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side of the data set, in an order that is the same on every machine.

        Args:
            root: folder that holds all data sets.
            train: the training side, else the test side.
            download: fetch what is missing.

        Returns:
            uint8 images (n, channels, image_size, image_size) and labels below num_classes.

        Raises:
            ConfigError: the files are missing, or cannot be fetched.
        """


def open_dataset(name: str, root: Path, download: bool, make: Callable[[], T]) -> T:
    """Call a torchvision constructor; turn what it raises when files are missing into one line for people."""
    try:
        return make()
    except (RuntimeError, OSError) as error:
        if download:
            raise ConfigError(
                f"{name} could not be fetched ({error}): check the connection, or put its files below {root}/ yourself"
            ) from error
        raise ConfigError(
            f"{name} was not found below {root}/: add `--data.init_args.download true` to fetch it, "
            "or set `--data.init_args.root` (or LIGHTNING_DP_DATA) to the folder that holds it"
        ) from error


def _records(images: Tensor | np.ndarray, labels: Tensor | np.ndarray | list[int]) -> Records:
    """Records of contiguous uint8 images and int64 labels."""
    return Records(torch.as_tensor(images, dtype=torch.uint8).contiguous(), torch.as_tensor(labels, dtype=torch.int64))


class Digits(Source):
    """scikit-learn's 1,797 scanned digits, 8x8 (Alpaydin and Kaynak 1998); nothing to download.

    The 17 grey levels become 0, 16, ..., 255. No official split: a fixed public permutation gives 360 test records.
    """

    name = "Digits"
    mean = (0.305,)
    std = (0.376,)
    num_classes = 10
    image_size = 8
    channels = 1

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side: 1,437 or 360 records; ``root`` and ``download`` do not matter."""
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        rows = fixed_split(len(digits.target), 360, train)
        images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
        return _records(images[:, None], digits.target[rows])


class MNIST(Source):
    """MNIST, 60,000 + 10,000 handwritten digits, 28x28 (LeCun et al. 1998)."""

    name = "MNIST"
    mean = (0.1307,)
    std = (0.3081,)
    num_classes = 10
    image_size = 28
    channels = 1

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/MNIST/raw``."""
        data = open_dataset(
            self.name, root, download, lambda: datasets.MNIST(str(root), train=train, download=download)
        )
        return _records(data.data.unsqueeze(1), data.targets)


class FashionMNIST(Source):
    """Fashion-MNIST, 60,000 + 10,000 pieces of clothing, 28x28 (Xiao et al. 2017)."""

    name = "FashionMNIST"
    mean = (0.2860,)
    std = (0.3530,)
    num_classes = 10
    image_size = 28
    channels = 1

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/FashionMNIST/raw``."""
        data = open_dataset(
            self.name, root, download, lambda: datasets.FashionMNIST(str(root), train=train, download=download)
        )
        return _records(data.data.unsqueeze(1), data.targets)


class KMNIST(Source):
    """Kuzushiji-MNIST, 60,000 + 10,000 cursive Japanese characters, 28x28 (Clanuwat et al. 2018)."""

    name = "KMNIST"
    mean = (0.1918,)
    std = (0.3483,)
    num_classes = 10
    image_size = 28
    channels = 1

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/KMNIST/raw``."""
        data = open_dataset(
            self.name, root, download, lambda: datasets.KMNIST(str(root), train=train, download=download)
        )
        return _records(data.data.unsqueeze(1), data.targets)


class EMNIST(Source):
    """EMNIST, handwritten letters and digits, 28x28 (Cohen et al. 2017).

    The files store every image transposed; here they stand upright, as in MNIST.

    Args:
        split: which of the published collections: balanced (112,800 + 18,800 records, 47 classes), byclass (62),
            bymerge (47), letters (26), digits (10) or mnist (10).
    """

    mean = (0.1751,)
    std = (0.3332,)
    image_size = 28
    channels = 1

    def __init__(
        self, split: Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"] = "balanced"
    ) -> None:
        self.split = split
        self.name = f"EMNIST-{split}"
        classes = {"balanced": 47, "byclass": 62, "bymerge": 47, "letters": 26, "digits": 10, "mnist": 10}
        self.num_classes = classes[split]

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/EMNIST/raw``."""
        data = open_dataset(
            self.name, root, download, lambda: datasets.EMNIST(str(root), self.split, train=train, download=download)
        )
        # letters are numbered from 1 in the files
        labels = data.targets - 1 if self.split == "letters" else data.targets
        return _records(data.data.transpose(1, 2).unsqueeze(1), labels)


class CIFAR10(Source):
    """CIFAR-10, 50,000 + 10,000 colour images of 10 classes, 32x32 (Krizhevsky 2009)."""

    name = "CIFAR10"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    num_classes = 10
    image_size = 32
    channels = 3

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/cifar-10-batches-py``."""
        data = open_dataset(
            self.name, root, download, lambda: datasets.CIFAR10(str(root), train=train, download=download)
        )
        return _records(data.data.transpose(0, 3, 1, 2), data.targets)


class CIFAR100(Source):
    """CIFAR-100, 50,000 + 10,000 colour images of 100 classes, 32x32 (Krizhevsky 2009)."""

    name = "CIFAR100"
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    num_classes = 100
    image_size = 32
    channels = 3

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/cifar-100-python``."""
        data = open_dataset(
            self.name, root, download, lambda: datasets.CIFAR100(str(root), train=train, download=download)
        )
        return _records(data.data.transpose(0, 3, 1, 2), data.targets)


class SVHN(Source):
    """Street View House Numbers, cropped: 73,257 + 26,032 digits, 32x32 (Netzer et al. 2011)."""

    name = "SVHN"
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)
    num_classes = 10
    image_size = 32
    channels = 3

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/train_32x32.mat`` or ``root/test_32x32.mat``."""
        split = "train" if train else "test"
        data = open_dataset(self.name, root, download, lambda: datasets.SVHN(str(root), split, download=download))
        return _records(data.data, data.labels)


def check_compatible(role: str, other: Source, source: Source) -> None:
    """Refuse records that the source's network could not take.

    Args:
        role: of the other records: "public" or "synthetic".
        other: their source.
        source: source of the private records.

    Raises:
        ConfigError: shape or classes differ.
    """
    if (other.channels, other.image_size) != (source.channels, source.image_size):
        raise ConfigError(
            f"data.{role} {other.name} has {other.channels} x {other.image_size} x {other.image_size} images but "
            f"data.source {source.name} {source.channels} x {source.image_size} x {source.image_size}: "
            "choose data of the same shape"
        )
    if other.num_classes > source.num_classes:
        raise ConfigError(
            f"data.{role} {other.name} has {other.num_classes} classes but data.source {source.name} only "
            f"{source.num_classes}: choose data with the same classes"
        )

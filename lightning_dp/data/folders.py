"""Where records come from: data sets of image files, decoded once into a memory map below ``root/.cache``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets import folder

from lightning_dp.data.cache import decode_cached
from lightning_dp.data.records import Records
from lightning_dp.data.sources import Source, open_dataset
from lightning_dp.data.splits import fixed_split
from lightning_dp.errors import ConfigError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class DecodedSource(Source, ABC):
    """A data set of image files, served as squares of one size in RGB.

    Args:
        image_size: the short side is resized to this many pixels, then the centre square is kept.
        mean: per channel, in units of [0, 1] intensity; those of ImageNet, which most encoders were trained with.
        std: per channel, in units of [0, 1] intensity.
    """

    channels = 3

    def __init__(
        self,
        image_size: int = 224,
        mean: tuple[float, float, float] = _IMAGENET_MEAN,
        std: tuple[float, float, float] = _IMAGENET_STD,
    ) -> None:
        if image_size < 1:
            raise ConfigError(f"image_size is {image_size}: it must be at least 1 pixel")
        self.image_size = image_size
        self.mean = mean
        self.std = std

    @abstractmethod
    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """Image files and labels of one side, in an order that is the same on every machine."""

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side; the first time all its images are decoded, afterwards they are mapped from the cache."""
        samples = self.files(root, train, download)
        name = f"{self.name}-{'train' if train else 'test'}"
        images = decode_cached([path for path, _ in samples], self.image_size, root / ".cache", name)
        return Records(images, torch.tensor([label for _, label in samples], dtype=torch.int64))


def _fifth(samples: list[tuple[Path, int]], train: bool) -> list[tuple[Path, int]]:
    """One side of a fixed public split, 80 % training and 20 % test."""
    return [samples[row] for row in fixed_split(len(samples), len(samples) // 5, train)]


def _class_folders(path: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    """All images below the folders of the given classes, ordered by class and name."""
    samples = folder.make_dataset(str(path), classes, extensions=folder.IMG_EXTENSIONS)
    return [(Path(file), label) for file, label in samples]


class EuroSAT(DecodedSource):
    """EuroSAT, 27,000 satellite images of 10 kinds of land, 64x64 (Helber et al. 2019); fixed public 80/20 split."""

    name = "EuroSAT"
    num_classes = 10

    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """List one side of ``root/eurosat/2750``."""
        data = open_dataset(self.name, root, download, lambda: datasets.EuroSAT(str(root), download=download))
        return _fifth([(Path(file), label) for file, label in data.samples], train)


class Flowers102(DecodedSource):
    """Oxford Flowers, 102 classes (Nilsback and Zisserman 2008): training and validation, 2,040, against 6,149 test."""

    name = "Flowers102"
    num_classes = 102

    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """List one side of ``root/flowers-102``."""
        samples: list[tuple[Path, int]] = []
        for split in ("train", "val") if train else ("test",):
            data = open_dataset(self.name, root, download, _flowers(root, split, download))
            samples += zip(data._image_files, data._labels, strict=True)  # torchvision has no public list of files
        return samples


class OxfordIIITPet(DecodedSource):
    """Oxford-IIIT Pet, 37 breeds (Parkhi et al. 2012): 3,680 + 3,669 images."""

    name = "OxfordIIITPet"
    num_classes = 37

    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """List one side of ``root/oxford-iiit-pet``."""
        split = "trainval" if train else "test"
        data = open_dataset(
            self.name, root, download, lambda: datasets.OxfordIIITPet(str(root), split, download=download)
        )
        return list(zip(data._images, data._labels, strict=True))  # torchvision has no public list of files


class Caltech256(DecodedSource):
    """Caltech-256, 30,607 images of 256 classes and clutter (Griffin et al. 2007); fixed public 80/20 split."""

    name = "Caltech256"
    num_classes = 257

    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """List one side of ``root/caltech256/256_ObjectCategories``."""
        path = root / "caltech256" / "256_ObjectCategories"

        def find() -> list[tuple[Path, int]]:
            if download:
                datasets.Caltech256(str(root), download=True)
            classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
            # no deeper: the archive has a stray folder of images inside one class
            return [(file, label) for label, name in enumerate(classes) for file in sorted((path / name).glob("*.jpg"))]

        return _fifth(open_dataset(self.name, root, download, find), train)


class SUN397(DecodedSource):
    """SUN397, 108,754 scenes of 397 classes (Xiao et al. 2010); fixed public 80/20 split."""

    name = "SUN397"
    num_classes = 397

    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """List one side of ``root/SUN397``."""
        data = open_dataset(self.name, root, download, lambda: datasets.SUN397(str(root), download=download))
        # torchvision has no public list of files, and lists them in the file system's order
        return _fifth(sorted(zip(data._image_files, data._labels, strict=True)), train)


class ImageFolder(DecodedSource):
    """Your own images: one folder per class.

    Args:
        train: folder with the training side; relative paths start at ``data.root``.
        num_classes: number of class folders; a public number.
        test: folder with the test side, with the same class folders; None for no test role.
        image_size: the short side is resized to this many pixels, then the centre square is kept.
        mean: per channel, in units of [0, 1] intensity; public, not computed from these images.
        std: per channel, in units of [0, 1] intensity.
    """

    name = "ImageFolder"

    def __init__(
        self,
        train: Path,
        num_classes: int,
        test: Path | None = None,
        image_size: int = 224,
        mean: tuple[float, float, float] = _IMAGENET_MEAN,
        std: tuple[float, float, float] = _IMAGENET_STD,
    ) -> None:
        super().__init__(image_size, mean, std)
        self.train = train
        self.test = test
        self.num_classes = num_classes

    def files(self, root: Path, train: bool, download: bool) -> list[tuple[Path, int]]:
        """List one side; nothing is ever downloaded."""
        if not train and self.test is None:
            return []
        classes = self._classes(root, "train", self.train)
        if len(classes) != self.num_classes:
            raise ConfigError(
                f"ImageFolder.num_classes is {self.num_classes}, but {root / self.train} has {len(classes)} class "
                "folders: correct one of them"
            )
        if train or self.test is None:
            return _class_folders(root / self.train, classes)
        if self._classes(root, "test", self.test) != classes:
            raise ConfigError(
                f"ImageFolder.test {root / self.test} has other class folders than ImageFolder.train: "
                "make them the same"
            )
        return _class_folders(root / self.test, classes)

    @staticmethod
    def _classes(root: Path, setting: str, path: Path) -> dict[str, int]:
        """Class numbers by folder name, in alphabetical order."""
        try:
            return dict(folder.find_classes(root / path)[1])
        except OSError as error:
            raise ConfigError(
                f"ImageFolder.{setting}: {root / path} has no class folders: set it to a folder with one folder of "
                "images per class"
            ) from error


def _flowers(root: Path, split: str, download: bool) -> Callable[[], datasets.Flowers102]:
    """Constructor call of one of the three published parts."""
    return lambda: datasets.Flowers102(str(root), split, download=download)

"""Tiny data sets in the layouts of the real ones."""

import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_dp.data import Records, Source


class Made(Source):
    """Records handed in; the test side may repeat some of the training side."""

    name = "Made"
    mean = (0.5,)
    std = (0.25,)
    num_classes = 2
    image_size = 4
    channels = 1

    def __init__(self, train: Records, test: Records) -> None:
        self.sides = {True: train, False: test}

    def load(self, root: Path, train: bool, download: bool) -> Records:
        return self.sides[train]


class Generated(Source):
    """A stand-in for images of a generator: one noisy pattern per class, the same at every call.

    Args:
        size: height and width in pixels.
        channels: of the images.
        per_class: images of each of the ten classes.
    """

    name = "Generated"
    num_classes = 10

    def __init__(self, size: int = 8, channels: int = 1, per_class: int = 4) -> None:
        self.image_size = size
        self.channels = channels
        self.per_class = per_class
        self.mean = (0.5,) * channels
        self.std = (0.25,) * channels

    def load(self, root: Path, train: bool, download: bool) -> Records:
        draw = np.random.default_rng(7)
        shape = (self.channels, self.image_size, self.image_size)
        patterns = draw.integers(0, 200, (10, *shape))
        labels = np.arange(10 * self.per_class) % 10
        images = patterns[labels] + draw.integers(0, 50, (len(labels), *shape))
        return Records(torch.as_tensor(images, dtype=torch.uint8), torch.as_tensor(labels))


def records(num: int, seed: int = 0) -> Records:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Records(images, torch.arange(num) % 2)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(
    folder: Path, num: int, prefixes: tuple[str, str] = ("train", "t10k"), first_label: int = 0
) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (num, 28, 28), dtype=np.uint8)
    for prefix in prefixes:
        write_idx(folder / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(num) % 10 + first_label)
    return images


def write_cifar(folder: Path, names: list[str], key: str, meta: str, meta_key: str, num: int) -> np.ndarray:
    folder.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (num, 3072), dtype=np.uint8)
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": data, key: [i % 10 for i in range(num)]}))
    (folder / meta).write_bytes(pickle.dumps({meta_key: [str(i) for i in range(10)]}))
    return data.reshape(-1, 3, 32, 32)


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def write_folder(path: Path, classes: int, per_class: int) -> None:
    for label in range(classes):
        for index in range(per_class):
            write_image(path / f"class{label}" / f"{index}.png", 20 * label + index)

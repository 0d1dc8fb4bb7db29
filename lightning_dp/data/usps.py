"""USPS digits, read from the HDF5 file in which they are passed around."""

from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from lightning_dp.data.records import Records
from lightning_dp.data.sources import Source
from lightning_dp.errors import ConfigError

_FRAMED = 28
_DIGIT = 20  # MNIST's digits fill the middle 20 x 20 pixels


class USPS(Source):
    """USPS, 7,291 + 2,007 digits from envelopes, 16x16 (Hull 1994). Other people than MNIST's, the same ten classes.

    Args:
        image_size: 16 as published; 28: enlarged to 20x20 (bilinear) in the middle of a black 28x28 square, the frame
            of MNIST.
    """

    name = "USPS"
    mean = (0.2545,)
    std = (0.3846,)
    num_classes = 10
    channels = 1

    def __init__(self, image_size: Literal[16, 28] = 16) -> None:
        self.image_size = image_size
        if image_size == _FRAMED:
            self.mean, self.std = (0.1297,), (0.2811,)

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read one side from ``root/usps/usps.h5``; never downloaded."""
        path = root / "usps" / "usps.h5"
        try:
            import h5py
        except ImportError as error:
            raise ConfigError("USPS needs the extra `usps`: pip install 'lightning_dp[usps]'") from error
        try:
            with h5py.File(path, "r") as file:
                side = file["train" if train else "test"]
                images, labels = torch.from_numpy(side["data"][:]), torch.from_numpy(side["target"][:])
        except (OSError, KeyError) as error:
            raise ConfigError(
                f"USPS was not found at {path}: put usps.h5 of github.com/niuers/Learning-From-Data-A-Short-Course "
                "there, or set the root; it is not downloaded"
            ) from error
        return Records(self._pixels(images.float().view(-1, 1, 16, 16)), labels.long())

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Intensities (n, 1, 16, 16) in [0, 1] to uint8 of the size asked for."""
        if self.image_size == _FRAMED:
            margin = (_FRAMED - _DIGIT) // 2
            enlarged = F.interpolate(images, size=(_DIGIT, _DIGIT), mode="bilinear", align_corners=False)
            images = F.pad(enlarged, (margin,) * 4)
        return (images * 255).round().clamp(0, 255).to(torch.uint8)

"""Normalisation and augmentation: batched, on the images' own device, no Python loop over records.

Augmentations draw nothing: they are functions of coins handed in, one row per record, so that a result does not depend
on how records are chunked or spread over processes.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.errors import ConfigError


class Normalize:
    """Pixels to zero mean and unit variance under public constants.

    Args:
        mean: per channel, in units of [0, 1] intensity.
        std: per channel, in units of [0, 1] intensity.

    Example:
        >>> Normalize((0.5,), (0.5,))(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        tensor([[[[-1.,  1.]]]])
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (n, channels, height, width) to float32 of the same shape."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std


class Augmentation(ABC):
    """A random change of an image as a deterministic function of coins."""

    num_coins: int
    """Coins per record."""

    @abstractmethod
    def __call__(self, images: Tensor, coins: Tensor) -> Tensor:
        """Change every image by its own coins.

        Args:
            images: any dtype, shape (n, channels, height, width).
            coins: uniform in [0, 1), shape (n, num_coins).

        Returns:
            Images of the same shape and dtype.
        """


class CropFlip(Augmentation):
    """Random crop of the reflect-padded image, then a random horizontal flip.

    Args:
        padding: pixels added on every side before the crop; less than the image size.
        flip: mirror left and right with probability 1/2 (not for digits and text).
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise ConfigError(f"CropFlip.padding is {padding}: it must be at least 0 pixels")
        self.padding = padding
        self.flip = flip
        self.num_coins = 3

    def __call__(self, images: Tensor, coins: Tensor) -> Tensor:
        """Change every image by its own coins: vertical offset, horizontal offset, flip."""
        height, width = images.shape[-2:]
        if self.padding >= min(height, width):
            raise ConfigError(f"CropFlip.padding {self.padding} is too large for {height}x{width} images: lower it")
        rows = _reflect(_window(coins[:, 0], height, self.padding), height)
        columns = _reflect(_window(coins[:, 1], width, self.padding), width)
        if self.flip:
            columns = torch.where(coins[:, 2, None] < 0.5, columns.flip(1), columns)
        return _pick(images, rows, columns)


class Shift(Augmentation):
    """Random shift by whole pixels; the border pixel is repeated, so the fill is the same before and after normalising.

    Args:
        pixels: largest shift in each direction.
    """

    def __init__(self, pixels: int = 1) -> None:
        if pixels < 0:
            raise ConfigError(f"Shift.pixels is {pixels}: it must be at least 0")
        self.pixels = pixels
        self.num_coins = 2

    def __call__(self, images: Tensor, coins: Tensor) -> Tensor:
        """Change every image by its own coins: vertical and horizontal shift."""
        height, width = images.shape[-2:]
        rows = _window(coins[:, 0], height, self.pixels).clamp(0, height - 1)
        columns = _window(coins[:, 1], width, self.pixels).clamp(0, width - 1)
        return _pick(images, rows, columns)


class OneOfAffine(Augmentation):
    """Shift, zoom or rotation of the whole image, one of the three at random, with bilinear interpolation.

    The border pixel is repeated, so the fill is the same before and after normalising. Differentiable in the images.

    Args:
        pixels: largest shift in each direction.
        zoom: largest change of the size, as a share.
        degrees: largest rotation.
    """

    def __init__(self, pixels: float = 4.0, zoom: float = 0.2, degrees: float = 45.0) -> None:
        if not 0 <= zoom < 1 or pixels < 0 or degrees < 0:
            raise ConfigError("OneOfAffine.pixels and degrees must be at least 0, zoom in [0, 1): correct them")
        self.pixels = pixels
        self.zoom = zoom
        self.degrees = degrees
        self.num_coins = 3

    def __call__(self, images: Tensor, coins: Tensor) -> Tensor:
        """Change every image by its own coins: which of the three, and by how much (two for a shift)."""
        height, width = images.shape[-2:]
        if not len(images):
            return images
        # a coin just below 1 can round up to 1 in low precision
        kind, first, second = (coins[:, 0] * 3).long().clamp(max=2), coins[:, 1] * 2 - 1, coins[:, 2] * 2 - 1
        none = torch.zeros_like(first)
        scale = torch.where(kind == 1, 1 + self.zoom * first, 1.0)
        angle = torch.where(kind == 2, math.radians(self.degrees) * first, none)
        right = torch.where(kind == 0, 2 * self.pixels / width * first, none)
        down = torch.where(kind == 0, 2 * self.pixels / height * second, none)
        rows = torch.stack([scale * angle.cos(), -scale * angle.sin(), right], 1)
        columns = torch.stack([scale * angle.sin(), scale * angle.cos(), down], 1)
        grid = F.affine_grid(torch.stack([rows, columns], 1).float(), list(images.shape), align_corners=False)
        changed = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return (changed if images.is_floating_point() else changed.round()).to(images.dtype)


def _window(coin: Tensor, size: int, margin: int) -> Tensor:
    """Positions (n, size) of a window that starts anywhere in -margin..margin, by one coin per record (n,)."""
    # a coin just below 1 can round up to the next whole number in low precision
    start = (coin * (2 * margin + 1)).long().clamp(max=2 * margin) - margin
    return start[:, None] + torch.arange(size, device=coin.device)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions back into 0..size-1 at the border pixels, which are not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read pixel (rows[i, y], columns[i, x]) into place (y, x) of image i, all in one gather."""
    width = images.shape[-1]
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    picked = images.flatten(2).gather(2, source[:, None, :].expand(-1, images.shape[1], -1))
    return picked.view_as(images)

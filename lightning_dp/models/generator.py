"""A small generator of images, used as a prior: its architecture, at random weights, already prefers smooth images."""

from typing import final

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigError


@final
class ImageGenerator(nn.Module):
    """Transposed convolutions from a latent vector to an image (DCGAN; Radford, Metz, Chintala 2016, arXiv 1511.06434).

    Every pixel's channels are scaled to unit mean square between the layers, and the output is not bounded, as in
    Private Set Generation's prior.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, a multiple of 4.
        latent_dim: values of a latent vector.
        width: channels of the last hidden layer.

    Raises:
        ConfigError: the image size is not a multiple of 4.

    Example:
        >>> ImageGenerator()(torch.zeros(2, 10)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, latent_dim: int = 10, width: int = 64) -> None:
        super().__init__()
        if image_size % 4 or image_size < 4:
            raise ConfigError(f"ImageGenerator.image_size {image_size} must be a multiple of 4")
        self.latent_dim = latent_dim
        self.side = image_size // 4
        self.first = nn.Linear(latent_dim, 4 * width * self.side**2)
        self.hidden = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)]
        )
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Images (n, in_channels, image_size, image_size) of latent vectors (n, latent_dim)."""
        hidden = self.first(latents).view(len(latents), -1, self.side, self.side)
        hidden = _unit_pixels(hidden).relu()
        for layer in self.hidden:
            hidden = _unit_pixels(layer(hidden)).relu()
        images: Tensor = self.last(hidden)
        return images


def _unit_pixels(maps: Tensor) -> Tensor:
    return maps * torch.rsqrt(maps.square().mean(1, keepdim=True) + 1e-8)

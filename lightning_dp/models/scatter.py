"""Frozen wavelet scattering."""

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigError


class ScatterNet(nn.Module):
    """Two layers of fixed wavelets and moduli: features that cost no privacy, for a linear head on top.

    Scattering of Bruna and Mallat, as used by Oyallon and Mallat 2015 and, for private training, by Tramer and Boneh
    2021 (arXiv 2011.11660); computed by kymatio. It has no parameters, its ``forward`` passes no gradient back, and it
    leaves nothing in the state dict. It always computes in the precision of its filters (float32, or float64 after
    ``double()``), under autocast too. A 28x28 image takes about 0.8 ms on two idle CPU cores at batch 512, or 1.3 ms on
    one: give it large batches, or compute the features once and keep them.

    Args:
        image_size: height and width of the images, in pixels; a multiple of 2 ** scales.
        scales: number of octaves; the features are 2 ** scales times smaller than the image.
        angles: wavelet directions per octave.
        in_channels: channels of the images; each is transformed by itself.

    Raises:
        ConfigError: kymatio is not installed, or image_size does not fit scales.

    Example:
        >>> net = ScatterNet(28)
        >>> net.out_channels, net.out_size, len(net.state_dict())
        (81, 7, 0)
    """

    def __init__(self, image_size: int, scales: int = 2, angles: int = 8, in_channels: int = 1) -> None:
        super().__init__()
        if scales < 1 or angles < 1:
            raise ConfigError(f"ScatterNet scales={scales} and angles={angles} must be 1 or more")
        if image_size < 2**scales or image_size % 2**scales:
            raise ConfigError(
                f"ScatterNet image_size={image_size} is not a multiple of {2**scales} (2 ** scales): change one of them"
            )
        try:
            from ._kymatio import build_front_end
        except ImportError as error:
            raise ConfigError("ScatterNet needs kymatio: pip install 'lightning_dp[scatter]'") from error
        self._front_end = build_front_end(image_size, scales, angles)
        self._in_channels = in_channels
        self._paths = 1 + scales * angles + angles**2 * scales * (scales - 1) // 2
        self._out_size: int = image_size // 2**scales

    @property
    def out_channels(self) -> int:
        """Channels of the features: in_channels times the paths of order 0, 1 and 2."""
        return self._in_channels * self._paths

    @property
    def out_size(self) -> int:
        """Height and width of the features."""
        return self._out_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (n, out_channels, out_size, out_size) of images (n, in_channels, image_size, image_size)."""
        return self.differentiable(images)

    def differentiable(self, images: Tensor) -> Tensor:
        """The same features, through which gradients pass back to the images; for attacks."""
        filters = next(self._front_end.buffers())
        if images.shape[0] == 0:  # the Fourier transform refuses empty batches
            return images.new_zeros((0, self.out_channels, self.out_size, self.out_size), dtype=filters.dtype)
        features: Tensor = self._front_end(images.to(filters.dtype).contiguous())
        return features.flatten(1, 2)

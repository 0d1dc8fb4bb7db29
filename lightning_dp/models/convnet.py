"""The ConvNet of gradient-matching data condensation."""

from torch import Tensor, nn

from lightning_dp.errors import ConfigError


class ConvNet(nn.Module):
    """Blocks of convolution, instance norm, ReLU and average pooling, then one linear layer.

    The network of Private Set Generation (Chen, Kerkouche, Fritz 2022) and of the data condensation it builds on. The
    norm is GroupNorm with one group per channel and an affine map. As there, 28x28 images are padded to 32x32 by the
    first convolution: 317,706 parameters for 1x28x28 and 320,010 for 3x32x32, ten classes.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, in pixels.
        num_classes: number of logits.
        width: channels of every block.
        depth: number of blocks; each halves the image.

    Raises:
        ConfigError: the image cannot be halved ``depth`` times.

    Example:
        >>> sum(p.numel() for p in ConvNet().parameters())
        317706
    """

    def __init__(
        self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10, width: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        first_padding = 3 if image_size == 28 else 1
        padded = image_size + 2 * first_padding - 2
        # the last norm sees 2x2 positions or more: over a single one its output would be a constant
        if depth < 1 or padded % 2**depth or padded < 2**depth:
            raise ConfigError(
                f"ConvNet depth={depth} does not fit image_size={image_size}: "
                f"{padded} pixels cannot be halved {depth} times, use another depth"
            )
        blocks: list[nn.Module] = []
        for index in range(depth):
            channels, padding = (in_channels, first_padding) if index == 0 else (width, 1)
            blocks += [nn.Conv2d(channels, width, 3, padding=padding), nn.GroupNorm(width, width)]
            blocks += [nn.ReLU(), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width * (padded // 2**depth) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of normalised images (n, in_channels, image_size, image_size)."""
        logits: Tensor = self.head(self.blocks(images).flatten(1))
        return logits

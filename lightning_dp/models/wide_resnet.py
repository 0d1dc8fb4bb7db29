"""Wide residual networks with GroupNorm."""

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.engines.standardize import standardized_filters


class WSConv2d(nn.Conv2d):
    """A convolution whose filters are standardised before use.

    Weight standardisation is from Qiao et al. 2019 (arXiv 1903.10520); the scale is that of Brock et al. 2021 (arXiv
    2101.08692): each filter gets mean 0 and variance 1 / fan-in, so that the output has about the variance of the input
    and the residual sum does not grow with the width. It acts on the weights only, hence on each record by itself.

    Example:
        >>> WSConv2d(3, 4, kernel_size=3).standardized_weight().sum(dim=(1, 2, 3)).abs().max().item() < 1e-5
        True
    """

    def standardized_weight(self) -> Tensor:
        """Return the filters that are used, (out_channels, in_channels / groups, height, width)."""
        return standardized_filters(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (n, in_channels, H, W) with the standardised filters."""
        out: Tensor = self._conv_forward(input, self.standardized_weight(), self.bias)
        return out


class _Block(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions, the first with the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = conv(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = skip + self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out


class WideResNet(nn.Module):
    """WRN-depth-width with GroupNorm in the place of BatchNorm, as De et al. 2022 train it privately.

    The network is Zagoruyko and Komodakis 2016 (arXiv 1605.07146): pre-activation blocks in three stages of 16, 32 and
    64 times ``width`` channels. GroupNorm, 16 groups and weight standardisation follow De et al. (arXiv 2204.13650).
    WRN-16-4 has 2,748,890 parameters. Any image size from 4x4 works: the last stage is averaged over all positions.

    Args:
        depth: number of convolutions, 6 k + 4: k blocks in each stage, the first layer and three shortcuts.
        width: channels are this many times those of the plain residual network.
        num_classes: number of logits.
        in_channels: channels of the images.
        groups: groups of every GroupNorm, a divisor of 16.
        weight_standardization: standardise the filters of every convolution (``WSConv2d``).

    Raises:
        ConfigError: depth is not 4 + 6 k, width is below 1 or groups does not divide 16.

    Example:
        >>> import torch
        >>> WideResNet(depth=10, width=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        groups: int = 16,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ConfigError(f"WideResNet depth={depth} is not 4 + 6 k: use 10, 16, 22, 28, 34 or 40")
        if width < 1:
            raise ConfigError(f"WideResNet width={width} is below 1: use 1 or more")
        if groups < 1 or 16 % groups:
            raise ConfigError(f"WideResNet groups={groups} does not divide 16 channels: use 1, 2, 4, 8 or 16")
        conv = WSConv2d if weight_standardization else nn.Conv2d
        self.stem = conv(in_channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, out in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range((depth - 4) // 6):
                blocks.append(_Block(channels, out, 2 if stage > 0 and index == 0 else 1, groups, conv))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(groups, channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of normalised images (n, in_channels, H, W)."""
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits

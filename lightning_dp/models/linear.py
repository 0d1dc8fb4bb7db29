"""The linear classifier."""

from torch import Tensor, nn

from lightning_dp.errors import ConfigError


class LinearHead(nn.Module):
    """Multinomial logistic regression on flattened images or features, with an optional group norm before it.

    ``LinearHead(81, 7, 10, groups=27)`` on ``ScatterNet(28)`` is the group-normalised linear ScatterNet of Tramer and
    Boneh 2021 (arXiv 2011.11660). Flat images are ``LinearHead(1, 28, 10)``, feature vectors
    ``LinearHead(512, 1, 10)``. The norm has no parameters of its own.

    The weights start at zero: the problem is convex, so no symmetry has to be broken, and a random start would only
    add a distance that noisy steps have to walk back. It also makes the start the same for every seed.

    Args:
        in_channels: channels of the input.
        size: height and width of the input; 1 for feature vectors.
        num_classes: number of logits.
        groups: groups of the norm, a divisor of in_channels; none for no norm.

    Raises:
        ConfigError: groups does not divide in_channels, or a group holds a single number.

    Example:
        >>> import torch
        >>> LinearHead(81, 7, 10, groups=27)(torch.zeros(2, 81, 7, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, size: int, num_classes: int, groups: int | None = None) -> None:
        super().__init__()
        if groups is not None and (groups < 1 or in_channels % groups):
            raise ConfigError(f"LinearHead groups={groups} does not divide in_channels={in_channels}: use a divisor")
        if groups is not None and groups == in_channels * size**2:
            raise ConfigError(f"LinearHead groups={groups} leaves one number a group, always 0: use fewer groups")
        self.norm = nn.Identity() if groups is None else nn.GroupNorm(groups, in_channels, affine=False)
        self.linear = nn.Linear(in_channels * size**2, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of (n, in_channels, size, size), or (n, in_channels) when size is 1."""
        logits: Tensor = self.linear(self.norm(features).flatten(1))
        return logits

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
        max_length: features of a record that are longer are scaled to this length; none for any length.

    Raises:
        ConfigError: groups does not divide in_channels, a group holds a single number, or max_length is not above 0.

    Example:
        >>> import torch
        >>> LinearHead(81, 7, 10, groups=27)(torch.zeros(2, 81, 7, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        num_classes: int,
        groups: int | None = None,
        max_length: float | None = None,
    ) -> None:
        super().__init__()
        if groups is not None and (groups < 1 or in_channels % groups):
            raise ConfigError(f"LinearHead groups={groups} does not divide in_channels={in_channels}: use a divisor")
        if groups is not None and groups == in_channels * size**2:
            raise ConfigError(f"LinearHead groups={groups} leaves one number a group, always 0: use fewer groups")
        if max_length is not None and not max_length > 0:
            raise ConfigError(f"LinearHead max_length={max_length} must be above 0, or none: correct it")
        self.max_length = max_length
        self.norm = nn.Identity() if groups is None else nn.GroupNorm(groups, in_channels, affine=False)
        self.linear = nn.Linear(in_channels * size**2, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, inputs: Tensor) -> Tensor:
        """What the linear map sees of (n, in_channels, size, size), or (n, in_channels) when size is 1: (n, values)."""
        return feature_vectors(self.norm(inputs), self.max_length)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of (n, in_channels, size, size), or (n, in_channels) when size is 1."""
        logits: Tensor = self.linear(self.features(features))
        return logits


def feature_vectors(features: Tensor, max_length: float | None) -> Tensor:
    """Features (n, ...) as vectors (n, values) of a length of at most ``max_length``, each record by itself."""
    flat = features.flatten(1)
    if max_length is None:
        return flat
    lengths = flat.norm(dim=1, keepdim=True).clamp(min=max_length)
    scaled: Tensor = flat * (max_length / lengths)
    return scaled

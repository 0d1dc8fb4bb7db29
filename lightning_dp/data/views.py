"""Views of a record (De et al. 2022, arXiv 2204.13650) and mixtures of views (DP-Mix, Bao et al., arXiv 2311.01295).

Batched, on the images' own device, and functions of coins handed in, one row per record, like the augmentations. A
record's views depend on this record, on its coins and on public synthetic images, never on another private record.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.data.records import Records
from lightning_dp.data.transforms import Augmentation
from lightning_dp.errors import ConfigError

Pairing = Literal["pool", "real_x_synthetic"]


@dataclass(frozen=True)
class ViewPlan:
    """How many views a record has, and what is mixed with what. Fields as the settings of `DPMix`.

    Raises:
        ConfigError: the numbers contradict each other.
    """

    k_base: int = 16
    k_self: int = 18
    k_diff: int = 0
    alpha: float = 0.2
    include_unmixed_views: bool = True
    pairing: Pairing = "pool"
    mix_labels: bool = True

    def __post_init__(self) -> None:
        if self.k_base < 1 or self.k_self < 0 or self.k_diff < 0 or not self.alpha > 0:
            raise ConfigError("model.k_base must be at least 1, k_self and k_diff at least 0, alpha above 0")
        if self.k_self and self.pool == 1:
            raise ConfigError(
                f"model.k_self {self.k_self} would mix a single view with itself: raise model.k_base or model.k_diff"
            )
        if not self.k_self and not self.include_unmixed_views:
            raise ConfigError("model.include_unmixed_views false leaves no view with model.k_self 0: raise k_self")
        if self.pairing == "real_x_synthetic" and not (self.k_self and self.k_diff):
            raise ConfigError("model.pairing real_x_synthetic needs model.k_self and model.k_diff above 0: set pool")

    @property
    def pool(self) -> int:
        """Unmixed views of a record: its own, then synthetic ones."""
        return self.k_base + self.k_diff

    @property
    def views(self) -> int:
        """All views over which the loss of a record is averaged."""
        return self.k_self + (self.pool if self.include_unmixed_views else 0)

    def widths(self, augment_coins: int) -> list[int]:
        """Columns of a record's coins: augmentation, synthetic images, first and second partner, lambda."""
        return [self.pool * augment_coins, self.k_diff, self.k_self, self.k_self, self.k_self]


def make_views(
    images: Tensor,
    labels: Tensor,
    coins: Tensor,
    synthetic: Records | None,
    plan: ViewPlan,
    augment: Augmentation | None,
    normalize: Callable[[Tensor], Tensor],
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """All views of every record: a pure function, each record by itself with its own coins.

    Args:
        images: uint8, shape (n, channels, height, width); or features (n, ...).
        labels: classes, shape (n,).
        coins: shape (n, sum of ``plan.widths``), in [0, 1); the last ``k_self`` columns hold lambda, from
            Beta(alpha, alpha).
        synthetic: public images like ``images``, and their labels; None if ``k_diff`` is 0.
        plan: numbers and kinds of views.
        augment: applied to every view of the pool with coins of its own, also to the synthetic ones.
        normalize: of each image by itself.
        num_classes: length of the soft labels.

    Returns:
        Views (n, k, ...), in the order own, synthetic, mixed; and their soft labels (n, k, num_classes).
    """
    width = 0 if augment is None else augment.num_coins
    own, which, first, second, weight = torch.split(coins, plan.widths(width), dim=1)
    pool = normalize(images)[:, None].expand(-1, plan.k_base, *images.shape[1:])
    classes = labels[:, None].expand(-1, plan.k_base)
    if plan.k_diff:
        assert synthetic is not None
        rows = distinct(which, len(synthetic))
        drawn = normalize(synthetic.images[rows.flatten()]).view(*rows.shape, *images.shape[1:])
        pool, classes = torch.cat([pool, drawn], 1), torch.cat([classes, synthetic.labels[rows]], 1)
    if augment is not None:
        flat = augment(pool.flatten(0, 1), own.reshape(-1, width))
        pool = flat.view(len(images), plan.pool, *images.shape[1:])
    targets = F.one_hot(classes, num_classes).float()
    if not plan.k_self:
        return pool, targets
    mixed, mixed_targets = mixtures(pool, targets, first, second, weight, plan)
    if not plan.include_unmixed_views:
        return mixed, mixed_targets
    return torch.cat([pool, mixed], 1), torch.cat([targets, mixed_targets], 1)


def mixtures(
    pool: Tensor, targets: Tensor, first: Tensor, second: Tensor, weight: Tensor, plan: ViewPlan
) -> tuple[Tensor, Tensor]:
    """Mixup of Zhang et al. 2018 (arXiv 1710.09412) within each record's pool.

    Image and label of a mixture share partners and lambda. Partners are drawn with replacement and may be equal.

    Args:
        pool: unmixed views, shape (n, pool, ...).
        targets: their soft labels, shape (n, pool, classes).
        first: coin of the first partner, shape (n, k_self).
        second: coin of the second partner, shape (n, k_self).
        weight: lambda, of the first partner, shape (n, k_self).
        plan: pairing, and whether labels are mixed.

    Returns:
        Mixtures (n, k_self, ...) and their labels (n, k_self, classes).
    """
    if plan.pairing == "pool":
        one, other = index(first, plan.pool), index(second, plan.pool)
    else:
        one, other = index(first, plan.k_base), plan.k_base + index(second, plan.k_diff)
    row = torch.arange(len(pool), device=pool.device)[:, None]
    of_label = weight if plan.mix_labels else (weight >= 0.5).to(weight)
    # lerp, unlike a * w + b * (1 - w), gives back equal operands bit for bit: labels of one class stay one-hot
    images = torch.lerp(pool[row, other], pool[row, one], weight.reshape(*weight.shape, *[1] * (pool.dim() - 2)))
    return images, torch.lerp(targets[row, other], targets[row, one], of_label[..., None])


def index(coins: Tensor, size: int) -> Tensor:
    """Uniform integers below ``size`` from uniform coins of any shape."""
    # a float32 coin is at most 1 - 2^-24, so the rounded product stays below size
    return (coins * size).long()


def distinct(coins: Tensor, size: int) -> Tensor:
    """Different integers below ``size`` in every row, each set with the same probability; shape of ``coins`` (n, k).

    Floyd's sampling without replacement (Bentley and Floyd 1987), one column at a time for all records.
    """
    count = coins.shape[1]
    chosen = torch.empty_like(coins, dtype=torch.int64)
    for column in range(count):
        last = size - count + column
        row = index(coins[:, column], last + 1)
        taken = (chosen[:, :column] == row[:, None]).any(1)
        chosen[:, column] = torch.where(taken, last, row)
    return chosen


def check_views(plan: ViewPlan, augmented: bool, encoded: bool) -> None:
    """Refuse views that could only be equal.

    Raises:
        ConfigError: several views of a record without a random augmentation.
    """
    if plan.k_base == 1 or augmented:
        return
    if encoded:
        raise ConfigError(
            f"data.encoder fixes one feature per record, so model.k_base {plan.k_base} views of it are equal: set "
            "k_base 1, or make the frozen encoder a part of model.net, which augments and mixes pixels"
        )
    raise ConfigError(
        f"model.k_base {plan.k_base} views of a record are equal without data.augment: set it (Shift, CropFlip), or "
        "k_base 1"
    )

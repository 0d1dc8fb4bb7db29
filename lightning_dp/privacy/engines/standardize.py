"""Weight standardisation: the filters that networks use, and the gradients of records with respect to the raw ones.

A raw filter ``w`` of n values becomes ``w^ = (w - mean(w)) s`` with ``s = (|w - mean(w)|^2 + eps)^(-1/2)``. A gradient
``G`` of ``w^`` then pulls back to ``s (G - mean(G) - (w^ . G) w^)``, and its squared norm is
``s^2 (|G|^2 - (1 . G)^2 / n - (2 - |w^|^2) (w^ . G)^2)``; both filter by filter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_dp.privacy.engines.kernels import (
    TRAFFIC,
    ConvGradient,
    WeightGradient,
    gram_terms,
    never_too_small,
)

# keeps the gradient finite for a filter of equal values
_EPS = 1e-4


def standardized_filters(weight: Tensor) -> Tensor:
    """Filters of mean 0 and squared norm just below 1, shape (out, in / groups, ...) as that of ``weight``.

    The standardisation is that of Qiao et al. 2019 (arXiv 1903.10520), the scale that of Brock et al. 2021 (arXiv
    2101.08692). A network that calls this function on a parameter, and convolves with the result, has a fast rule.

    Example:
        >>> standardized_filters(torch.eye(2)[None]).round(decimals=3)
        tensor([[[ 0.5000, -0.5000],
                 [-0.5000,  0.5000]]])
    """
    if has_torch_function_unary(weight):
        result: Tensor = handle_torch_function(standardized_filters, (weight,), weight)
        return result
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred * _scale(centred)).view(weight.shape)


def _scale(centred: Tensor) -> Tensor:
    return (centred.square().sum(1, keepdim=True) + _EPS).rsqrt()


@final
@dataclass(frozen=True, eq=False)
class StandardizedConvGradient(WeightGradient):
    """Raw filters of a convolution with standardised ones.

    Args:
        conv: kernels of the convolution.
        filters: the standardised ones, (out, n).
        scale: what they were multiplied by, (out, 1).
    """

    conv: ConvGradient
    filters: Tensor
    scale: Tensor

    @classmethod
    def of(cls, conv: ConvGradient, weight: Tensor, dtype: torch.dtype) -> Self:
        """The kernels for raw filters ``weight``, in ``dtype``."""
        rows = weight.detach().flatten(1).to(dtype)
        centred = rows - rows.mean(1, keepdim=True)
        scale = _scale(centred)
        return cls(conv, centred * scale, scale)

    def rows(self, a: Tensor, g: Tensor) -> Iterator[Tensor]:
        """See `WeightGradient`."""
        for piece in self.conv.rows(a, g):
            yield self._pulled(piece)

    def squared_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """See `WeightGradient`."""
        g = g * self.scale.view(-1, *[1] * (g.ndim - 3))  # first, as it has fewer values than what follows
        along_mean, along_filter = self._projections(a, g)
        share = self.filters.square().sum(1)
        taken = along_mean.square().sum(1) / self.filters.shape[1] + along_filter.square() @ (2 - share)
        found = [gram_terms(*grams) for grams in self.conv.grams(a, g)]
        total, alone = (torch.cat(parts) for parts in zip(*found, strict=True))
        # sums over a patch whose terms have one sign, each rounded; over twice of what was measured at worst
        rounding = 4 + 0.5 * math.sqrt(self.filters.shape[1])
        return never_too_small(total - taken, rounding * alone)

    def total(self, a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        """See `WeightGradient`; the map to the raw filters is linear, so that the sum takes it once."""
        return self._pulled(self.conv.total(a, g, factors)[None])[0]

    def rows_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        return self.conv.rows_price(a, g) + 2 * TRAFFIC * self.filters.numel()

    def gram_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        positions = g[1] * g[3:].numel()
        return self.conv.gram_price(a, g) + positions * (self.filters.numel() + 2 * TRAFFIC * len(self.filters))

    def _pulled(self, rows: Tensor) -> Tensor:
        """Gradients of the standardised filters as gradients of the raw ones, (records, values); in place."""
        by_filter = rows.view(len(rows), *self.filters.shape)
        along = (by_filter * self.filters).sum(2, keepdim=True)
        by_filter -= by_filter.mean(2, keepdim=True)
        by_filter.addcmul_(along, self.filters, value=-1).mul_(self.scale)
        return rows

    def _projections(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Products of each record's gradient with ones and with the filters, (records, out) each; without it."""
        conv = self.conv
        settings: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        images = a.flatten(0, 1)
        # the sum of each patch is the convolution with ones; the convolution with the filters is the layer's output
        sums = F.unfold(images.sum(1, keepdim=True), conv.shape[2:], **settings).sum(1)
        # TF32 would round the output more than the Gram matrices
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            outputs = F.conv2d(images, self.filters.view(conv.shape), **settings)
        sums = sums.view(*g.shape[:2], 1, *g.shape[3:])
        return (g * sums).transpose(1, 2).flatten(2).sum(2), (g * outputs.view_as(g)).transpose(1, 2).flatten(2).sum(2)

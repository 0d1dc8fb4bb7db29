"""What single layers know about the gradients of single records, given their input ``a`` and output gradient ``g``.

Shapes: ``a`` (records, views, ...) and ``g`` (records, views, ...). A record's gradient is the sum over its views and
positions of outer products of ``g`` and ``a``; it is contracted over the views at once, so that many views cost no more
than their own forward and backward pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.privacy.clipping import record_norms

# Bytes of one vectorised piece of work. Pieces that stay in the cache are as fast as a plain weight gradient.
_PIECE = 4 << 20
# Price of one value that is written and read again, in multiply-adds; measured on a CPU.
TRAFFIC = 50
# A Gram norm is a difference of large numbers; this much of their size is added, so that rounding loosens no clip. Two
# units in the last place: up to 1.4 were measured, on two positions that cancel.
_ROUNDING = {torch.float32: 2.4e-7, torch.float64: 4.4e-16}


class WeightGradient(ABC):
    """How one use of a weight turns (a, g) into gradients of records.

    ``rows_price`` and ``gram_price`` are the extra work per record, in multiply-adds, of a norm by instantiated
    gradients (kept, and summed later) and of a norm by Gram matrices; both come on top of one plain weight gradient.
    """

    @abstractmethod
    def rows(self, a: Tensor, g: Tensor) -> Iterator[Tensor]:
        """Gradients of the records in order, pieces of shape (some records, values)."""

    @abstractmethod
    def squared_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """Squared gradient norms (records,) without the gradients."""

    @abstractmethod
    def total(self, a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        """Sum of the gradients of all records, each times its factor (records,); flat (values,)."""

    @abstractmethod
    def rows_price(self, a: torch.Size, g: torch.Size) -> float:
        """Extra multiply-adds per record of instantiated gradients; ``a`` and ``g`` are shapes."""

    @abstractmethod
    def gram_price(self, a: torch.Size, g: torch.Size) -> float:
        """Extra multiply-adds per record of the Gram norm, infinite where there is none."""


def pieces(records: int, bytes_per_record: int) -> Iterator[slice]:
    """Cut the record axis into slices of about `_PIECE` bytes."""
    step = max(1, min(records, _PIECE // max(1, bytes_per_record)))
    return (slice(start, min(records, start + step)) for start in range(0, records, step))


def gram_terms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the products of two stacks of Gram matrices (n, positions, positions), shape (n,).

    Also the size that it would have without any cancellation: the squared sum of the positions' own norms, (n,).
    """
    products = left * right
    alone = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1).square()
    return products.flatten(1).sum(1), alone


def never_too_small(total: Tensor, alone: Tensor) -> Tensor:
    """A squared norm whose terms may cancel almost wholly, while each of them is rounded.

    What is added grows with ``alone``, the size without any cancellation.
    """
    return total.clamp(min=0) + alone * _ROUNDING[total.dtype]


def gram_dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the products of two stacks of Gram matrices (n, positions, positions), shape (n,); not too small."""
    return never_too_small(*gram_terms(left, right))


def _weighted(a: Tensor, g: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the smaller one by the records' factors (records,)."""
    return (a * _beside(a, factors), g) if a.numel() < g.numel() else (a, g * _beside(g, factors))


def _beside(values: Tensor, factors: Tensor) -> Tensor:
    """Factors (records,) in a shape that multiplies ``values`` (records, ...)."""
    return factors.view(-1, *[1] * (values.ndim - 1))


@final
class LinearGradient(WeightGradient):
    """Weight (out, in) of a linear map of ``a`` (records, ..., in)."""

    def rows(self, a: Tensor, g: Tensor) -> Iterator[Tensor]:
        """See `WeightGradient`."""
        a, g = a.flatten(1, -2), g.flatten(1, -2)
        for part in pieces(len(a), a.shape[-1] * g.shape[-1] * a.element_size()):
            yield torch.bmm(g[part].transpose(1, 2), a[part]).flatten(1)

    def squared_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """See `WeightGradient`."""
        a, g = a.flatten(1, -2), g.flatten(1, -2)
        if a.shape[1] == 1:  # one outer product
            return (record_norms(a[:, 0]) * record_norms(g[:, 0])).square()
        positions = a.shape[1]
        found = [
            gram_dot(torch.bmm(a[part], a[part].transpose(1, 2)), torch.bmm(g[part], g[part].transpose(1, 2)))
            for part in pieces(len(a), 2 * positions**2 * a.element_size())
        ]
        return torch.cat(found)

    def total(self, a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        """See `WeightGradient`."""
        a, g = _weighted(a, g, factors)
        return (g.flatten(0, -2).T @ a.flatten(0, -2)).reshape(-1)

    def rows_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        return 2 * TRAFFIC * a[-1] * g[-1]

    def gram_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        positions = a[1:-1].numel()
        return positions**2 * (a[-1] + g[-1] + 2 * TRAFFIC) if positions > 1 else a[-1] + g[-1]


@final
@dataclass(frozen=True)
class EmbeddingGradient(WeightGradient):
    """Table (entries, width) that is looked up at ``a``, integers (records, ...).

    Args:
        entries: rows of the table.
        padding: entry that gets no gradient, if any.
    """

    entries: int
    padding: int | None

    def rows(self, a: Tensor, g: Tensor) -> Iterator[Tensor]:
        """See `WeightGradient`."""
        a, g = a.flatten(1), self._without_padding(a, g).flatten(1, -2)
        for part in pieces(len(a), self.entries * g.shape[-1] * g.element_size()):
            table = g.new_zeros(len(a[part]), self.entries, g.shape[-1])
            yield table.scatter_add_(1, a[part, :, None].expand_as(g[part]), g[part]).flatten(1)

    def squared_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """See `WeightGradient`."""
        a, g = a.flatten(1), self._without_padding(a, g).flatten(1, -2)
        same = (a[:, :, None] == a[:, None, :]).to(g.dtype)
        return gram_dot(torch.bmm(g, g.transpose(1, 2)), same)

    def total(self, a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        """See `WeightGradient`."""
        g = (self._without_padding(a, g) * _beside(g, factors)).flatten(0, -2)
        return g.new_zeros(self.entries, g.shape[-1]).index_add_(0, a.reshape(-1), g).reshape(-1)

    def rows_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        return 3 * TRAFFIC * self.entries * g[-1]

    def gram_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        return a[1:].numel() ** 2 * (g[-1] + 3 * TRAFFIC)

    def _without_padding(self, a: Tensor, g: Tensor) -> Tensor:
        return g if self.padding is None else g.masked_fill((a == self.padding)[..., None], 0.0)


@final
@dataclass(frozen=True)
class ConvGradient(WeightGradient):
    """Filters of a convolution over 1, 2 or 3 axes; ``a`` (records, views, channels, ...).

    Args:
        shape: (out channels, in channels / groups, ...).
        stride: one number per axis, as the next two.
        padding: zeros on both sides.
        dilation: distance of the taps.
        groups: as in ``torch.nn.Conv2d``.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def rows(self, a: Tensor, g: Tensor) -> Iterator[Tensor]:
        """One grouped weight gradient with the records folded into the channels, see `WeightGradient`."""
        for part in pieces(len(a), self.shape.numel() * a.element_size()):
            records = len(a[part])
            folded = self._weight_gradient(self._fold(a[part]), self._fold(g[part]), records)
            yield folded.reshape(records, -1)

    def squared_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """See `WeightGradient`."""
        return torch.cat([gram_dot(*grams) for grams in self.grams(a, g)])

    def grams(self, a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Gram matrices of the patches and of ``g``, (some records, positions, positions) each; two axes, no groups."""
        positions = g.shape[1] * g.shape[3:].numel()
        size = 4 * positions**2 if self._shifts() else 2 * positions * (positions + self.shape[1:].numel())
        for part in pieces(len(a), size * a.element_size()):
            outputs = g[part].transpose(1, 2).flatten(2)
            yield self._patch_gram(a[part]), torch.bmm(outputs.transpose(1, 2), outputs)

    def total(self, a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        """See `WeightGradient`."""
        a, g = _weighted(a, g, factors)
        return self._weight_gradient(a.flatten(0, 1), g.flatten(0, 1), 1).reshape(-1)

    def rows_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        return 2 * TRAFFIC * self.shape.numel()

    def gram_price(self, a: torch.Size, g: torch.Size) -> float:
        """See `WeightGradient`."""
        if self.groups > 1 or len(self.shape) != 4:
            return float("inf")
        positions, patch = g[1] * math.prod(g[3:]), math.prod(self.shape[1:])
        if self._shifts():
            return float(positions**2 * (self.shape[0] + self.shape[1] + TRAFFIC * (2 + sum(self.shape[2:]))))
        return float(positions**2 * (self.shape[0] + patch + 2 * TRAFFIC) + positions * patch * 2 * TRAFFIC)

    def _fold(self, images: Tensor) -> Tensor:
        """(records, views, channels, ...) -> (views, records * channels, ...)."""
        return images.transpose(0, 1).flatten(1, 2)

    def _weight_gradient(self, a: Tensor, g: Tensor, copies: int) -> Tensor:
        dummy = a.new_empty(copies * self.shape[0], *self.shape[1:])  # only its shape is read
        found: Tensor = torch.ops.aten.convolution_backward.default(
            g, a, dummy, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride),
            copies * self.groups, (False, True, False),
        )[1]  # fmt: skip
        return found

    def _shifts(self) -> bool:
        """Whether the Gram of the patches is a sum of shifted Grams of the pixels."""
        return set(self.stride) == {1} and set(self.dilation) == {1}

    def _patch_gram(self, a: Tensor) -> Tensor:
        """Gram of the patches of each record, (n, positions, positions) with position = (view, row, column)."""
        n, views, _, height, width = a.shape
        if not self._shifts():
            patches = F.unfold(a.flatten(0, 1), self.shape[2:], self.dilation, self.padding, self.stride)
            patches = patches.view(n, views, *patches.shape[1:]).transpose(1, 2).flatten(2)
            return torch.bmm(patches.transpose(1, 2), patches)
        pixels = a.transpose(1, 2).flatten(2)
        gram = torch.bmm(pixels.transpose(1, 2), pixels).view(n * views, height, width, views, height, width)
        (rows, columns), (down, right) = self.shape[2:], self.padding
        gram = _shift_sum(F.pad(gram, (0, 0, down, down, 0, 0, 0, 0, down, down)), 1, 4, rows)
        gram = _shift_sum(F.pad(gram, (right, right, 0, 0, 0, 0, right, right)), 2, 5, columns)
        side = gram.shape[1] * gram.shape[2] * views
        return gram.reshape(n, side, side)


def _shift_sum(gram: Tensor, first: int, second: int, taps: int) -> Tensor:
    """Sum over the taps of a filter axis, which move both indices of the Gram together."""
    size = gram.shape[first] - taps + 1
    shifted = [gram.narrow(first, tap, size).narrow(second, tap, size) for tap in range(taps)]
    total = shifted[0].clone() if taps > 1 else shifted[0]
    for part in shifted[1:]:
        total += part
    return total

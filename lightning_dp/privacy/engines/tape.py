"""What one chunk's backward pass leaves behind: norms, and just enough to form the clipped sum afterwards."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_dp.privacy.clipping import Clipping, Tensors, clip_factors, record_norms
from lightning_dp.privacy.engines.kernels import WeightGradient


@final
@dataclass(eq=False)
class Source:
    """A parameter, or a tensor that was computed from parameters alone.

    Args:
        tensor: its value, in the autograd graph of the parameters.
        names: the parameters it depends on.
        is_parameter: whether it is a parameter itself.
        raw: the parameter whose standardised filters it is, if it is that.
    """

    tensor: Tensor
    names: tuple[str, ...]
    is_parameter: bool
    raw: "Source | None" = None


@final
@dataclass(eq=False)
class Use:
    """One place where a weight meets the records.

    Args:
        source: the weight.
        gradient: its kernels.
        a: shape of the layer's input, the record axis first.
        g: shape of the layer's output.
        instantiate: whether gradients of records are formed and kept, rather than (a, g); set by `Tape.plan`.
    """

    source: Source
    gradient: WeightGradient
    a: torch.Size
    g: torch.Size
    instantiate: bool = True


@final
@dataclass(eq=False)
class Tape:
    """Collects the backward pass of one chunk.

    Args:
        parameters: leaves of the autograd graph, by name.
        dtype: in which norms and sums are formed.
    """

    parameters: Tensors
    dtype: torch.dtype
    uses: list[Use] = field(default_factory=list)
    leaves: list[tuple[Source, Tensor]] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)
    _squares: list[Tensor] = field(default_factory=list)
    _rows: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    _products: list[tuple[str, WeightGradient, Tensor, Tensor]] = field(default_factory=list)
    _several: Tensors = field(default_factory=dict)

    def count(self, source: Source) -> None:
        """Announce, in the forward pass, one use of a source."""
        self._counts.update(source.names)

    def plan(self, chunk: int, memory_budget: int) -> None:
        """Choose the path of every use, between the two passes; a function of the shapes of one record only.

        Instantiated gradients are kept where they save most work per byte, as far as the budget reaches. Counted, not
        timed: the choice changes the rounding, and a seeded run has to repeat exactly.

        Args:
            chunk: most records of a chunk.
            memory_budget: bytes that kept gradients may take beyond what they free.
        """
        ranked = []
        for use in self.uses:
            if not self._is_alone(use.source):
                continue  # gradients of several uses have to be added before their norm is taken
            saved = use.gradient.gram_price(use.a, use.g) - use.gradient.rows_price(use.a, use.g)
            extra = max(1, use.source.tensor.numel() - use.g[1:].numel()) * self.dtype.itemsize * chunk
            ranked.append((saved / extra, saved, extra, use))
        for _, saved, extra, use in sorted(ranked, key=lambda item: -item[0]):
            use.instantiate = saved > 0 and (extra <= memory_budget or saved == float("inf"))
            if use.instantiate:
                memory_budget -= extra

    def add_product(self, use: Use, a: Tensor, g: Tensor) -> None:
        """Take one weight's input and output gradient, in the backward pass."""
        kept = a.detach()  # the graph can go now
        a = kept.to(self.dtype) if kept.is_floating_point() else kept
        if use.instantiate:
            self._add_pieces(use.source, use.gradient.rows(a, g.to(self.dtype)))
            return
        self._squares.append(use.gradient.squared_norms(a, g.to(self.dtype)))
        self._products.append((use.source.names[0], use.gradient, kept, g))

    def add_rows(self, source: Source, rows: Tensor) -> None:
        """Take the gradients of the records by themselves, shape (records, values)."""
        self._add_pieces(source, iter([rows.to(self.dtype)]))

    def add_clipped_sum(self, totals: Tensors, max_norm: float, clipping: Clipping) -> None:
        """Add the sum of the clipped gradients to ``totals``; once, after the backward pass."""
        for name, rows in self._several.items():
            self._keep(name, iter([rows]))
        if not self._squares:
            return
        factors = clip_factors(torch.stack(self._squares).sum(0).sqrt(), max_norm, clipping)
        # 0 * inf is NaN: a refused record has to be masked, not multiplied.
        refused = factors == 0 if bool((factors == 0).any()) else None
        while self._rows:
            name, pieces = self._rows.pop()
            start = 0
            for piece in pieces:
                part = slice(start, start + len(piece))
                totals[name] += (factors[part] @ _masked(piece, refused, part)).view_as(totals[name])
                start = part.stop
        while self._products:
            name, gradient, a, g = self._products.pop()
            g = _masked(g.to(self.dtype), refused)
            a = _masked(a.to(self.dtype), refused) if a.is_floating_point() else a
            totals[name] += gradient.total(a, g, factors).view_as(totals[name])

    @property
    def kept_bytes(self) -> int:
        """Bytes of the inputs and outputs of all uses, which are kept between the two passes."""
        return sum(use.a.numel() + use.g.numel() for use in self.uses) * self.dtype.itemsize

    def _is_alone(self, source: Source) -> bool:
        return source.is_parameter and self._counts[source.names[0]] == 1

    def _add_pieces(self, source: Source, pieces: Iterator[Tensor]) -> None:
        if self._is_alone(source):
            self._keep(source.names[0], pieces)
            return
        rows = torch.cat(list(pieces))
        for name, pulled in self._pull(source, rows).items():
            if self._counts[name] == 1:
                self._keep(name, iter([pulled]))
            else:
                self._several[name] = self._several[name] + pulled if name in self._several else pulled

    def _keep(self, name: str, pieces: Iterator[Tensor]) -> None:
        kept, norms = [], []
        for piece in pieces:
            kept.append(piece)
            norms.append(record_norms(piece))
        self._squares.append(torch.cat(norms).square())
        self._rows.append((name, kept))

    def _pull(self, source: Source, rows: Tensor) -> Tensors:
        """Gradients with respect to a source as gradients with respect to its parameters, (records, values) each."""
        if source.is_parameter:
            return {source.names[0]: rows}
        cotangents = rows.view(len(rows), *source.tensor.shape).to(source.tensor.dtype)
        pulled = torch.autograd.grad(
            source.tensor,
            [self.parameters[name] for name in source.names],
            cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return {name: part.flatten(1).to(self.dtype) for name, part in zip(source.names, pulled, strict=True)}


def _masked(values: Tensor, refused: Tensor | None, part: slice | None = None) -> Tensor:
    """``values`` (records, ...) with the refused records set to zero."""
    if refused is None:
        return values
    mask = refused if part is None else refused[part]
    return values.masked_fill(mask.view(-1, *[1] * (values.ndim - 1)), 0.0)

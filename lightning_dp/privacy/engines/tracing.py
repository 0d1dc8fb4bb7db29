"""Finds where parameters meet records, and takes the layer's backward pass over there.

The loss runs under ``vmap`` on one record, so no record sees another. A mode watches every call of a torch function:
a parameter that meets a record in a call with a rule (a convolution, a linear map, ...) is handled by the rule, on all
records at once; in any other call it is replaced by one copy per record, whose gradient is the record's by itself.
"""

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.privacy.clipping import Tensors
from lightning_dp.privacy.engines.tape import Source, Tape

# rule(tracer, *args, **kwargs) -> result, or NotImplemented to leave the call to the general rule
Rule = Callable[..., Any]


class NoRecordsError(Exception):
    """A rule was asked about a call in which no record takes part."""


class UncoveredError(Exception):
    """The model does something with a parameter that the engine cannot follow."""


@final
class _Leave(torch.autograd.Function):
    """Leaves ``vmap``: calls a function once, on tensors with the record axis first."""

    @staticmethod
    def forward(run: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """Only reached when no tensor has a record axis."""
        raise NoRecordsError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save: `forward` never returns."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, int]:
        """Call ``run`` at the level of the batch; autograd records what it does."""
        moved = []
        for index, (tensor, dim) in enumerate(zip(tensors, in_dims[1:], strict=True)):
            if (dim is None) == (index == 0):
                raise NoRecordsError if index == 0 else UncoveredError
            moved.append(tensor if tensor is None or dim is None else tensor.movedim(dim, 0))
        return run(*moved), 0


@final
class _LeaveAll(torch.autograd.Function):
    """As `_Leave`, for functions of records alone."""

    @staticmethod
    def forward(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Only reached when no tensor has a record axis."""
        raise NoRecordsError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save: `forward` never returns."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, int]:
        """Call ``run`` at the level of the batch."""
        if None in in_dims[1:]:
            raise NoRecordsError
        return run(*(tensor.movedim(dim, 0) for tensor, dim in zip(tensors, in_dims[1:], strict=True))), 0


def over_records(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call ``run`` on records only, all at once: (records, ...) each.

    Raises:
        NoRecordsError: a tensor has no record axis.
    """
    result: Tensor = _LeaveAll.apply(run, *tensors)
    return result


@final
class Tracer(TorchFunctionMode):
    """Watches the forward pass of one chunk.

    Args:
        tape: what the backward pass is collected on.
        rules: torch function -> rule.
    """

    def __init__(self, tape: Tape, rules: dict[Callable[..., Any], Rule]) -> None:
        super().__init__()
        self.tape = tape
        self._rules = rules
        self._sources = {id(leaf): Source(leaf, (name,), True) for name, leaf in tape.parameters.items()}
        # Input of every rule's function, so that each has a backward pass even where its records need no gradient.
        self.gate = torch.zeros((), requires_grad=True)
        self._row: Tensor | None = None

    def loss_of_one(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function of (row, *record) to be mapped over the records; ``row`` is any tensor with the record axis."""

        def watched(row: Tensor, *record: Tensor) -> Tensor:
            self._row = row
            with self:
                return loss(dict(self.tape.parameters), *record)

        return watched

    def source(self, tensor: Any) -> Source | None:
        """What is known of a tensor; None for records, constants and frozen parameters."""
        return self._sources.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def derive_filters(self, run: Callable[..., Tensor], raw: Source) -> Tensor:
        """Remember ``run`` of a parameter as its standardised filters."""
        result = run(raw.tensor)
        self._sources[id(result)] = Source(result, raw.names, False, raw)
        return result

    def at_batch_level(self, run: Callable[..., Tensor], records: Tensor, *weights: Tensor | None) -> Tensor:
        """Call ``run(records, *weights)`` once for all records, shape (records, ...); weights have no record axis.

        Raises:
            NoRecordsError: ``records`` has no record axis.
            UncoveredError: a weight has one, for it was drawn at random.
        """
        result: Tensor = _Leave.apply(run, records, *weights)
        return result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (rule := self._rules.get(func)) is not None:
            try:
                result = rule(self, *args, **kwargs)
            except NoRecordsError:
                result = NotImplemented
            if result is not NotImplemented:
                return result
        tensors = list(_tensors((args, kwargs)))
        sources = [source for tensor in tensors if (source := self.source(tensor)) is not None]
        if not sources:
            return func(*args, **kwargs)
        if len(sources) == len(tensors):
            return self._derived(func(*args, **kwargs), sources)
        return func(*self._with_copies(args), **self._with_copies(kwargs))

    def _derived(self, result: Any, sources: list[Source]) -> Any:
        """Remember results that were computed from parameters alone."""
        names = tuple(sorted({name for source in sources for name in source.names}))
        for tensor in _tensors(result):
            if tensor.requires_grad and id(tensor) not in self._sources:
                self._sources[id(tensor)] = Source(tensor, names, False)
        return result

    def _with_copies(self, value: Any) -> Any:
        """``value`` with every source in it replaced by one copy per record."""
        if isinstance(value, dict):
            return {key: self._with_copies(part) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._with_copies(part) for part in value)
        source = self.source(value)
        return value if source is None else self._copies(source)

    def _copies(self, source: Source) -> Tensor:
        def run(row: Tensor, tensor: Tensor) -> Tensor:
            leaf = tensor.detach().expand(len(row), *tensor.shape).requires_grad_()
            self.tape.count(source)
            self.tape.leaves.append((source, leaf))
            return leaf

        assert self._row is not None
        return self.at_batch_level(run, self._row, source.tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def leaves_of(parameters: Tensors) -> Tensors:
    """Parameters as leaves of a graph of their own."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}

"""The clipped sum of gradients in one forward pass and one activation-gradient backward pass.

An ordinary backward pass computes, in each layer, the gradient of the input and that of the weight. Here the second is
put off: from the layer's input and output gradient come first the squared norms of the records' weight gradients, then,
with all norms and so all clip factors known, one weighted sum. Ghost norms are Goodfellow 2015 (arXiv 1510.01799) and,
for sequences and convolutions, Li et al. 2021 (arXiv 2110.05679) and Bu et al. 2022 (arXiv 2205.10683); doing it in
one backward pass is the book-keeping of Bu et al. 2023 (arXiv 2210.00038).
"""

import logging
import sys
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.clipping import Clipping, Tensors, clipped_sum
from lightning_dp.privacy.engines.rules import RULES
from lightning_dp.privacy.engines.tape import Tape
from lightning_dp.privacy.engines.tracing import Tracer, UncoveredError, leaves_of

log = logging.getLogger(__name__)

Prepare = Callable[..., tuple[Tensor, ...]]
DEFAULT_MEMORY_BUDGET = 64 << 20
# Inputs and outputs of layers that a pass keeps on a CPU, per layer: more goes to memory and comes back, less is not
# worth a layer's fixed work; and a whole pass has some as well. Measured.
_BYTES_PER_USE = 8 << 20
_BYTES_PER_PASS = 32 << 20


@final
class OneBackward:
    """Clipped sums of the gradients of one loss; the same numbers as `clipping.clipped_sum` of ``grad(loss)``.

    Guarantee: that of `clipping.clipped_sum`. The loss is called on one record at a time (under ``vmap``), so it cannot
    see another; only what lifts ``vmap`` itself could, which `models.Encoder` does for a frozen network and answers for
    (evaluation mode, `models.validate`, a look at unlike images). A parameter that is used in a way which cannot be
    followed takes the whole loss to `clipping.clipped_sum`, with one message in the log; no parameter is ever left out.
    What `torch.compile` compiled runs uncompiled.

    Args:
        loss: (parameters by name, *record) -> scalar. Several views of a record are an axis of the record; the loss
            averages over it.
        memory_budget: bytes that gradients of single records may take beyond what an ordinary backward pass keeps;
            performance only.

    Example:
        >>> engine = OneBackward(lambda parameters, row: (parameters["w"] * row).sum())
        >>> rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 0.0]])
        >>> engine.clipped_sum((rows,), {"w": torch.zeros(2)}, max_norm=1.0, chunk=2)["w"].round(decimals=4)
        tensor([0.9000, 1.2000])
    """

    def __init__(self, loss: Callable[..., Tensor], memory_budget: int = DEFAULT_MEMORY_BUDGET) -> None:
        if memory_budget < 0:
            raise ConfigError(f"memory_budget {memory_budget} must be 0 or above: raise it")
        self._loss = loss
        self._memory_budget = memory_budget
        # True after the loss turned out to do what cannot be followed.
        self.uses_reference = False
        self._worked = False
        self._per_pass: dict[tuple[torch.Size, ...], int] = {}

    def clipped_sum(
        self,
        records: tuple[Tensor, ...],
        parameters: Tensors,
        *,
        max_norm: float,
        chunk: int,
        clipping: Clipping = "flat",
        prepare: Prepare | None = None,
    ) -> Tensors:
        """Sum over records of the gradient at ``parameters``, each scaled to L2 norm at most ``max_norm``.

        Args:
            records: tensors whose first axis is the record axis, each (n, ...), n >= 0.
            parameters: values by name; everything else that the loss uses is a constant.
            max_norm: L2 bound in gradient units.
            chunk: records per pass; performance only.
            clipping: see `clipping.clip_factors`.
            prepare: batched map applied to each chunk before the loss; must treat every record by itself.

        Returns:
            Dict of sums in the shapes of ``parameters``: float32, or float64 if they are.

        Raises:
            ConfigError: the loss of a record is not a scalar.
        """
        if not self.uses_reference:
            try:
                return self._fast_sum(records, parameters, max_norm, chunk, clipping, prepare)
            except (UncoveredError, RuntimeError) as reason:
                if self._worked or isinstance(reason, torch.OutOfMemoryError):
                    raise
                self.uses_reference = True
                log.warning("gradients are clipped by vmap(grad), which is slower: %s", reason)

        def contribution(*record: Tensor) -> Any:
            return grad(self._loss)(parameters, *record)

        return clipped_sum(
            contribution, records, parameters, max_norm=max_norm, chunk=chunk, clipping=clipping, prepare=prepare
        )

    def _fast_sum(
        self,
        records: tuple[Tensor, ...],
        parameters: Tensors,
        max_norm: float,
        chunk: int,
        clipping: Clipping,
        prepare: Prepare | None,
    ) -> Tensors:
        dtype = torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)
        total = {name: torch.zeros_like(value, dtype=dtype) for name, value in parameters.items()}
        if len(records[0]) == 0:
            return total
        most = min(chunk, self._records_per_pass(records, parameters, dtype, prepare))
        passes = -(-len(records[0]) // most)
        for part in zip(*(torch.tensor_split(tensor, passes) for tensor in records), strict=True):
            tracer, losses = self._forward(part if prepare is None else prepare(*part), parameters, dtype)
            tracer.tape.plan(most, self._memory_budget)
            # norms and sums are not to be rounded to bfloat16, which would cross the bound
            with torch.autocast(part[0].device.type, enabled=False):
                self._backward(losses.sum(), tracer)
                self._worked = True
                tracer.tape.add_clipped_sum(total, max_norm, clipping)
        return total

    def _forward(self, records: tuple[Tensor, ...], parameters: Tensors, dtype: torch.dtype) -> tuple[Tracer, Tensor]:
        """The forward pass of some records: what it was recorded with, and the losses (records,)."""
        tracer = Tracer(Tape(leaves_of(parameters), dtype), RULES)
        row = torch.zeros(len(records[0]), device=records[0].device)
        # what was compiled was compiled without the tracer, and would have to be again, in pieces, at every pass
        with torch.compiler.set_stance("force_eager"):
            losses: Tensor = vmap(tracer.loss_of_one(self._loss), randomness="different")(row, *records)
        if losses.shape != row.shape:
            raise ConfigError(f"the loss of one record has shape {tuple(losses.shape[1:])}: return a scalar")
        return tracer, losses

    def _records_per_pass(
        self, records: tuple[Tensor, ...], parameters: Tensors, dtype: torch.dtype, prepare: Prepare | None
    ) -> int:
        """As many as stay near the processor, but enough to be worth a pass; from one record's forward pass.

        A function of shapes alone, so that a seeded run repeats exactly, and a resumed one goes on exactly.
        """
        if records[0].device.type != "cpu":
            return len(records[0])
        shapes = tuple(tensor.shape[1:] for tensor in records)
        if shapes not in self._per_pass:
            one = tuple(tensor[:1] for tensor in records)
            with torch.random.fork_rng([]):
                tracer, _ = self._forward(one if prepare is None else prepare(*one), parameters, dtype)
            tape = tracer.tape
            pays = max(_BYTES_PER_PASS, _BYTES_PER_USE * len(tape.uses))
            self._per_pass[shapes] = max(1, pays // tape.kept_bytes) if tape.uses else sys.maxsize
        return self._per_pass[shapes]

    def _backward(self, loss: Tensor, tracer: Tracer) -> None:
        tape = tracer.tape
        if not loss.requires_grad:
            return
        copies = [leaf for _, leaf in tape.leaves]
        inputs = [tracer.gate, *tape.parameters.values(), *copies]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)[1:]
        for name, gradient in zip(tape.parameters, gradients[: len(tape.parameters)], strict=True):
            if gradient is not None:
                raise UncoveredError(f"parameter {name} is used in a way that its gradient cannot be split by record")
        for (source, leaf), gradient in zip(tape.leaves, gradients[len(tape.parameters) :], strict=True):
            rows = torch.zeros_like(leaf) if gradient is None else gradient
            tape.add_rows(source, rows.reshape(len(rows), -1))

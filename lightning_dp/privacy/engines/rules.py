"""Which calls of torch functions the engine does in its own way. Each rule is exact; none is needed to be exact."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.privacy.engines.attention import dot_product_attention, multi_head_attention
from lightning_dp.privacy.engines.kernels import ConvGradient, EmbeddingGradient, LinearGradient, WeightGradient
from lightning_dp.privacy.engines.layers import (
    Collect,
    ConvLayer,
    EmbeddingLayer,
    GroupNormLayer,
    LayerNormLayer,
    LinearLayer,
)
from lightning_dp.privacy.engines.standardize import StandardizedConvGradient, standardized_filters
from lightning_dp.privacy.engines.tape import Source, Use
from lightning_dp.privacy.engines.tracing import Rule, Tracer


def _linear(tracer: Tracer, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    sources = tracer.source(weight), tracer.source(bias)
    if sources == (None, None):
        return NotImplemented

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # (records, positions, channels), for the kernels
        a = torch.Size((len(x), x.shape[1:-1].numel(), x.shape[-1]))
        collect = _collect(tracer, sources, LinearGradient(), a, torch.Size((*a[:2], len(weight))))
        y: Tensor = LinearLayer.apply(x.flatten(0, -2), weight.detach(), _detached(bias), tracer.gate, collect)
        return y.view(*x.shape[:-1], len(weight))

    return tracer.at_batch_level(run, input, weight, bias)


def _conv(
    tracer: Tracer,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    sources = tracer.source(weight), tracer.source(bias)
    if sources == (None, None):
        return NotImplemented
    axes = weight.ndim - 2
    stride, dilation = _per_axis(stride, axes), _per_axis(dilation, axes)
    if isinstance(padding, str):
        total = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        # an odd rest goes to the end of each axis, as torch has it
        rest = [value for width in reversed(total) for value in (0, width % 2)]
        input = F.pad(input, rest) if any(rest) else input
        padding = tuple(width // 2 for width in total)
    settings = stride, _per_axis(padding, axes), dilation, groups

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # (records, views, channels, ...), for the kernels; a record may come without an axis of views
        a = x.shape if x.ndim > weight.ndim else torch.Size((len(x), 1, *x.shape[1:]))
        gradient, uses = _conv_gradient(tracer, ConvGradient(weight.shape, *settings), sources)
        g = torch.Size((*a[:2], len(weight), *_outputs(a[3:], weight.shape[2:], settings)))
        collect = _collect(tracer, uses, gradient, a, g)
        images = x.reshape(-1, *a[2:])
        y: Tensor = ConvLayer.apply(images, weight.detach(), _detached(bias), tracer.gate, settings, collect)
        return y.view(*x.shape[: -weight.ndim + 1], *g[2:])

    return tracer.at_batch_level(run, input, weight, bias)


def _standardized_filters(tracer: Tracer, weight: Tensor) -> Any:
    raw = tracer.source(weight)
    if raw is None or not raw.is_parameter:
        return NotImplemented
    return tracer.derive_filters(standardized_filters, raw)


def _embedding(
    tracer: Tracer,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    source = tracer.source(weight)
    if source is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else len(weight) + padding_idx

    def run(x: Tensor, weight: Tensor) -> Tensor:
        a = torch.Size((len(x), x[0].numel()))
        gradient = EmbeddingGradient(len(weight), padding)
        collect = _collect(tracer, (source, None), gradient, a, torch.Size((*a, weight.shape[1])))
        y: Tensor = EmbeddingLayer.apply(x.reshape(-1), weight.detach(), tracer.gate, collect)
        return y.view(*x.shape, weight.shape[1])

    return tracer.at_batch_level(run, input, weight)


def _layer_norm(
    tracer: Tracer,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    sources = tracer.source(weight), tracer.source(bias)
    if weight is None or sources == (None, None):
        return NotImplemented

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        collect = _collect_affine(tracer, sources, len(x))
        x = x.to(weight.dtype)  # what autocast does
        y: Tensor = LayerNormLayer.apply(x, weight.detach(), _detached(bias), tracer.gate, eps, collect)
        return y

    return tracer.at_batch_level(run, input, weight, bias)


def _group_norm(
    tracer: Tracer,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    sources = tracer.source(weight), tracer.source(bias)
    if weight is None or sources == (None, None) or input.ndim < 2:
        return NotImplemented

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        collect = _collect_affine(tracer, sources, len(x))
        images = x.flatten(0, 1).to(weight.dtype)  # what autocast does
        settings = num_groups, eps
        y: Tensor = GroupNormLayer.apply(images, weight.detach(), _detached(bias), tracer.gate, settings, collect)
        return y.view(x.shape)

    return tracer.at_batch_level(run, input, weight, bias)


def _instance_norm(
    tracer: Tracer,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if weight is None or running_mean is not None or input.ndim < 3:
        return NotImplemented
    # a group norm with one channel in each group
    with tracer:
        return F.group_norm(input, len(weight), weight, bias, eps)


def _rms_norm(
    tracer: Tracer, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if weight is None or tracer.source(weight) is None:
        return NotImplemented
    with tracer:
        return F.rms_norm(input, normalized_shape, None, eps) * weight


RULES: dict[Any, Rule] = {
    standardized_filters: _standardized_filters,
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.rms_norm: _rms_norm,
    F.scaled_dot_product_attention: dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
}


def _conv_gradient(
    tracer: Tracer, conv: ConvGradient, sources: tuple[Source | None, Source | None]
) -> tuple[WeightGradient, tuple[Source | None, Source | None]]:
    """Kernels of a convolution, and the weight and bias that they are for: the raw one of a standardised weight."""
    weight, bias = sources
    if weight is None or weight.raw is None:
        return conv, sources
    return StandardizedConvGradient.of(conv, weight.raw.tensor, tracer.tape.dtype), (weight.raw, bias)


def _collect(
    tracer: Tracer,
    sources: tuple[Source | None, Source | None],
    gradient: WeightGradient,
    a: torch.Size,
    g: torch.Size,
) -> Collect:
    """What a layer hands (a, g) to, in any shape that holds the values of the given ones."""
    weight, bias = sources
    use = None if weight is None else Use(weight, gradient, a, g)
    if use is not None:
        tracer.tape.uses.append(use)
    for source in sources:
        if source is not None:
            tracer.tape.count(source)

    def collect(inputs: Tensor, outputs: Tensor) -> None:
        outputs = outputs.reshape(g)
        if use is not None:
            tracer.tape.add_product(use, inputs.reshape(a), outputs)
        if bias is not None:
            # (records, positions, channels) or (records, views, channels, ...)
            others = [axis for axis in range(1, outputs.ndim) if axis != 2]
            tracer.tape.add_rows(bias, outputs.to(tracer.tape.dtype).sum(others))

    return collect


def _collect_affine(tracer: Tracer, sources: tuple[Source | None, Source | None], records: int) -> Collect:
    """What a normalisation hands the gradients of its weight and bias to, (records * images, values) each."""
    for source in sources:
        if source is not None:
            tracer.tape.count(source)

    def collect(*gradients: Tensor) -> None:
        for source, part in zip(sources, gradients, strict=True):
            if source is not None:
                tracer.tape.add_rows(source, part.view(records, -1, part.shape[-1]).sum(1))

    return collect


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _outputs(size: torch.Size, kernel: torch.Size, settings: Any) -> list[int]:
    """Positions along each axis after a convolution."""
    stride, padding, dilation, _ = settings
    parts = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in parts]

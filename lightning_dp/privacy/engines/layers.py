"""Layers whose backward pass returns the input gradient only, and hands (a, g) on in the place of a weight gradient.

Each is an ordinary autograd function on all images or positions of all records, one axis for both. ``gate`` makes sure
that it has a backward pass, and ``collect`` takes what the gradients of the records are made of. No output is a view,
so that a network may overwrite it.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

Collect = Callable[..., None]


@final
class LinearLayer(torch.autograd.Function):
    """``x`` (n, in) -> (n, out); collects (a, g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, collect: Collect) -> Tensor:
        """Apply the linear map."""
        ctx.save_for_backward(x, weight)
        ctx.collect = collect
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Input gradient."""
        x, weight = ctx.saved_tensors
        ctx.collect(x, grads[0])
        inputs = (grads[0] @ weight.to(grads[0].dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return inputs, None, None, None, None


@final
class EmbeddingLayer(torch.autograd.Function):
    """``x`` integers (n,) -> (n, width); collects (a, g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor, collect: Collect) -> Tensor:
        """Look up."""
        ctx.save_for_backward(x)
        ctx.collect = collect
        return weight.index_select(0, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """No input gradient: the input is an index."""
        ctx.collect(ctx.saved_tensors[0], grads[0])
        return None, None, None, None


@final
class ConvLayer(torch.autograd.Function):
    """``x`` (n, channels, ...) -> (n, out channels, ...); collects (a, g).

    ``settings`` is (stride, padding, dilation, groups), the first three with one number per axis.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, settings: Any, collect: Collect
    ) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(x, weight)
        ctx.collect, ctx.settings = collect, settings
        return (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3](x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Input gradient."""
        x, weight = ctx.saved_tensors
        g = grads[0].contiguous()
        ctx.collect(x, g)
        inputs = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.settings
            inputs = torch.ops.aten.convolution_backward.default(
                g, x.to(g.dtype), weight.to(g.dtype), None, stride, padding, dilation, False, [0] * len(stride), groups,
                (True, False, False),
            )[0].to(x.dtype)  # fmt: skip
        return inputs, None, None, None, None, None


@final
class LayerNormLayer(torch.autograd.Function):
    """``x`` (n, ..., *shape); collects the affine gradients of each of the n, (n, values) each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, eps: float, collect: Collect
    ) -> Tensor:
        """Normalise."""
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.collect = collect
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Input gradient."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        g = grads[0].contiguous()
        positions = (len(x), -1, weight.numel())
        scaled = ((x - mean) * rstd).mul_(g)
        ctx.collect(scaled.reshape(positions).sum(1), g.reshape(positions).sum(1))
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = torch.ops.aten.native_layer_norm_backward.default(
                g, x, weight.shape, mean, rstd, weight, bias, (True, False, False)
            )[0]
        return inputs, None, None, None, None, None


@final
class GroupNormLayer(torch.autograd.Function):
    """``x`` (n, channels, ...); collects the affine gradients of each of the n images, (n, channels) each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, settings: Any, collect: Collect
    ) -> Tensor:
        """Normalise; ``settings`` is (groups, eps)."""
        groups, eps = settings
        x = x.contiguous()
        images, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(x, weight, bias, images, channels, x.shape[2:].numel(), groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.collect, ctx.groups = collect, groups
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Input gradient; as if all channels were those of one image, so that the affine gradients come by image."""
        x, weight, mean, rstd = ctx.saved_tensors
        images, channels = x.shape[:2]
        one = (1, images * channels, *x.shape[2:])
        inputs, weights, biases = torch.ops.aten.native_group_norm_backward.default(
            grads[0].contiguous().view(one), x.view(one), mean.view(1, -1), rstd.view(1, -1), weight.repeat(images),
            1, images * channels, x.shape[2:].numel(), images * ctx.groups, (True, True, True),
        )  # fmt: skip
        ctx.collect(weights.view(images, channels), biases.view(images, channels))
        return inputs.view_as(x), None, None, None, None, None

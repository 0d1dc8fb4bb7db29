"""Attention, in terms of calls that have rules."""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_dp.privacy.engines.tracing import Tracer, over_records


def dot_product_attention(
    tracer: Tracer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``F.scaled_dot_product_attention``, for speed alone: under vmap, torch has no fast form of it.

    Here a record is one more element of the batch.
    """
    if attn_mask is not None or any(tracer.source(tensor) is not None for tensor in (query, key, value)):
        return NotImplemented

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        folded = F.scaled_dot_product_attention(
            query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), None, dropout_p, is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
        return folded.view(*query.shape[:2], *folded.shape[1:])

    return over_records(run, query, key, value)


def multi_head_attention(
    tracer: Tracer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``F.multi_head_attention_forward``, by linear maps that have rules; not with masks or extra keys."""
    special = (bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)
    if add_zero_attn or is_causal or query.ndim != 3 or any(value is not None for value in special):
        return NotImplemented
    dropout = dropout_p if training else 0.0
    with tracer:
        if query is key and key is value and in_proj_weight is not None:
            projected = list(F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1))
        else:
            separate = [weight for weight in (q_proj_weight, k_proj_weight, v_proj_weight) if weight is not None]
            weights = separate if in_proj_weight is None else in_proj_weight.chunk(3)
            biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            inputs = zip((query, key, value), weights, biases, strict=True)
            projected = [F.linear(x, weight, bias) for x, weight, bias in inputs]
        # (positions, views, width) -> (views, heads, positions, width of a head)
        heads = [part.reshape(*part.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for part in projected]
        attention = None
        if need_weights:
            attention = (heads[0] @ heads[1].mT / math.sqrt(heads[0].shape[-1])).softmax(-1)
            attention = F.dropout(attention, dropout)
            mixed = attention @ heads[2]
            attention = attention.mean(1) if average_attn_weights else attention
        else:
            mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], None, dropout)
        return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), attention

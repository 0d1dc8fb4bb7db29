"""The only place where a private record is bounded."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

Clipping = Literal["flat", "automatic"]
Tensors = dict[str, Tensor]

# Rounding of norms and products stays inside the bound.
_SLACK = 1e-6
# Stabiliser of automatic clipping (Bu et al. 2023, arXiv 2206.07136, equation 5), in gradient units.
_GAMMA = 0.01
# A float32 norm over one long row is biased low on CPU (-5e-5 at 2.75 M values), which would loosen the clip.
_NORM_BLOCK = 1024


def record_norms(flat: Tensor) -> Tensor:
    """L2 norm of each row of ``flat``, shape (records, values) -> (records,), as the norm of the norms of blocks."""
    records, values = flat.shape
    whole = values - values % _NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:, :whole].reshape(records, -1, _NORM_BLOCK), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(torch.cat([blocks, rest], dim=1), dim=1)
    return norms


def clip_factors(norms: Tensor, max_norm: float, clipping: Clipping) -> Tensor:
    """What each record is multiplied by, shape (records,); 0 for a record whose norm is not finite.

    Guarantee: ``factor * norm <= max_norm`` for every record and both kinds of clipping.

    Args:
        norms: L2 norms, shape (records,).
        max_norm: L2 bound; infinity leaves finite records as they are (no guarantee, for controls).
        clipping: "flat" scales only what is longer than the bound (Abadi et al. 2016, arXiv 1607.00133);
            "automatic" scales every record to about the bound (Bu et al. 2023, arXiv 2206.07136).
    """
    bound = max_norm * (1 - _SLACK)
    factors = (bound / norms).clamp(max=1.0) if clipping == "flat" else bound / (norms + _GAMMA)
    return torch.where(norms.isfinite(), factors, 0.0)


def clipped_sum(
    fn: Callable[..., Tensors],
    records: tuple[Tensor, ...],
    template: Tensors,
    *,
    max_norm: float,
    chunk: int,
    clipping: Clipping = "flat",
    prepare: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Tensors:
    """Sum over records of ``fn(record)``, each scaled to L2 norm at most ``max_norm``.

    Guarantee: adding or removing one record changes the result by at most ``max_norm`` in L2 norm over all tensors
    together. ``fn`` runs under ``vmap`` on one record at a time, so it cannot see another. A record whose value is
    not finite contributes zero; no records give zero. ``chunk`` bounds the memory and does not change the result,
    up to float32 rounding.

    Args:
        fn: one record (a slice of every tensor of ``records`` after ``prepare``) -> dict of tensors.
        records: tensors whose first axis is the record axis, each (n, ...), n >= 0.
        template: tensors of the shapes that ``fn`` returns; its values are not read.
        max_norm: L2 bound in the units of ``fn``'s output.
        chunk: records per vectorised call.
        clipping: see `clip_factors`.
        prepare: batched map applied to each chunk before ``fn``; must treat every record by itself.

    Returns:
        Dict of sums in the shapes of ``template``: float32, or float64 if the template is.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 0.0]])
        >>> total = clipped_sum(lambda row: {"w": row}, (rows,), {"w": rows[0]}, max_norm=1.0, chunk=2)
        >>> total["w"].round(decimals=4)
        tensor([0.9000, 1.2000])
    """
    dtype = torch.promote_types(next(iter(template.values())).dtype, torch.float32)
    size = sum(value.numel() for value in template.values())
    total = torch.zeros(size, dtype=dtype, device=next(iter(template.values())).device)
    per_record = vmap(fn, randomness="different")
    device = total.device.type
    for part in zip(*(torch.split(tensor, chunk) for tensor in records), strict=True):
        if part[0].shape[0] == 0:
            continue
        values = per_record(*(part if prepare is None else prepare(*part)))
        # ``fn`` may run in bfloat16 by autocast; a bound that is rounded to bfloat16 would be crossed.
        with torch.autocast(device, enabled=False):
            flat = torch.cat([values[name].flatten(1).to(dtype) for name in template], dim=1)
            factors = clip_factors(record_norms(flat), max_norm, clipping)
            # 0 * inf is NaN: a refused record has to be masked, not multiplied.
            flat.masked_fill_((factors == 0)[:, None], 0.0)
            total += factors @ flat
    return unflatten(total, template)


def flatten(tensors: Tensors) -> Tensor:
    """All values in one row, in the dict's order."""
    return torch.cat([value.reshape(-1) for value in tensors.values()])


def unflatten(flat: Tensor, template: Tensors) -> Tensors:
    """Views of ``flat`` in the shapes of ``template``; the inverse of `flatten`."""
    parts = torch.split(flat, [value.numel() for value in template.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, template.items(), strict=True)}

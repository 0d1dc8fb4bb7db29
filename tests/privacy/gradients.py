"""Clipped sums of gradients by the engine, and by a loop over the records, in float64."""

import torch
from torch.func import functional_call, grad

from lightning_dp.privacy.clipping import flatten
from lightning_dp.privacy.engines import OneBackward
from tests import reference

NOTHING_KEPT, ALL_KEPT = 0, 1 << 40
RECORDS = 5
SLACK = 1e-6  # by which clipping stays below its bound


def loss_of(net, views=False):
    """Squared distance to a target for one record: any net, any output; over the mean of the views."""

    def loss(parameters, x, target):
        out = functional_call(net, parameters, (x if views else x[None],))
        outs = out if isinstance(out, tuple) else (out,)
        return sum(((part - target) ** 2).mean() for part in outs if part is not None)

    return loss


def trained(net):
    return {name: value.detach() for name, value in net.named_parameters() if value.requires_grad}


def fast(net, x, budget=NOTHING_KEPT, views=False, chunk=3, clipping="flat", max_norm=None, engine=None):
    engine = OneBackward(loss_of(net, views), budget) if engine is None else engine
    targets = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    bound = max_norm or 0.5
    return flatten(engine.clipped_sum((x, targets), trained(net), max_norm=bound, chunk=chunk, clipping=clipping))


def slow(net, x, views=False, clipping="flat", max_norm=None):
    targets = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    rows = []
    for image, target in zip(x, targets, strict=True):
        gradients = grad(loss_of(net, views))(trained(net), image, target)
        rows.append(flatten(gradients))
    bound = max_norm or median_norm(rows)
    return reference.clipped_sum(rows, bound, clipping), bound


def median_norm(rows):
    """A bound that clips about half of the records."""
    return torch.stack(rows).norm(dim=1).median().item()


def check(net, x, views=False, fallback=False, **settings):
    net = net.double()
    x = x.double() if x.is_floating_point() else x
    expected, bound = slow(net, x, views)
    assert expected.norm() > 1e-3
    for budget in (NOTHING_KEPT, ALL_KEPT):
        engine = OneBackward(loss_of(net, views), budget)
        total = fast(net, x, views=views, max_norm=bound / (1 - SLACK), engine=engine, **settings)
        assert engine.uses_reference == fallback
        assert (total - expected).norm() <= 1e-12 * expected.norm()


def perturbed(net, size=0.3):
    """Norms start at weight 1 and bias 0, where errors can hide."""
    with torch.no_grad():
        for value in net.parameters():
            value += size * torch.randn_like(value)
    return net

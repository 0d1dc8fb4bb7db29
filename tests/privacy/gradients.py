"""Clipped sums of gradients by the engine, and by a loop over the records, in float64."""

from unittest import mock

import torch
from torch.func import functional_call, grad

from lightning_dp.privacy.clipping import flatten
from lightning_dp.privacy.engines import OneBackward, tape
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


def gradients_of(net, x, views=False):
    """Gradients of the records one by one, (records, values)."""
    targets = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    loss = grad(loss_of(net, views))
    return torch.stack([flatten(loss(trained(net), *record)) for record in zip(x, targets, strict=True)])


def slow(net, x, views=False, clipping="flat", max_norm=None):
    rows = gradients_of(net, x, views)
    bound = max_norm or rows.norm(dim=1).median().item()  # clips about half of the records
    return reference.clipped_sum(rows, bound, clipping), bound


def fast_with_norms(net, x, **settings):
    """The clipped sum, and the norms of the records that the clip factors were computed from."""
    with mock.patch.object(tape, "clip_factors", wraps=tape.clip_factors) as seen:
        total = fast(net, x, **settings)
    return total, torch.cat([call.args[0] for call in seen.call_args_list])


def check(net, x, views=False, **settings):
    net = net.double()
    x = x.double() if x.is_floating_point() else x
    expected, bound = slow(net, x, views)
    norms = gradients_of(net, x, views).norm(dim=1)
    assert expected.norm() > 1e-3
    for budget in (NOTHING_KEPT, ALL_KEPT):
        engine = OneBackward(loss_of(net, views), budget)
        total, found = fast_with_norms(net, x, views=views, max_norm=bound / (1 - SLACK), engine=engine, **settings)
        assert not engine.uses_reference
        assert (total - expected).norm() <= 1e-12 * expected.norm()
        assert ((found - norms).abs() <= 1e-11 * norms).all()


def perturbed(net, size=0.3):
    """Norms start at weight 1 and bias 0, where errors can hide."""
    with torch.no_grad():
        for value in net.parameters():
            value += size * torch.randn_like(value)
    return net

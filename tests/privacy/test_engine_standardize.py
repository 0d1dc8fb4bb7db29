"""Weight standardisation in the engine: which way it goes, and rounding."""

import pytest
import torch
from torch.func import functional_call

from lightning_dp.models import WSConv2d
from lightning_dp.privacy.clipping import flatten
from lightning_dp.privacy.engines import OneBackward
from lightning_dp.privacy.engines.kernels import ConvGradient
from lightning_dp.privacy.engines.standardize import StandardizedConvGradient, standardized_filters
from lightning_dp.privacy.engines.tape import Tape
from tests.privacy.gradients import ALL_KEPT, NOTHING_KEPT, trained


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kernels(dtype=torch.float64):
    weight = torch.randn(6, 4, 3, 3, dtype=dtype)
    conv = ConvGradient(weight.shape, (1, 1), (1, 1), (1, 1), 1)
    return StandardizedConvGradient.of(conv, weight, dtype), weight


def test_both_paths_give_the_norm_and_the_sum_of_autograd():
    gradient, weight = kernels()
    a, g = torch.randn(5, 2, 4, 6, 5).double(), torch.randn(5, 2, 6, 6, 5).double()

    def output_dot_g(weight, a, g):
        return (torch.nn.functional.conv2d(a, standardized_filters(weight), padding=1) * g).sum()

    rows = torch.stack([torch.func.grad(output_dot_g)(weight, *pair).flatten() for pair in zip(a, g, strict=True)])
    torch.testing.assert_close(torch.cat(list(gradient.rows(a, g))), rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient.squared_norms(a, g), rows.square().sum(1), rtol=1e-12, atol=0)
    factors = torch.rand(5).double()
    torch.testing.assert_close(gradient.total(a, g, factors), factors @ rows, rtol=1e-12, atol=1e-12)


def test_no_second_buffer_of_pulled_gradients(monkeypatch):
    """The raw parameter is met once, so that its gradients are never concatenated and mapped by autograd."""
    monkeypatch.setattr(Tape, "_pull", None)
    net, x = WSConv2d(4, 6, 3), torch.randn(5, 4, 6, 5)
    for budget in (NOTHING_KEPT, ALL_KEPT):
        engine = OneBackward(lambda parameters, x: functional_call(net, parameters, (x,)).square().sum(), budget)
        assert flatten(engine.clipped_sum((x,), trained(net), max_norm=1.0, chunk=5)).norm() > 0
        assert not engine.uses_reference


@pytest.mark.parametrize("along", ["filters", "constant", "both"])
@pytest.mark.parametrize("channels", [8, 256])
def test_gradients_that_standardisation_takes_away_stay_inside_the_ball(channels, along):
    """What is left of a gradient along the filter or a constant is a difference of large numbers."""
    net = WSConv2d(channels, 3, 3, stride=3, bias=False)
    filters = standardized_filters(net.weight.detach())
    patch = {"filters": filters[0], "constant": torch.ones(channels, 3, 3), "both": filters[0] + 2}[along]

    def loss(parameters, x):
        return functional_call(net, parameters, (x[None],))[0, 0].sum() * 0.5

    for budget in (NOTHING_KEPT, ALL_KEPT):
        engine = OneBackward(loss, budget)
        for size in (0, 1e-4, 1e-3, 1e-2):
            for _ in range(10):
                x = 100 * patch.repeat(1, 2, 2) + size * torch.randn(channels, 6, 6)
                total = engine.clipped_sum((x[None],), trained(net), max_norm=0.01, chunk=8)["weight"]
                assert not engine.uses_reference
                assert total.norm() <= 0.01 * (1 + 1e-3)

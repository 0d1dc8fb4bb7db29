"""The engine on whole networks, against a loop over the records."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from lightning_dp.models import WideResNet, WSConv2d, make_private_ready
from lightning_dp.privacy.engines import OneBackward
from tests.privacy.gradients import (
    ALL_KEPT,
    NOTHING_KEPT,
    RECORDS,
    SLACK,
    check,
    fast,
    fast_with_norms,
    gradients_of,
    loss_of,
    perturbed,
    slow,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_timm():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=3,
        init_values=0.1,
    )  # fmt: skip


NETWORKS = {
    "wrn": lambda: WideResNet(10, 1),
    "wrn, standardised": lambda: WideResNet(10, 1, weight_standardization=True),
    "torchvision vit": lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 24, 48, num_classes=3),
    "timm vit": small_timm,
    "convnext": lambda: torchvision.models.convnext.ConvNeXt(
        [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3
    ),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_the_loop_over_records(name, views, freezes):
    net = perturbed(make_private_ready(NETWORKS[name]())[0].eval(), 0.05)
    for index, value in enumerate(net.parameters()):
        value.requires_grad = not freezes or index % 3 > 0
    check(net, torch.randn(3, 4, 3, 16, 16) if views else torch.randn(3, 3, 16, 16), views)


def smooth_convnet():
    return nn.Sequential(
        WSConv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GELU(),
        nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 3),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", ["convnet", "torchvision vit", "timm vit", "convnext"])
def test_smooth_network_in_float32(name, views):
    """Without kinks, float32 is as near to float64 as its rounding."""
    net = perturbed((smooth_convnet if name == "convnet" else NETWORKS[name])().eval(), 0.05)
    x = torch.randn(3, 4, 3, 16, 16) if views else torch.randn(3, 3, 16, 16)
    exact = copy.deepcopy(net).double()
    expected, bound = slow(exact, x.double(), views)
    norms = gradients_of(exact, x.double(), views).norm(dim=1)
    for budget in (NOTHING_KEPT, ALL_KEPT):
        engine = OneBackward(loss_of(net, views), budget)
        total, found = fast_with_norms(net, x, views=views, max_norm=bound / (1 - SLACK), engine=engine)
        assert total.dtype == torch.float32
        assert not engine.uses_reference
        assert (total - expected).norm() <= 1e-5 * expected.norm()
        assert ((found - norms).abs() <= 1e-5 * norms).all()


@pytest.mark.parametrize("compiled", ["network", "part", "loss"])
def test_what_is_compiled_runs_uncompiled(compiled):
    """A compiled graph would hide its parameters from the engine, or keep the values of another step."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    x, graphs = torch.randn(RECORDS, 1, 6, 6, dtype=torch.float64), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    faster = torch.compile(net, backend=backend)
    if compiled == "part":
        faster = nn.Sequential(net[0], torch.compile(net[1:], backend=backend))
    if compiled != "loss":
        faster(x)  # now it is compiled
    loss = torch.compile(loss_of(net), backend=backend) if compiled == "loss" else loss_of(faster)
    used = net if compiled == "loss" else faster
    engine, before = OneBackward(loss), len(graphs)
    for _ in range(3):
        expected, bound = slow(net, x)
        total = fast(used, x, max_norm=bound / (1 - SLACK), engine=engine)
        assert (total - expected).norm() <= 1e-12 * expected.norm()
        perturbed(net)
    assert not engine.uses_reference
    assert len(graphs) == before

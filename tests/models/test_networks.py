"""Every network of the package: shape, size, and that it is a function of each record by itself."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.models import (
    CIFARTanhCNN,
    ConvNet,
    LinearHead,
    MNISTTanhCNN,
    ScatterNet,
    WideResNet,
    WSConv2d,
    validate,
)


def _scatter_linear() -> nn.Module:
    return nn.Sequential(ScatterNet(8), LinearHead(81, 2, 10, groups=27))


# name -> builder, shape of one image
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "wide_resnet": (lambda: WideResNet(depth=10, width=1), (3, 8, 8)),
    "wide_resnet_ws": (lambda: WideResNet(depth=10, width=1, weight_standardization=True), (3, 8, 8)),
    "mnist_tanh": (MNISTTanhCNN, (1, 28, 28)),
    "cifar_tanh": (CIFARTanhCNN, (3, 32, 32)),
    "convnet": (lambda: ConvNet(width=8), (1, 28, 28)),
    "linear": (lambda: LinearHead(1, 28, 10), (1, 28, 28)),
    "linear_features": (lambda: LinearHead(32, 1, 10, groups=4), (32, 1, 1)),
    "scatter_linear": (_scatter_linear, (1, 8, 8)),
}


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A float64 network with no zero parameters, and three records."""
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    net = build().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net, torch.randn(3, *shape, dtype=torch.float64)


def test_shape(case):
    net, images = case
    assert net(images).shape == (3, 10)
    assert net(images).dtype == torch.float64


def test_empty_batch(case):
    net, images = case
    assert net(images[:0]).shape == (0, 10)
    net(images[:0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_one_record_does_not_change_another(case):
    net, images = case
    changed = images.clone()
    changed[1] += torch.randn_like(changed[1])
    before, after = net(images), net(changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-12)
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_vmap_of_grad_equals_a_loop_of_backward(case):
    net, images = case
    labels = torch.tensor([0, 3, 9])
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (image[None],)), label[None])

    fast = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for i in range(3):
        slow = torch.autograd.grad(F.cross_entropy(net(images[i : i + 1]), labels[i : i + 1]), list(net.parameters()))
        for name, expected in zip(parameters, slow, strict=True):
            torch.testing.assert_close(fast[name][i], expected, rtol=1e-9, atol=1e-12)
    assert any(g.abs().max() > 1e-3 for g in fast.values())


def test_input_is_not_overwritten(case):
    net, images = case
    before = images.clone()
    net(images)
    assert torch.equal(images, before)


def test_bf16_autocast_stays_close(case):
    net, images = case
    net, images = net.float(), images.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(images)
    exact = net(images)
    assert (low - exact).norm() < 0.05 * exact.norm()


def test_state_dict_loads_with_weights_only(case):
    net, images = case
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images), net(images))


def test_no_buffers_are_saved_and_validate_is_content(case):
    net, _ = case
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assert validate(net) == []


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (WideResNet(), 2_748_890),
        (WideResNet(weight_standardization=True), 2_748_890),
        (MNISTTanhCNN(), 26_010),
        (CIFARTanhCNN(), 550_570),
        (ConvNet(), 317_706),
        (ConvNet(in_channels=3, image_size=32), 320_010),
        (LinearHead(81, 7, 10, groups=27), 39_700),
        (ScatterNet(28), 0),
    ],
)
def test_parameter_counts(net, count):
    assert sum(p.numel() for p in net.parameters()) == count


def test_wide_resnet_depth_counts_the_convolutions():
    for depth in (10, 16, 22):
        net = WideResNet(depth=depth, width=2)
        assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == depth


def test_ws_conv_standardises_each_filter():
    torch.manual_seed(0)
    conv = WSConv2d(6, 4, 3, padding=1, groups=2).double()
    with torch.no_grad():
        conv.weight.mul_(5).add_(3)
    filters = conv.standardized_weight()
    torch.testing.assert_close(filters.mean(dim=(1, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        filters.var(dim=(1, 2, 3), correction=0), torch.full((4,), 1 / 27).double(), rtol=1e-4, atol=0
    )
    images = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(images), F.conv2d(images, filters, conv.bias, padding=1, groups=2))


def test_ws_conv_of_equal_weights_has_a_finite_gradient():
    conv = WSConv2d(3, 4, 3)
    nn.init.ones_(conv.weight)
    conv(torch.randn(1, 3, 5, 5)).square().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_weight_standardisation_makes_wide_resnet_blind_to_the_scale_of_its_convolutions():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    difference = {}
    for standardized in (True, False):
        net = WideResNet(10, 1, weight_standardization=standardized).double()
        before = net(images)
        with torch.no_grad():
            net.blocks[2].conv2.weight.mul_(10)
        difference[standardized] = (net(images) - before).norm() / before.norm()
    assert difference[True] < 1e-3 < difference[False]


def test_linear_head_starts_uniform_whatever_the_seed():
    assert not LinearHead(1, 4, 3)(torch.randn(2, 1, 4, 4)).any()


def test_linear_head_norm_ignores_scale_and_shift_of_a_record():
    net = LinearHead(6, 2, 3, groups=3).double()
    nn.init.normal_(net.linear.weight)
    features = torch.randn(2, 6, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(net(5 * features + 1), net(features), rtol=1e-4, atol=1e-4)
    assert net(features).abs().max() > 0.1


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: WideResNet(depth=15), ["depth=15", "16"]),
        (lambda: WideResNet(depth=4), ["depth=4"]),
        (lambda: WideResNet(width=0), ["width=0"]),
        (lambda: WideResNet(groups=3), ["groups=3", "8"]),
        (lambda: ConvNet(image_size=30), ["image_size=30", "depth=3"]),
        (lambda: ConvNet(image_size=32, depth=6), ["depth=6"]),
        (lambda: LinearHead(81, 7, 10, groups=2), ["groups=2", "in_channels=81"]),
        (lambda: LinearHead(32, 1, 10, groups=32), ["groups=32"]),
        (lambda: ScatterNet(30), ["image_size=30", "4"]),
        (lambda: ScatterNet(28, scales=0), ["scales=0"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(build, words):
    with pytest.raises(ConfigError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)

"""Wavelet scattering: sizes, agreement with kymatio, and that it stays frozen."""

import copy
import pickle
import sys

import pytest
import torch
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

from lightning_dp.errors import ConfigError
from lightning_dp.models import ScatterNet


@pytest.mark.parametrize(
    ("net", "channels", "size", "shape"),
    [
        (ScatterNet(28), 81, 7, (2, 1, 28, 28)),
        (ScatterNet(32, in_channels=3), 243, 8, (2, 3, 32, 32)),
        (ScatterNet(16, scales=3, angles=4), 1 + 12 + 48, 2, (2, 1, 16, 16)),
        (ScatterNet(16, scales=1, angles=4), 5, 8, (2, 1, 16, 16)),
    ],
)
def test_announced_sizes_are_the_true_ones(net, channels, size, shape):
    assert (net.out_channels, net.out_size) == (channels, size)
    assert net(torch.randn(shape)).shape == (2, channels, size, size)
    assert net(torch.randn(shape)[:0]).shape == (0, channels, size, size)


def test_equals_unmodified_kymatio():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    expected = ScatteringTorch2D(J=2, shape=(16, 16), L=8)(images).flatten(1, 2)
    torch.testing.assert_close(ScatterNet(16, in_channels=3)(images), expected)


def test_no_gradient_passes_and_nothing_is_saved():
    net = ScatterNet(8)
    images = torch.randn(1, 1, 8, 8, requires_grad=True)
    assert not net(images).requires_grad
    assert net.state_dict() == {}
    assert list(net.buffers())  # they still move with .to(device)


def test_autocast_does_not_lower_the_precision():
    net, images = ScatterNet(8), torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net(images)
    assert torch.equal(features, net(images))
    assert net(images.to(torch.bfloat16)).dtype == torch.float32


def test_non_contiguous_images_and_copies():
    net, images = ScatterNet(8), torch.randn(1, 8, 8, 2).permute(3, 0, 1, 2)
    expected = net(images.contiguous())
    assert torch.equal(net(images), expected)
    assert torch.equal(copy.deepcopy(net)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(images), expected)


def test_missing_kymatio_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "kymatio.scattering2d.frontend.torch_frontend", None)
    monkeypatch.delitem(sys.modules, "lightning_dp.models._kymatio", raising=False)
    with pytest.raises(ConfigError, match=r"ScatterNet needs kymatio: pip install 'lightning_dp\[scatter\]'"):
        ScatterNet(28)

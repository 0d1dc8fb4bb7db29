"""Networks of torchvision and timm by name."""

import logging
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_dp.errors import ConfigError
from lightning_dp.models import RecordDropPath, TimmNet, TorchvisionNet, validate


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: TorchvisionNet("resnet18", 3), 32),
        (lambda: TorchvisionNet("mobilenet_v3_small", 3), 32),
        (lambda: TorchvisionNet("shufflenet_v2_x0_5", 3), 32),
        (lambda: TimmNet("resnet10t", 3), 32),
        (lambda: TimmNet("efficientvit_b0", 3), 32),
    ],
    ids=["resnet18", "mobilenet", "shufflenet", "timm_resnet", "timm_efficientvit"],
)
def test_per_record_gradients_equal_a_loop(build, size):
    torch.manual_seed(0)
    net = build().double()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # two draws cannot be compared
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, image):
        return functional_call(net, parameters, (image[None],)).square().sum()

    fast = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, images)
    slow = torch.autograd.grad(net(images[1:]).square().sum(), list(net.parameters()))
    for name, expected in zip(parameters, slow, strict=True):
        assert (fast[name][1] - expected).norm() <= 1e-9 * expected.norm() + 1e-9
    assert net(images[:0]).shape == (0, 3)
    changed = images.clone()
    changed[1] += 1
    torch.testing.assert_close(net(changed)[0], net(images)[0], rtol=0, atol=1e-10)
    assert validate(net) == []


def test_stochastic_depth_runs_under_vmap():
    net = TorchvisionNet("efficientnet_b0", 2)
    assert any(isinstance(m, RecordDropPath) for m in net.modules())
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, image):
        return functional_call(net, parameters, (image[None],)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, torch.randn(1, 3, 32, 32))
    assert all(g.isfinite().all() for g in gradients.values())


def test_attention_needs_no_change():
    net = TimmNet("test_vit", 3)
    assert net.changes == []
    assert net(torch.zeros(2, 3, 160, 160)).shape == (2, 3)


def test_changes_are_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_dp.models.pretrained"):
        net = TorchvisionNet("resnet18", 3)
    (record,) = [r for r in caplog.records if r.name == "lightning_dp.models.pretrained"]
    assert record.getMessage().startswith("resnet18: 29 changes")
    assert all(change in record.getMessage() for change in net.changes)


def test_weights_file_with_the_same_classes_is_loaded_whole(tmp_path):
    source = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    net = TorchvisionNet("squeezenet1_1", 3, weights_file=tmp_path / "weights.pt").eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(images), source.eval()(images))
    assert not any("head" in change for change in net.changes)


def test_weights_file_for_other_classes_loses_its_head_and_keeps_its_norms(tmp_path):
    source = torchvision.models.resnet18(num_classes=5)
    nn.init.normal_(source.bn1.weight)
    state = {key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "weights.pt")
    net = TorchvisionNet("resnet18", 3, weights_file=tmp_path / "weights.pt")
    assert torch.equal(net.net.bn1.weight, source.bn1.weight)
    assert torch.equal(net.net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert net.changes[0] == "fc: weights for other classes left out, the new head starts at its initialisation"


def test_timm_loads_the_same_file_format(tmp_path):
    source = TimmNet("test_vit", 5)
    torch.save(source.net.state_dict(), tmp_path / "weights.pt")
    net = TimmNet("test_vit", 5, weights_file=tmp_path / "weights.pt")
    images = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(net(images), source(images))


def test_named_weights_are_torchvisions(monkeypatch):
    source = torchvision.models.squeezenet1_1(num_classes=1000)
    asked = []

    def no_download(url, **options):
        asked.append(url)
        return source.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_download)
    net = TorchvisionNet("squeezenet1_1", 3, weights="IMAGENET1K_V1")
    assert asked == [torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url]
    assert torch.equal(net.net.features[0].weight, source.features[0].weight)
    assert net.changes[0].startswith("classifier.1: weights for other classes left out")


@pytest.fixture
def files(tmp_path):
    """A directory of files that are not the weights of SqueezeNet."""
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "checkpoint.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    state = torchvision.models.squeezenet1_1().state_dict()
    state["features.0.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "shape.pt")
    (tmp_path / "text.pt").write_text("no tensors here")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("none.pt", "is not a file"),
        ("text.pt", "torch.load"),
        ("checkpoint.pt", "plain state dict"),
        ("other.pt", "a is missing, unexpected"),
        ("shape.pt", "features.0.weight is missing, unexpected or of another shape"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(files, file, words):
    with pytest.raises(ConfigError, match="weights_file=") as caught:
        TorchvisionNet("squeezenet1_1", 3, weights_file=files / file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TorchvisionNet("resnet81", 3), ["name=resnet81", "did you mean resnet18", "list_models"]),
        (lambda: TorchvisionNet("qqqq", 3), ["name=qqqq", "torchvision.models.list_models()"]),
        (lambda: TimmNet("vit_tiny_patch16_223", 3), ["vit_tiny_patch16_224", "timm.list_models()"]),
        (lambda: TorchvisionNet("googlenet", 3), ["googlenet", "more than logits"]),
        (lambda: TorchvisionNet("resnet18", 0), ["num_classes=0"]),
        (lambda: TorchvisionNet("resnet18", 3, weights="V9"), ["weights=V9", "IMAGENET1K_V1"]),
        (lambda: TorchvisionNet("resnet18", 3, weights="DEFAULT", weights_file="x.pt"), ["give one of them"]),
        (lambda: TimmNet("resnet18", 3, pretrained=True, weights_file="x.pt"), ["give one of them"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(build, words):
    with pytest.raises(ConfigError) as caught:
        build()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_missing_timm_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"TimmNet needs timm: pip install 'lightning_dp\[timm\]'"):
        TimmNet("resnet18", 3)

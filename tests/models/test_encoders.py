"""Frozen encoders: fixed, by record, exact in what they load; and the classifier on one."""

import argparse
import json
import sys
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD
from lightning_dp.models import (
    Encoder,
    EncoderClassifier,
    LinearHead,
    OpenClipEncoder,
    ScatterNet,
    SimCLREncoder,
    TimmEncoder,
    TorchvisionEncoder,
    validate,
)
from lightning_dp.privacy.clipping import clipped_sum
from lightning_dp.privacy.engines import OneBackward
from tests.methods.runs import PRIVACY, fit, make_data

DIGITS = {"mean": (0.305,), "std": (0.376,)}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return "tiny-clip"


@pytest.fixture(params=["timm", "torchvision", "clip"])
def encoder(request, tiny_clip):
    torch.manual_seed(0)
    if request.param == "timm":
        return TimmEncoder("test_efficientnet", pretrained=False, image_size=32)
    if request.param == "torchvision":
        return TorchvisionEncoder("resnet18", weights=None, image_size=32)
    return OpenClipEncoder(tiny_clip, pretrained=None)


def test_frozen_fixed_and_by_record(encoder):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert validate(encoder) == []
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    features = encoder(images)
    assert features.shape == (4, encoder.num_features)
    assert not features.requires_grad
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    torch.testing.assert_close(torch.cat([encoder(image[None]) for image in images]), features, rtol=1e-4, atol=1e-5)
    views = images.detach().view(2, 2, 3, 8, 8)
    torch.testing.assert_close(torch.func.vmap(encoder)(views).flatten(0, 1), features)
    assert encoder(images[:0]).shape == (0, encoder.num_features)


def test_grey_images_are_repeated_and_the_encoders_own_constants_are_used():
    encoder = TimmEncoder("test_vit", pretrained=False, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    grey = torch.rand(2, 1, 160, 160)
    expected = (grey.repeat(1, 3, 1, 1) - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.1, 0.2, 0.3]
    ).view(3, 1, 1)
    torch.testing.assert_close(encoder(grey), encoder.net(expected))


@pytest.mark.parametrize("norm", ["l2", "layer_norm"])
def test_features_are_normalised_by_record(norm):
    torch.manual_seed(0)
    plain = TorchvisionEncoder("resnet18", None, image_size=32)
    encoder = TorchvisionEncoder("resnet18", None, image_size=32, feature_norm=norm)
    encoder.load_state_dict(plain.state_dict())
    images = torch.rand(3, 3, 32, 32)
    function = F.normalize if norm == "l2" else partial(F.layer_norm, normalized_shape=(512,))
    torch.testing.assert_close(encoder(images), function(plain(images)))


class Small(Encoder):
    """A convolution, what is given, and pooling over all pixels."""

    def __init__(self, after, image_size):
        conv = nn.Conv2d(3, 8, 3, stride=2)
        generator = torch.Generator().manual_seed(0)
        for parameter in conv.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        net = nn.Sequential(conv, after, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(net, "Small", image_size, (0.0,) * 3, (1.0,) * 3, "none")


class BatchStatistics(nn.Module):
    """Batch norm that no list of modules shows."""

    def forward(self, images):
        return F.batch_norm(images, None, None, training=True)


class Neighbours(nn.Module):
    """A little of the mean image of the batch."""

    def forward(self, images):
        return images + 0.02 * images.mean(0)


@pytest.mark.parametrize("mixing", [BatchStatistics, Neighbours])
@pytest.mark.parametrize(
    "image_size", [16, 224]
)  # over 224 x 224 pixels, noise has nearly the same statistics anywhere
def test_an_encoder_that_mixes_records_is_refused(mixing, image_size):
    with pytest.raises(ConfigError, match="Small mixes the images of a batch"):
        Small(mixing(), image_size)
    assert Small(nn.Identity(), image_size).num_features == 8


@pytest.mark.parametrize("norm", [{"track_running_stats": False}, {"affine": False, "track_running_stats": False}])
def test_an_encoder_with_a_module_that_mixes_records_is_refused(norm):
    with pytest.raises(ConfigError, match=r"Small cannot encode record by record: 1: BatchNorm2d .* no statistics"):
        Small(nn.BatchNorm2d(8, **norm), 16)
    assert Small(nn.BatchNorm2d(8), 16).num_features == 8


def test_a_timm_file_is_loaded_whole_less_its_classifier(tmp_path):
    import timm

    source = timm.create_model("test_vit", num_classes=11)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    encoder = TimmEncoder("test_vit", weights_file=tmp_path / "weights.pt")
    images = torch.rand(2, 3, 160, 160)
    expected = source.eval().forward_head(source.forward_features((images - encoder.mean) / encoder.std), True)
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.title == "TimmEncoder test_vit, weights of weights.pt"
    state = source.state_dict()
    del state["blocks.0.attn.qkv.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.qkv\.weight") as caught:
        TimmEncoder("test_vit", weights_file=tmp_path / "part.pt")
    assert "\n" not in str(caught.value)


def test_a_torchvision_file_gives_the_penultimate_features(tmp_path):
    source = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    encoder = TorchvisionEncoder("resnet18", weights_file=tmp_path / "weights.pt", image_size=32)
    images = torch.rand(2, 3, 32, 32)
    logits = source.fc(encoder(images))
    torch.testing.assert_close(logits, source((images - encoder.mean) / encoder.std), rtol=1e-4, atol=1e-5)


def simclr_v2(state):
    """A torchvision ResNet's tensors under SimCLRv2's names."""
    block = {
        "conv1": "net.0", "bn1": "net.1.0", "conv2": "net.2", "bn2": "net.3.0", "conv3": "net.4", "bn3": "net.5.0",
        "downsample.0": "projection.shortcut", "downsample.1": "projection.bn.0",
    }  # fmt: skip
    renamed = {}
    for key, value in state.items():
        module, _, tensor = key.rpartition(".")
        if module.startswith("layer"):
            layer, index, place = module.split(".", 2)
            module = f"net.{layer[5:]}.blocks.{index}.{block[place]}"
        module = {"conv1": "net.0.0", "bn1": "net.0.1.0"}.get(module, module)
        renamed[f"{module}.{tensor}"] = value
    return renamed


@pytest.mark.parametrize("layout", ["bolts", "simclr_v2"])
def test_simclr_checkpoints_of_both_layouts(tmp_path, layout):
    torch.manual_seed(0)
    source = torchvision.models.resnet50().eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    if layout == "bolts":
        state = {f"encoder.{key}": value for key, value in source.state_dict().items()}
        state["projection.model.0.weight"] = torch.zeros(2048, 2048)
        checkpoint = {"state_dict": state, "epoch": 3, "hyper_parameters": argparse.Namespace(gpus=8)}
    else:
        checkpoint = {"resnet": simclr_v2(source.state_dict()), "head": {"layers.0.weight": torch.zeros(2, 2)}}
    torch.save(checkpoint, tmp_path / "simclr.ckpt")
    encoder = SimCLREncoder(tmp_path / "simclr.ckpt", image_size=32)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(source.fc(encoder(images)), source(images), rtol=1e-3, atol=1e-4)


def test_bolts_small_image_stem(tmp_path):
    source = torchvision.models.resnet18()
    source.conv1, source.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "c.ckpt")
    encoder = SimCLREncoder(tmp_path / "c.ckpt", "resnet18", image_size=32)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(source.eval().fc(encoder(images)), source(images), rtol=1e-3, atol=1e-4)


def test_files_of_another_layout_are_refused(tmp_path):
    torch.save({"state_dict": {"model.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    torch.save({"resnet": {"net.0.0.weight": torch.ones(128, 3, 7, 7)}}, tmp_path / "wide.ckpt")
    torch.save({"state_dict": {"encoder.conv1.weight": torch.ones(64, 3, 7, 7)}}, tmp_path / "part.ckpt")
    torch.save({"state_dict": DIGITS, "x": partial(print)}, tmp_path / "code.ckpt")
    words = {
        "other": "neither encoder.conv1.weight",
        "wide": "wider ResNet",
        "part": "is missing",
        "code": "holds more",
    }
    for name, message in words.items():
        with pytest.raises(ConfigError, match=message) as caught:
            SimCLREncoder(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TimmEncoder("vit_tiny_patch16_223"), "vit_tiny_patch16_224"),
        (lambda: TorchvisionEncoder("resnet19"), "resnet18"),
        (lambda: OpenClipEncoder("ViT-B-17", None), "ViT-B-16"),
        (lambda: TorchvisionEncoder("squeezenet1_1", None, image_size=8), "change image_size"),
        (lambda: TimmEncoder("test_vit", pretrained=False, arguments={"no_such": 1}), "no_such"),
        (lambda: EncoderClassifier(TorchvisionEncoder("resnet18", None, image_size=32), nn.Flatten()), "set mean and"),
        (lambda: EncoderClassifier(ScatterNet(8), nn.Flatten(), **DIGITS), "leave both out"),
    ],
)
def test_bad_settings_are_refused_in_one_line(build, words):
    with pytest.raises(ConfigError) as caught:
        build()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "module", "extra"), [(TimmEncoder, "timm", "timm"), (OpenClipEncoder, "open_clip", "clip")]
)
def test_a_missing_extra_is_named(monkeypatch, kind, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'lightning_dp\[{extra}\]'"):
        kind("resnet18", None)


def classifier():
    torch.manual_seed(0)
    encoder = TimmEncoder("test_efficientnet", pretrained=False, image_size=32)
    net = EncoderClassifier(encoder, LinearHead(encoder.num_features, 1, 10), **DIGITS)
    nn.init.normal_(net.head.linear.weight)
    return net


def test_the_engine_trains_the_head_alone_and_gives_the_references_sum():
    net = classifier().train()
    assert not net.encoder.training
    assert net.head.training
    assert validate(net) == []
    parameters = {name: value.detach() for name, value in net.named_parameters() if value.requires_grad}
    assert sorted(parameters) == ["head.linear.bias", "head.linear.weight"]

    def loss(parameters, views, label):
        return F.cross_entropy(functional_call(net, parameters, (views,)), label.expand(len(views)))

    records = (torch.randn(5, 3, 1, 8, 8), torch.arange(5))
    engine = OneBackward(loss)
    fast = engine.clipped_sum(records, parameters, max_norm=0.1, chunk=2)
    assert not engine.uses_reference
    gradient = torch.func.grad(loss)
    slow = clipped_sum(
        lambda views, label: gradient(parameters, views, label), records, parameters, max_norm=0.1, chunk=2
    )
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-6)
    calls = []
    net.encoder.net.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    engine.clipped_sum(records, parameters, max_norm=0.1, chunk=4)
    assert calls == [9, 6]  # all views of all records of a chunk in one call, none for the backward pass


def test_pixels_reach_the_encoder_as_they_were():
    net = classifier()
    seen = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = torch.rand(2, 1, 8, 8)
    net((pixels - DIGITS["mean"][0]) / DIGITS["std"][0])
    torch.testing.assert_close(seen[0], pixels)


def test_a_private_run_trains_the_head_and_wrong_constants_are_refused(tmp_path):
    net = classifier()
    before = {name: value.clone() for name, value in net.encoder.state_dict().items()}
    module = DPSGD(net, partial(torch.optim.SGD, lr=0.1), privacy=PRIVACY)
    fit(tmp_path, module, make_data(), max_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in net.encoder.state_dict().items())
    assert not module.engine.uses_reference
    wrong = EncoderClassifier(net.encoder, net.head, mean=(0.5,), std=(0.376,))
    with pytest.raises(ConfigError, match=r"undoes mean and std .* Digits has \(0\.305,\)"):
        fit(tmp_path, DPSGD(wrong, partial(torch.optim.SGD, lr=0.1), privacy=PRIVACY), make_data())


def test_a_data_module_hands_pixels_to_an_encoder_and_names_it(tmp_path):
    encoder = TorchvisionEncoder("resnet18", None, image_size=8)
    data, raw = make_data(encoder=encoder, cache=tmp_path), make_data()
    for each in (data, raw):
        each.setup("test")
    expected = encoder(raw.role("audit").images.float() / 255)
    torch.testing.assert_close(data.role("audit").images, expected, rtol=1e-4, atol=1e-5)
    assert data.describe()["encoder"] == "TorchvisionEncoder resnet18, random weights"

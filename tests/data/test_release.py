"""Releases: whole or not at all, readable, and enough to train on without the private data."""

import builtins
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_dp.cli import main
from lightning_dp.data import Digits, Published, ReleaseDataModule, load_release
from lightning_dp.errors import ConfigError
from lightning_dp.methods import PSG, NearestMean, NeuroMix, ReleaseClassifier
from lightning_dp.models import ConvNet, LinearHead
from lightning_dp.privacy import PrivacyConfig
from tests.methods.runs import make_data, make_trainer

ABOUT = {"kind": "features", "shape": None, "encoder": None, "groups": None, "max_length": 1.0}


def published(count=40, values=64, **about):
    generator = torch.Generator().manual_seed(0)
    return Published(
        torch.randn(count, values, generator=generator), torch.randn(count, 10, generator=generator), ABOUT | about
    )


def test_a_release_reads_back_as_it_was(tmp_path):
    made = published()
    path = made.save(tmp_path)
    for place in (path, tmp_path):
        found = load_release(place)
        assert torch.equal(found.inputs, made.inputs)
        assert torch.equal(found.targets, made.targets)
        assert found.about == made.about
    assert [file.name for file in tmp_path.iterdir()] == ["release.safetensors"]


def test_an_interrupted_write_leaves_the_old_release(tmp_path, monkeypatch):
    published().save(tmp_path)
    before = (tmp_path / "release.safetensors").read_bytes()

    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lightning_dp.data.release.save_file", torn)
    with pytest.raises(ConfigError, match="disk full"):
        published(count=3).save(tmp_path)
    assert (tmp_path / "release.safetensors").read_bytes() == before


def test_what_is_no_release_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_release(tmp_path)
    (tmp_path / "release.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_release(tmp_path)
    save_file({"inputs": torch.zeros(2, 3)}, tmp_path / "release.safetensors")
    with pytest.raises(ConfigError, match="is no release"):
        load_release(tmp_path)
    Published(torch.zeros(3, 2), torch.zeros(2, 10), ABOUT).save(tmp_path)
    with pytest.raises(ConfigError, match="make it again"):
        load_release(tmp_path)


def test_training_batches_are_the_release_and_test_records_are_made_as_its_records_were(tmp_path):
    made = published(shape=[1, 8, 8], max_length=0.5)
    made.save(tmp_path)
    data = ReleaseDataModule(tmp_path, Digits(), batch_size=10)
    data.setup()
    seen = torch.cat([inputs.flatten(1) for inputs, _ in data.train_dataloader()])
    assert torch.equal(seen.sort(0).values, made.inputs.sort(0).values)
    images, labels = next(iter(data.test_dataloader()[0]))
    assert images.shape[1:] == (1, 8, 8)
    assert images.flatten(1).norm(dim=1).max() <= 0.5 + 1e-6
    assert labels.dtype == torch.int64


def test_a_release_that_is_smaller_than_a_batch_is_one_batch(tmp_path):
    made = published(count=7)
    made.save(tmp_path)
    data = ReleaseDataModule(tmp_path, batch_size=256)
    data.setup()
    ((inputs, targets),) = data.train_dataloader()
    order = inputs[:, 0].argsort()
    expected = made.inputs[:, 0].argsort()
    assert torch.equal(inputs[order], made.inputs[expected])
    assert torch.equal(targets[order], made.targets[expected])


def test_another_encoder_than_the_releases_is_refused(tmp_path):
    published(encoder="ScatterNet").save(tmp_path)
    with pytest.raises(ConfigError, match="made with the encoder ScatterNet"):
        ReleaseDataModule(tmp_path, Digits()).setup()
    ReleaseDataModule(tmp_path).setup()  # without test images no encoder is needed


def mixtures():
    privacy = PrivacyConfig(num_examples=1240, expected_batch_size=1, steps=600, delta=1e-5, epsilon=20.0, max_norm=1.0)
    return NeuroMix(LinearHead(1, 8, 10, max_length=1.0), NearestMean(), open_classes=1, privacy=privacy)


def synthetic_images():
    privacy = PrivacyConfig(
        num_examples=1240, expected_batch_size=400, steps=40, delta=1e-5, epsilon=20.0, max_norm=0.1
    )
    settings = {"images_per_class": 1, "matched": ["head."], "releases_per_point": 1, "updates_per_release": 10}
    return PSG(
        ConvNet(1, 8, 10, width=16, depth=1),
        partial(torch.optim.SGD, lr=3.0, momentum=0.5),
        **settings,
        privacy=privacy,
    )


@pytest.mark.parametrize(
    ("make", "size", "batch", "least"), [(mixtures, (64, 1), 50, 0.8), (synthetic_images, (1, 8), 5, 0.5)]
)
def test_training_on_a_release_opens_no_private_file(tmp_path, monkeypatch, make, size, batch, least):
    """A private run, then a second fit in which the private side of the source cannot be read."""
    module = make()
    make_trainer(tmp_path, max_steps=module.privacy.steps).fit(module, datamodule=make_data(module.privacy))
    load, opened, original = Digits.load, [], builtins.open

    def test_side_only(self, root, train, download):
        assert not train, "the private side was asked for"
        return load(self, root, train, download)

    def watched(file, *args, **kwargs):
        opened.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(Digits, "load", test_side_only)
    monkeypatch.setattr(builtins, "open", watched)
    data = ReleaseDataModule(tmp_path / "release", Digits(), batch_size=batch)
    model = ReleaseClassifier(LinearHead(*size, 10), partial(torch.optim.Adam, lr=0.05))
    trainer = make_trainer(tmp_path / "second", max_steps=-1, max_epochs=15)
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"] > least
    assert not [name for name in opened if name.endswith(("splits.json", "ledger.jsonl")) or ".cache/features" in name]


def test_a_classifier_on_releases_takes_nothing_else(tmp_path):
    model = ReleaseClassifier(LinearHead(1, 8, 10), partial(torch.optim.Adam, lr=0.1))
    with pytest.raises(ConfigError, match="ReleaseDataModule"):
        make_trainer(tmp_path).fit(model, datamodule=make_data())


@pytest.mark.parametrize("config", ["linear.yaml", "convnet.yaml"])
def test_the_second_fit_by_command_line(tmp_path, monkeypatch, config):
    net = "--model.init_args.net.init_args"
    if config == "linear.yaml":
        published().save(tmp_path / "release")
        sizes = [f"{net}.in_channels=64"]
    else:
        images = published(kind="images")
        Published(images.inputs.view(-1, 1, 8, 8), images.targets, images.about).save(tmp_path / "release")
        sizes = [f"{net}.image_size=8", f"{net}.width=8"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    path = Path(__file__).parents[2] / "configs" / "release" / config
    given = ["--data.init_args.path=release", "--data.init_args.source=Digits"]
    given += [*sizes, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    main(["fit", "-c", str(path), *given, "--trainer.enable_progress_bar=false"])
    assert "test/accuracy" in json.loads((tmp_path / "runs" / "version_0" / "metrics.json").read_text())

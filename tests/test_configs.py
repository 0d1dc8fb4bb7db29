"""Every file in configs/ is run: parsed with the others, and fitted for two steps on data made here."""

import json
from pathlib import Path

import pytest
import torch

from lightning_dp.cli import main
from lightning_dp.data import CIFAR10, MNIST, USPS, Digits, FashionMNIST, Records

CONFIGS = Path(__file__).parents[1] / "configs"
DATA, METHODS = sorted(CONFIGS.glob("data/*.yaml")), sorted(CONFIGS.glob("method/*.yaml"))
VIEWS = [path for path in METHODS if "class_path: DPMix" in path.read_text()]  # as slow as they have views
PUBLIC = [CONFIGS / "experiments" / "usps_diffusion.yaml"]  # no private data, so neither a card nor an accuracy
EXPERIMENTS = [path for path in sorted(CONFIGS.glob("experiments/*.yaml")) if path not in PUBLIC]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    return tmp_path


def made(channels, size):
    """A source's load() over random records, the same at every call; 300 to train, 40 to test."""

    def load(self, root, train, download=False):
        generator = torch.Generator().manual_seed(int(train))
        count = 300 if train else 40
        images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
        return Records(images, torch.arange(count) % 10)

    return load


def files(*paths):
    return [word for path in paths for word in ("-c", str(path))]


SMALL = [
    "--privacy.num_examples=190",
    "--privacy.expected_batch_size=8",
    "--privacy.steps=2",
    "--privacy.noise_multiplier=1",
    "--data.init_args.audit=10",
    "--model.init_args.physical_batch_size=8",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.parametrize("method", [path for path in METHODS if path not in VIEWS], ids=lambda path: path.stem)
@pytest.mark.parametrize("data", ["digits", "mnist", "fashion_mnist", "cifar10"])
def test_every_method_fits_and_tests_on_every_shape_of_data(here, monkeypatch, method, data):
    for source, shape in ((Digits, (1, 8)), (MNIST, (1, 28)), (FashionMNIST, (1, 28)), (CIFAR10, (3, 32))):
        monkeypatch.setattr(source, "load", made(*shape))
    paths = (CONFIGS / "base.yaml", CONFIGS / "data" / f"{data}.yaml", method, CONFIGS / "privacy" / "eps3.yaml")
    main(["fit", *files(*paths), *SMALL])
    assert (here / "runs" / "version_0" / "checkpoints" / "last.ckpt").is_file()


SYNTHETIC = "--data.init_args.synthetic={class_path: tests.data.made.Generated, init_args: {size: %d, channels: %d}}"


@pytest.mark.parametrize("method", VIEWS, ids=lambda path: path.stem)
def test_every_method_of_views_fits_and_tests(here, monkeypatch, method):
    monkeypatch.setattr(Digits, "load", made(1, 8))
    paths = (CONFIGS / "base.yaml", CONFIGS / "data" / "digits.yaml", method, CONFIGS / "privacy" / "eps3.yaml")
    needs = "Needs data.synthetic" in method.read_text()
    main(["fit", *files(*paths), *SMALL, *([SYNTHETIC % (8, 1)] if needs else [])])
    assert (here / "runs" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_views_of_photographs(here, monkeypatch):
    monkeypatch.setattr(CIFAR10, "load", made(3, 32))
    paths = ("base.yaml", "data/cifar10.yaml", "method/dp_mix_diff.yaml", "augment/crop_flip.yaml", "privacy/eps8.yaml")
    few = [
        "--model.init_args.net=CIFARTanhCNN",
        "--model.init_args.k_base=2",
        "--model.init_args.k_self=1",
        "--model.init_args.k_diff=1",
    ]
    callbacks = ["--trainer.callbacks+=WeightEMA", "--trainer.callbacks+=Pictures"]
    main(["fit", *files(*(CONFIGS / path for path in paths)), *SMALL, SYNTHETIC % (32, 3), *few, *callbacks])
    card = (here / "runs" / "version_0" / "privacy_card.json").read_text()
    assert "test_ema/accuracy" in card
    assert "Generated" in card
    assert "CropFlip" in (here / "runs" / "version_0" / "config.yaml").read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_fits(here, monkeypatch, experiment):
    for source, shape in ((Digits, (1, 8)), (MNIST, (1, 28)), (FashionMNIST, (1, 28)), (CIFAR10, (3, 32))):
        monkeypatch.setattr(source, "load", made(*shape))
    main(["fit", *files(CONFIGS / "base.yaml", experiment), *SMALL])
    assert (here / "runs" / "version_0" / "privacy_card.json").is_file()


def test_the_diffusion_model_fits_and_fills_its_pool(here, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(USPS, "load", made(1, 28))
    few = ["--model.widths=[16]", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    main(["fit", *files(CONFIGS / "base.yaml", *PUBLIC), *few, *SMALL[-3:]])
    assert not list(here.glob("runs/**/privacy_card*"))
    pool = CONFIGS / "generate" / "usps.yaml"
    main(["generate", f"--config={pool}", "--per_class=1", "--generator.steps=1", "--device=cpu"])
    assert len(list((here / "data" / "usps_pool").glob("*.png"))) == 10


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("generate/*.yaml")), ids=lambda path: path.stem)
def test_every_pool_parses(here, capsys, path):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", f"--config={path}", "--print_config"])
    assert stopped.value.code == 0
    assert "generator" in capsys.readouterr().out


@pytest.mark.parametrize("hardware", [None, *sorted(CONFIGS.glob("hardware/*.yaml"))], ids=str)
@pytest.mark.parametrize("data", DATA, ids=lambda path: path.stem)
def test_every_combination_parses(here, capsys, data, hardware):
    budget = CONFIGS / "privacy" / "eps8.yaml"
    paths = [CONFIGS / "base.yaml", data, CONFIGS / "method" / "dp_sgd.yaml", budget]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *files(*paths, *([hardware] if hardware else [])), "--print_config"])
    assert stopped.value.code == 0
    assert "DPDataModule" in capsys.readouterr().out


@pytest.mark.parametrize("encoder", sorted(CONFIGS.glob("encoder/*.yaml")), ids=lambda path: path.stem)
def test_every_encoder_parses(here, capsys, encoder):
    parts = (CONFIGS / "data" / "cifar10.yaml", encoder, CONFIGS / "method" / "dp_sgd.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *files(CONFIGS / "base.yaml", *parts, CONFIGS / "privacy" / "eps3.yaml"), "--print_config"])
    assert stopped.value.code == 0
    assert "Encoder" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_file_opens_with_what_it_is(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_names_its_command_and_its_result(path):
    head = path.read_text().split("data:")[0]
    assert f"lightning-dp fit -c configs/base.yaml -c configs/experiments/{path.name}" in head
    assert "test accuracy" in head


@pytest.mark.parametrize("audit", sorted(CONFIGS.glob("audit/*.yaml")), ids=lambda path: path.stem)
def test_every_audit_ends_with_a_verdict(here, monkeypatch, audit):
    monkeypatch.setattr(MNIST, "load", made(1, 28))
    parts = ("base.yaml", "data/mnist.yaml", "method/dp_sgd.yaml", "privacy/eps3.yaml")
    few = ["--data.init_args.canaries=40", "--data.init_args.audit=80", "--privacy.num_examples=160"]
    inside = ["--model.init_args.net.init_args.canaries=40"] if audit.stem == "dirac" else []
    small = [word for word in SMALL if "num_examples" not in word and "audit" not in word]
    main(["audit", *files(*(CONFIGS / part for part in parts), audit), *small, *few, *inside])
    found = json.loads((here / "runs" / "version_0" / "privacy_card.json").read_text())["evidence"]["audit"]
    assert found["verdict"] in ("PASS", "UNDERPOWERED")


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("method", ["psg", "dp_sgd"])
def test_every_continual_run_reports_its_tasks(here, monkeypatch, data, method):
    for source in (MNIST, FashionMNIST):
        monkeypatch.setattr(source, "load", made(1, 28))
    of = "method/release/psg.yaml" if method == "psg" else "method/dp_sgd.yaml"
    parts = ("base.yaml", f"data/{data}.yaml", of, "privacy/eps8.yaml", f"continual/{method}.yaml")
    quick = [
        "--model.init_args.training.epochs=1",
        "--model.init_args.updates_per_release=1",
        "--trainer.callbacks=[{class_path: TaskAccuracy, init_args: {training: {epochs: 1}}}]",
    ]
    small = [word for word in SMALL if "steps" not in word]
    main(
        [
            "fit",
            *files(*(CONFIGS / part for part in parts)),
            *small,
            "--privacy.steps=5",
            *quick[: 3 * (method == "psg")],
        ]
    )
    (found,) = here.glob("runs/version_0/tasks.json")
    assert len(json.loads(found.read_text())["accuracy"]) == 5

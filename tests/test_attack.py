"""`lightning-dp attack`: reference models are trained as the run was, and what they find goes to a private place."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from lightning_dp import attack as verb
from lightning_dp import references
from lightning_dp.attack import attack
from lightning_dp.cli import main
from lightning_dp.data import Shift
from lightning_dp.errors import ConfigError

RUN = """
seed_everything: 0
data:
  class_path: DPDataModule
  init_args: {{source: Digits, audit: {audit}, public_per_class: 2}}
model:
  class_path: {method}
  init_args:
    net: {net}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: {lr}, momentum: 0.9}}}}
privacy: {{num_examples: {n}, expected_batch_size: {batch}, steps: {steps}, {noise}, delta: 1.0e-5, seed: 3}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {{class_path: CSVLogger, init_args: {{save_dir: ., name: run}}}}
  callbacks: [{{class_path: PrivacyCard}}, {{class_path: ModelCheckpoint, init_args: {{save_last: true}}}}]
"""
HEAD = "{class_path: LinearHead, init_args: {in_channels: 1, size: 8, num_classes: 10}}"
MLP = "{class_path: lightning_dp.models.MLP, init_args: {in_channels: 1, image_size: 8, num_classes: 10}}"
CONTROL = {"method": "SGD", "net": HEAD, "n": 120, "audit": 1297, "batch": 120, "steps": 800, "lr": 0.5}
PRIVATE = {"method": "DPSGD", "net": HEAD, "n": 700, "audit": 720, "batch": 350, "steps": 20, "lr": 0.5}


def trained(folder, monkeypatch, noise="noise_multiplier: 0.0", **settings):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    (folder / "run.yaml").write_text(RUN.format(noise=noise, **settings))
    main(["fit", "-c", "run.yaml"])
    return folder / "run" / "version_0"


def test_an_overfitted_control_is_found_out_best_by_references_and_stays_private(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path, monkeypatch, "epsilon: 8.0", **CONTROL)
    attack(run, references=64)
    found = json.loads((run / "private" / "attack.json").read_text())
    assert "not for release" in found["outside_the_guarantee"]
    lira = found["attacks"]["lira_online"]
    assert lira["auc"] > found["attacks"]["loss"]["auc"] > 0.5
    assert lira["auc"] > 0.65
    assert abs(lira["control_auc"] - 0.5) < 4 * lira["auc_error"]
    assert found["caps"] is None
    assert lira["tpr_at_fpr_0.01"] is None  # too few non-members
    scores = np.load(run / "private" / "attack.npz")
    assert scores["members"].sum() == found["members"]
    assert "lira_online" in capsys.readouterr().out


def test_a_private_run_stays_within_the_caps_of_its_ledger(tmp_path, monkeypatch):
    run = trained(tmp_path, monkeypatch, "epsilon: 1.0, max_norm: 0.5", **PRIVATE)
    attack(run, references=16)
    found = json.loads((run / "private" / "attack.json").read_text())
    card = json.loads((run / "privacy_card.json").read_text())
    assert 0.5 < found["caps"]["auc"] < 0.75
    assert card["epsilon"] <= 1
    for name, figures in found["attacks"].items():
        assert figures["auc"] - 4 * figures["auc_error"] < found["caps"]["auc"], name


@pytest.mark.parametrize("settings", [PRIVATE | {"batch": 700}, CONTROL | {"steps": 30}], ids=["DPSGD", "SGD"])
def test_many_heads_at_once_are_what_the_run_would_train(tmp_path, monkeypatch, settings):
    """On all of the run's own records, full batch and without noise."""
    run = trained(tmp_path, monkeypatch, "noise_multiplier: 0.0, max_norm: 0.2", **settings)
    config, data, model = verb._open(run)
    game = references.deal(data, 3, 50, 0)
    everyone = np.zeros_like(game.halves)
    everyone[1, : data.roles()["private"]] = True
    config["privacy"]["expected_batch_size"] = settings["batch"]
    everyone[0] = everyone[1]
    game = references.Game(game.pool, everyone, game.asked, game.member, game.rows)
    heads = references.many_heads(run, config, data, model, model.net, game, 0)
    torch.testing.assert_close(heads[1].linear.weight, model.net.linear.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(heads[1].linear.bias, model.net.linear.bias, rtol=1e-3, atol=1e-5)
    assert not heads[2].linear.weight.any()  # nobody is in its half


def test_halves_hold_each_record_in_half_of_the_models_and_copies_in_all(tmp_path, monkeypatch):
    run = trained(tmp_path, monkeypatch, **PRIVATE)
    _, data, _ = verb._open(run)
    game = references.deal(data, 10, 200, 0)
    assert (game.inside.sum(0) == 5).all()
    assert (game.member == (game.asked < data.roles()["private"])).all()
    assert len(np.unique(game.asked)) == len(game.asked) == 400
    original = references.content_hashes
    monkeypatch.setattr(references, "content_hashes", lambda images: np.r_[original(images)[:-1], original(images)[:1]])
    copied = references.deal(data, 10, 10_000, 0)
    last = len(copied.pool) - 1
    assert not np.isin([0, last], copied.asked).any()
    assert copied.halves[:, [0, last]].all()


def test_other_networks_are_trained_by_fits_of_their_own_on_their_halves(tmp_path, monkeypatch):
    run = trained(tmp_path, monkeypatch, **PRIVATE | {"net": MLP})
    config, data, model = verb._open(run)
    game = references.deal(data, 4, 100, 0)
    calls = []

    def remember(words, **_):
        calls.append(words)
        place = Path(next(w for w in words if "save_dir" in w).split("=")[1])
        (place / "version_0" / "checkpoints").mkdir(parents=True)
        (place / "version_0" / "checkpoints" / "last.ckpt").write_bytes((run / "checkpoints/last.ckpt").read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", remember)
    nets = references.fits(run, config, model, game, tmp_path / "out", 0)
    images = data.normalize(data.role("test").images)
    torch.testing.assert_close(nets[0](images), model.net(images))
    assert len(calls) == 4
    for number, words in enumerate(calls):
        split = json.loads((tmp_path / "out" / "references" / f"0-{number}" / "splits.json").read_text())["indices"]
        assert set(split["private"]) == set(game.rows[game.halves[number]])
        everyone = np.sort(np.concatenate(list(split.values())))
        assert np.array_equal(everyone, np.arange(len(everyone)))
        assert f"--privacy.num_examples={len(split['private'])}" in words
        assert "--privacy.noise_multiplier=0.0" in words
    references.fits(run, config, model, game, tmp_path / "out", 0)
    assert len(calls) == 4  # those that are there are not made again
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="error: no room"))
    with pytest.raises(ConfigError, match="no room"):
        references.fits(run, config, model, game, tmp_path / "other", 0)


@pytest.mark.slow
def test_references_of_a_network_by_real_fits(tmp_path, monkeypatch):
    run = trained(tmp_path, monkeypatch, "epsilon: 8.0", **CONTROL | {"net": MLP, "steps": 200, "lr": 0.1})
    attack(run, references=8, queries=2, augment=Shift(1))
    found = json.loads((run / "private" / "attack.json").read_text())
    assert found["attacks"]["lira_online"]["auc"] > 0.55
    assert len(list((run / "private" / "references").glob("*/*/checkpoints/last.ckpt"))) == 8


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"config\.yaml is missing"):
        attack(tmp_path)
    with pytest.raises(ConfigError, match="--queries"):
        attack(tmp_path, queries=2)
    run = trained(tmp_path, monkeypatch, **PRIVATE)
    (run / "privacy_card.json").unlink()
    with pytest.raises(ConfigError, match="ended with its card"):
        attack(run, references=4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["class_path"].endswith("DPDataModule")

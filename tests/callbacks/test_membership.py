"""Membership inference: figures with intervals and a control, in a private place, and an unchanged run."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F

from lightning_dp.callbacks import MembershipInference, PrivacyCard
from lightning_dp.callbacks.membership import membership_scores
from lightning_dp.data import DPDataModule
from lightning_dp.errors import ConfigError
from lightning_dp.methods import SGD
from lightning_dp.models import MLP
from lightning_dp.privacy import PrivacyConfig
from lightning_dp.privacy.auditing import roc
from tests.data.made import Made, records
from tests.methods.runs import PRIVACY, fit, make_data, make_module, weights
from tests.methods.test_ddp import run_two

WATCH = {"records": 200, "fprs": (0.1, 0.01)}


def report(folder):
    return json.loads((folder / "private" / "membership.json").read_text())


def test_figures_intervals_control_and_caps_are_written_apart(tmp_path):
    logger = CSVLogger(tmp_path, name=None, version="v")
    callbacks = [MembershipInference(every_n_steps=4, **WATCH), PrivacyCard()]
    module = fit(tmp_path, data=make_data(audit=100), callbacks=callbacks, logger=logger)
    found = report(tmp_path / "v")
    assert (found["members"], found["non_members"]) == (200, 100)
    assert "accountant pld" in found["guarantee"]
    arrays = np.load(tmp_path / "v" / "private" / "membership.npz")
    for name in ("loss", "margin", "entropy", "modified_entropy"):
        attack = found["attacks"][name]
        exact = roc(arrays[f"{name}_members"], arrays[f"{name}_non_members"])
        assert attack["auc"] == pytest.approx(exact.auc)
        assert attack["auc_error"] > 0
        assert attack["tpr_at_fpr_0.1"]["low"] <= attack["tpr_at_fpr_0.1"]["value"] <= attack["tpr_at_fpr_0.1"]["high"]
        assert attack["tpr_at_fpr_0.01"] == "too few non-members for this rate"
        assert abs(attack["blind_auc"] - 0.5) < 4 * exact.auc_error  # weights that saw nobody
        assert attack["auc_minus_blind"] == pytest.approx(attack["auc"] - attack["blind_auc"])
    assert 0.5 < found["caps"]["auc"] < 1
    for picture in ("roc", "scores", "auc_over_epsilon"):
        assert (tmp_path / "v" / "private" / f"{picture}.png").is_file()
    assert not [name for name in module.trainer.callback_metrics if "mia" in name]
    assert not (tmp_path / "v" / "metrics.csv").exists()
    card = json.loads((tmp_path / "v" / "privacy_card.json").read_text())
    assert any("membership inference on 200 private records" in line for line in card["outside_the_guarantee"])


def test_the_run_is_as_it_was(tmp_path):
    before = torch.get_rng_state()
    watched = fit(tmp_path / "a", callbacks=[MembershipInference(every_n_steps=3, **WATCH)])
    torch.set_rng_state(before)
    plain = fit(tmp_path / "b")
    assert torch.equal(weights(watched), weights(plain))


def test_what_overfits_is_found_out_and_the_control_is_not(tmp_path):
    privacy = PrivacyConfig(200, 200, 100, 1e-5, noise_multiplier=0.0, max_norm=float("inf"))
    data = DPDataModule(Made(records(400), records(50, seed=1)), privacy=privacy, audit=200)  # labels mean nothing
    torch.manual_seed(0)
    module = make_module(privacy, net=MLP(1, 4, 2), method=SGD, optimizer=partial(torch.optim.Adam, lr=0.01))
    fit(tmp_path, module, data, max_steps=100, callbacks=[MembershipInference()])
    found = report(tmp_path)
    assert found["caps"] is None
    assert found["attacks"]["loss"]["auc"] > 0.75  # half of the others are confidently right
    assert abs(found["attacks"]["loss"]["blind_auc"] - 0.5) < 0.12


def test_scores_are_exact_where_probabilities_round_to_one():
    logits = torch.tensor([[60.0, 0.0, 1.0], [2.0, 1.0, 0.0]]).double()
    labels = torch.tensor([0, 1])
    found = membership_scores(logits, labels)
    odds = torch.from_numpy(found["loss"])
    torch.testing.assert_close(F.logsigmoid(odds), -F.cross_entropy(logits, labels, reduction="none"))
    further = membership_scores(logits + torch.tensor([5.0, 0.0, 0.0]), labels)
    assert further["loss"][0] == pytest.approx(found["loss"][0] + 5)  # their losses are both 0 in float64
    assert found["margin"].tolist() == [59.0, -1.0]
    p = logits[1].softmax(0)
    own, rest = p[1], p[[0, 2]]
    expected = (1 - own) * own.log() + (rest * (1 - rest).log()).sum()
    assert found["modified_entropy"][1] == pytest.approx(float(expected))
    assert np.isfinite(found["modified_entropy"]).all()


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="at least 2"):
        MembershipInference(records=1)
    privacy = replace(PRIVACY, num_examples=1340)
    with pytest.raises(ConfigError, match=r"set data\.audit"):
        fit(tmp_path, make_module(privacy), make_data(privacy, audit=0), callbacks=[MembershipInference()])


@pytest.mark.ddp
def test_two_processes_write_one_report(tmp_path):
    run_two(
        tmp_path,
        script="""
import sys
from pathlib import Path
from lightning_dp.callbacks import MembershipInference
from tests.data.made import Made, records
from tests.methods.runs import make_data, make_module, make_trainer
trainer = make_trainer(Path(sys.argv[1]), strategy="ddp", devices=2, callbacks=[MembershipInference(every_n_steps=5)])
trainer.fit(make_module(), datamodule=make_data())
""",
    )
    assert report(tmp_path)["non_members"] == 100

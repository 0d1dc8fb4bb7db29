"""One-run audit: right runs are not failed, broken ones are, and what cannot be told is said."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dp.callbacks import CanaryAudit, Conformance, PrivacyCard
from lightning_dp.callbacks.audit import sentence
from lightning_dp.cli import main
from lightning_dp.data import CanaryDataModule, Digits
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, SGD
from lightning_dp.models import MLP, DiracCanaries, LinearHead
from lightning_dp.models.canary import canary_codes
from lightning_dp.privacy import Mechanism, PoissonBatchSampler, PrivacyConfig, noise
from lightning_dp.privacy.auditing import TradeOff, gaussian_mu, judge
from tests.methods.runs import fit, make_module

CANARIES = 200
PRIVACY = PrivacyConfig(1440, 60, 40, 1e-5, noise_multiplier=1.0, seed=7)


def make_data(privacy=PRIVACY, **settings):
    settings = {"canaries": CANARIES, "kind": "random", "audit": 100, "public_per_class": 10, **settings}
    return CanaryDataModule(source=Digits(), privacy=privacy, **settings)


def dirac(privacy=PRIVACY, method=DPSGD):
    return make_module(privacy, DiracCanaries(LinearHead(1, 8, 10), CANARIES), method)


def audited(folder, module=None, data=None, conformance=True, **settings):
    privacy = PRIVACY if module is None else module.privacy
    callbacks = [CanaryAudit(**settings), *([Conformance(None)] if conformance else [])]
    fit(folder, module or make_module(), data or make_data(privacy), max_steps=privacy.steps, callbacks=callbacks)
    return json.loads((folder / "audit.json").read_text())


def test_public_numbers_do_not_depend_on_the_coins_and_those_who_are_out_are_not_seen():
    seen, data = set(), make_data()
    data.setup()
    loader = data.train_dataloader()
    sampler = loader.batch_sampler
    assert isinstance(sampler, PoissonBatchSampler)
    assert sampler.num_records == len(data.role("private")) == data.roles()["private"]
    assert sampler.sample_rate == PRIVACY.sample_rate
    drawn = []
    sampler.observers.append(drawn.append)
    sampler.steps_per_epoch = 400
    for batch in sampler:
        seen |= set(batch)
    first = sampler.num_records - CANARIES
    assert {place - first for place in seen if place >= first} == set(np.flatnonzero(data.inside))
    assert set(range(first)) <= seen
    # the draw itself knows nothing of the coins
    counts = np.bincount(np.concatenate(drawn), minlength=sampler.num_records)[first:]
    assert abs(counts[data.inside].mean() - counts[~data.inside].mean()) < 2.5
    assert 60 < data.inside.sum() < 140


def test_coins_are_fresh_unless_seeded_and_canaries_are_fixed():
    first, again, free = make_data(), make_data(), make_data(replace(PRIVACY, seed=None))
    for data in (first, again, free):
        data.setup()
    assert np.array_equal(first.inside, again.inside)
    assert not np.array_equal(first.inside, free.inside)
    assert torch.equal(first.canaries.images, free.canaries.images)


def test_mislabelled_canaries_leave_the_audit_role_with_wrong_labels():
    privacy = replace(PRIVACY, num_examples=1240)
    whole = make_data(privacy, kind="random", audit=300)
    whole.setup()
    data = make_data(privacy, kind="mislabelled", audit=300)
    data.setup()
    assert data.roles()["audit"] == 100
    before, rest = whole.role("audit"), data.role("audit")
    assert torch.equal(data.canaries.images, before.images[:CANARIES])
    assert torch.equal(rest.images, before.images[CANARIES:])
    assert (data.canaries.labels != before.labels[:CANARIES]).all()


@pytest.mark.parametrize("kind", ["mislabelled", "random"])
def test_a_right_run_is_not_failed(tmp_path, kind):
    privacy, audit = (replace(PRIVACY, num_examples=1240), 300) if kind == "mislabelled" else (PRIVACY, 100)
    found = audited(tmp_path, make_module(privacy), make_data(privacy, kind=kind, audit=audit))
    assert found["verdict"] in ("PASS", "UNDERPOWERED")
    assert found["p_value"] > 0.01
    assert found["canaries"] == CANARIES
    assert found["guesses"] == 20
    assert "accountant pld" in found["claim"]


def test_no_noise_fails_a_claim_of_one(tmp_path):
    privacy = PrivacyConfig(1740, 1740, 150, 1e-5, noise_multiplier=0.0, max_norm=float("inf"), seed=7)
    torch.manual_seed(0)
    module = make_module(privacy, MLP(1, 8, 10), SGD, optimizer=partial(torch.optim.Adam, lr=0.01))
    data = make_data(privacy, canaries=500, audit=100)
    settings = {"conformance": False, "claimed_epsilon": 1.0, "guesses": 0.4}
    found = audited(tmp_path, module, data, **settings)
    assert found["auc"] > 0.95
    assert found["verdict"] == "FAIL"
    assert found["epsilon_lower"] > 1.5


def test_noise_that_is_left_out_is_found_in_every_step_and_by_the_guesses(tmp_path, monkeypatch):
    right = audited(tmp_path / "right", dirac(), make_data(kind="dirac"), conformance=False, score="white_box")
    assert right["verdict"] != "FAIL"
    assert right["steps"]["mu_lower"] < 1.0
    assert right["steps"]["mu_lower"] > 0.6  # not far below what the noise multiplier allows
    drawn = noise.gaussian
    monkeypatch.setattr(noise, "gaussian", lambda size, std, generator: drawn(size, 0.5 * std, generator))
    halved = audited(tmp_path / "halved", dirac(), make_data(kind="dirac"), conformance=False, score="white_box")
    assert halved["steps"]["verdict"] == halved["verdict"] == "FAIL"
    monkeypatch.setattr(noise, "gaussian", lambda size, std, generator: drawn(size, 1e-3 * std, generator))
    none = audited(
        tmp_path / "none", dirac(), make_data(kind="dirac"), conformance=False, score="white_box", guesses=0.5
    )
    assert none["p_value"] < 0.02 < right["p_value"]


def test_white_box_scores_are_products_with_each_canarys_gradient(tmp_path, monkeypatch):
    """On a linear head the gradient is known in closed form."""
    module, data = make_module(PRIVACY), make_data()
    sums, expected, original = [], np.zeros(CANARIES), Mechanism.release

    def release(self, total, *args, **kwargs):
        before = {name: value.clone() for name, value in module.template().items()}
        mean = original(self, total, *args, **kwargs)
        sums.append((before, {name: 60 * value for name, value in mean.items()}))
        return mean

    monkeypatch.setattr(Mechanism, "release", release)
    watch = CanaryAudit(score="white_box")
    fit(tmp_path, module, data, max_steps=3, callbacks=[watch])
    images, labels = data.normalize(data.canaries.images).flatten(1), data.canaries.labels
    for before, total in sums:
        weight, bias = (before[name] for name in before)
        error = (images @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels, 10)
        names = list(total)
        expected += ((error @ total[names[0]]) * images).sum(1).double().numpy()
        expected += (error @ total[names[1]]).double().numpy()
    np.testing.assert_allclose(watch._sums, expected, rtol=1e-3, atol=1e-3)


def test_a_dirac_canary_moves_its_own_weight_by_the_clip_norm_and_changes_no_logit(tmp_path, monkeypatch):
    codes = canary_codes(3, (1, 8, 8), images=True)
    net = DiracCanaries(LinearHead(1, 8, 10), 3)
    images = torch.rand(50, 1, 8, 8)
    with torch.no_grad():
        net.canaries.fill_(3.0)
        assert torch.equal(net(images), net.net(images))
    assert not net._which(images).any()
    for mean, std in ((0.3, 0.2), (0.0, 1.0)):
        assert torch.equal(net._which((codes / 255 - mean) / std).argmax(1), torch.arange(3))
    totals, original = [], DPSGD.clipped_sum

    def clipped_sum(self, records):
        found = original(self, records)
        totals.append((found["canaries"].clone(), records[0]))
        return found

    monkeypatch.setattr(DPSGD, "clipped_sum", clipped_sum)
    data = make_data(kind="dirac")
    fit(tmp_path, dirac(), data, max_steps=4)
    for own, batch in totals:
        there = (batch[:, None] == data.canaries.images).flatten(2).all(2).any(0)
        torch.testing.assert_close(own, there.float(), rtol=0, atol=1e-2)
        assert own.max() <= 1 + 1e-6


def test_too_few_guesses_to_refute_are_called_so():
    draw, claim = np.random.default_rng(0), TradeOff.of_budget(8.0, 1e-5)
    inside = draw.random(100) < 0.5
    perfect = inside + draw.random(100) * 0.1
    assert judge(perfect, inside, 10, claim, 1e-5, 1e-3).verdict == "UNDERPOWERED"
    weak = TradeOff.of_budget(0.5, 1e-5)
    assert judge(perfect, inside, 40, weak, 1e-5, 1e-3).verdict == "FAIL"
    assert judge(draw.random(100), inside, 40, weak, 1e-5, 1e-3).verdict == "PASS"


def test_a_mu_from_counts_is_below_the_truth_and_near_it():
    draw = np.random.default_rng(0)
    inside, outside = draw.normal(0.8, 1, 20_000), draw.normal(0, 1, 20_000)
    found = gaussian_mu(int((inside < 0.4).sum()), 20_000, int((outside > 0.4).sum()), 20_000, 1e-3)
    assert 0.7 < found < 0.8


def test_a_killed_run_keeps_its_coins_and_scores(tmp_path):
    def run(folder, steps, ckpt=None):
        watch = CanaryAudit(score="white_box")
        keep = ModelCheckpoint(folder, filename="kept", every_n_train_steps=20)
        data, module = make_data(kind="dirac"), dirac()
        fit(folder, module, data, ckpt, max_steps=steps, callbacks=[watch, keep], enable_checkpointing=True)
        return watch, data

    whole, data = run(tmp_path / "whole", 40)
    run(tmp_path / "parts", 20)
    (tmp_path / "parts" / "audit.json").unlink()
    resumed, again = run(tmp_path / "parts", 40, tmp_path / "parts" / "kept.ckpt")
    assert np.array_equal(data.inside, again.inside)
    assert resumed._before == whole._before
    assert resumed._steps.inside + resumed._steps.outside == 40 * CANARIES
    np.testing.assert_allclose(resumed._sums, whole._sums, rtol=1e-4, atol=1e-4)


def test_the_verdict_is_on_the_card_and_in_a_sentence(tmp_path):
    watch = CanaryAudit()
    fit(tmp_path, make_module(PRIVACY), make_data(), max_steps=40, callbacks=[watch, PrivacyCard()])
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    assert card["evidence"]["audit"]["verdict"] == watch.result["verdict"]
    assert "guesses on 200 random canaries were right" in sentence(watch.result)


def test_the_verb_fails_when_the_claim_is_refuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    (tmp_path / "run.yaml").write_text(
        """
seed_everything: 0
data:
  class_path: CanaryDataModule
  init_args: {source: Digits, canaries: 200, kind: random, audit: 100, public_per_class: 10}
model:
  class_path: DPSGD
  init_args:
    net: {class_path: LinearHead, init_args: {in_channels: 1, size: 8, num_classes: 10}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0}}
privacy: {num_examples: 1440, expected_batch_size: 60, steps: 10, noise_multiplier: 1.0, delta: 1.0e-5, seed: 3}
trainer: {accelerator: cpu, enable_progress_bar: false, logger: false, enable_checkpointing: false}
"""
    )
    watch = ["--trainer.callbacks", "CanaryAudit"]
    main(["audit", "-c", "run.yaml", *watch])
    monkeypatch.setattr("lightning_dp.callbacks.audit.CanaryAudit._log_odds", lambda self, module: _told(self, module))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["audit", "-c", "run.yaml", *watch, "--trainer.callbacks.claimed_epsilon", "0.1"])
    assert stop.value.code == 1
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="nothing was audited"):
        main(["audit", "-c", "run.yaml"])


def _told(watch, module):
    """Scores of an attacker who was told the coins, once training has begun."""
    return watch._data.inside.astype(float) if module.mechanism.ledger else np.zeros(CANARIES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"canaries": 5}, "at least 10"),
        ({"kind": "mislabelled"}, r"raise data\.audit"),
    ],
)
def test_data_that_cannot_be_had_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_data(**settings)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="guesses"):
        CanaryAudit(guesses=0)
    silent = replace(PRIVACY, noise_multiplier=0.0)
    with pytest.raises(ConfigError, match="no guarantee to audit"):
        audited(tmp_path, make_module(silent), make_data(silent), conformance=False)
    with pytest.raises(ConfigError, match="65536"):
        canary_codes(70_000, (1, 8, 8), images=True)

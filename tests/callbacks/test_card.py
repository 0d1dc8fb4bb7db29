import dataclasses
import html
import json
import math
import re

import pytest
from pytorch_lightning.callbacks import Callback

from lightning_dp.callbacks import Conformance, PrivacyCard
from lightning_dp.callbacks.card import headline, plain, to_markdown
from lightning_dp.callbacks.meaning import group_size, meaning
from lightning_dp.methods import SGD
from lightning_dp.privacy.accounting import Release, epsilon
from lightning_dp.privacy.auditing import TradeOff
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module, make_trainer

KEYS = {
    "method", "epsilon", "delta", "adjacency", "unit", "accountant", "epsilon_second_opinion", "second_accountant",
    "epsilon_target", "noise_multiplier", "max_norm", "sample_rate", "expected_batch_size", "num_examples", "steps",
    "releases", "rng", "claims", "metrics",
}  # fmt: skip


def read(folder):
    return json.loads((folder / "privacy_card.json").read_text()), (folder / "privacy_card.md").read_text()


def test_the_card_is_the_ledger(tmp_path):
    module = fit(tmp_path, callbacks=[PrivacyCard()])
    card, text = read(tmp_path)
    assert set(card) >= KEYS
    assert card["releases"] == [[1.0, 60 / 1240, STEPS]]
    assert card["epsilon"] == pytest.approx(epsilon([Release(1.0, 60 / 1240, STEPS)], 1e-5))
    assert 0 <= card["epsilon_second_opinion"] - card["epsilon"] <= 0.02
    assert (card["second_accountant"], card["accountant"], card["method"]) == ("prv", "pld", "DPSGD")
    assert "NOT FOR RELEASE" in card["rng"]
    for word in ("1e-05", "adding or removing one image", "accountant pld", f"{card['epsilon']:.4g}"):
        assert word in text
    assert text == to_markdown(card)
    assert module.mechanism.randomness.key.hex() not in text


def test_test_metrics_reach_the_card(tmp_path):
    module, data = make_module(), make_data(validation="public")
    trainer = make_trainer(tmp_path, callbacks=[PrivacyCard()])
    trainer.fit(module, datamodule=data)
    assert set(read(tmp_path)[0]["metrics"]) == {"val/accuracy", "val/loss"}
    trainer.test(module, datamodule=data, verbose=False)
    assert read(tmp_path)[0]["metrics"]["test/accuracy"] > 0.5


class Interrupt(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the disk is full")])
def test_an_interrupted_run_has_its_card(tmp_path, error):
    with pytest.raises((SystemExit, type(error))):
        fit(tmp_path, callbacks=[Interrupt(error), PrivacyCard()])
    assert read(tmp_path)[0]["releases"] == [[1.0, 60 / 1240, 5]]


def test_private_validation_is_confessed_and_its_metrics_stay_out(tmp_path):
    privacy = dataclasses.replace(PRIVACY, num_examples=1190)
    data = make_data(privacy, validation="private", validation_private=50)
    fit(tmp_path, make_module(privacy), data, callbacks=[PrivacyCard()])
    card, _ = read(tmp_path)
    assert card["outside_the_guarantee"][0].startswith("validation metrics were computed from private records")
    assert card["metrics"] == {}


def test_a_run_without_noise_has_no_guarantee_on_its_card(tmp_path):
    privacy = dataclasses.replace(PRIVACY, noise_multiplier=0.0)
    fit(tmp_path, make_module(privacy), callbacks=[PrivacyCard()])
    card, text = read(tmp_path)
    assert card["epsilon"] is None
    assert "NO GUARANTEE" in text


def test_the_exact_private_size_is_not_on_the_card(tmp_path):
    privacy = dataclasses.replace(PRIVACY, num_examples=1240)
    module = fit(tmp_path, make_module(privacy), callbacks=[PrivacyCard()])
    exact = module.trainer.datamodule.roles()["private"]
    assert exact != 1240
    assert str(exact) not in read(tmp_path)[1].split()


def test_a_control_has_no_card(tmp_path):
    fit(tmp_path, make_module(method=SGD), callbacks=[PrivacyCard()])
    assert not (tmp_path / "privacy_card.json").exists()


def test_the_page_is_whole_in_itself_and_says_what_the_card_says(tmp_path):
    fit(tmp_path, callbacks=[PrivacyCard(), Conformance()])
    card, text = read(tmp_path)
    web = (tmp_path / "privacy_card.html").read_text()
    assert not re.search(r"https?:|<script|<link|url\(", web)
    assert "data:image/png;base64," in web
    assert "watched while they were made" in card["evidence"]["conformance"]
    for line in (headline(card), *plain(card), *card["outside_the_guarantee"], card["evidence"]["conformance"]):
        assert html.escape(line) in web
    assert plain(card)[0] in text
    assert "was not audited" in web


def test_a_card_without_a_guarantee_promises_nothing_on_its_page(tmp_path):
    privacy = dataclasses.replace(PRIVACY, noise_multiplier=0.0)
    fit(tmp_path, make_module(privacy), make_data(privacy), callbacks=[PrivacyCard()])
    card, _ = read(tmp_path)
    assert card["meaning"] is None
    web = (tmp_path / "privacy_card.html").read_text()
    assert "NO GUARANTEE" in web
    assert "there is no guarantee" in web
    assert "<img" not in web


def test_a_run_that_released_nothing_has_a_card(tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, *_):
            raise RuntimeError("before the first release")

    with pytest.raises(RuntimeError):
        fit(tmp_path, callbacks=[Fail(), PrivacyCard()])
    card, _ = read(tmp_path)
    assert (card["epsilon"], card["meaning"]) == (0.0, None)
    assert "nothing was released" in (tmp_path / "privacy_card.html").read_text()


def test_what_it_means_follows_from_the_ledger():
    releases = [Release(2.0, 0.1, 50)]
    spent = epsilon(releases, 1e-5)
    found = meaning(releases, spent, 1e-5, "add_remove")
    assert found["epsilon_without_amplification"] == pytest.approx(epsilon([Release(2.0, 1.0, 50)], 1e-5), rel=0.01)
    twice = meaning(releases, spent, 1e-5, "replace_one")["epsilon_without_amplification"]
    assert twice == pytest.approx(epsilon([Release(2.0, 1.0, 50)], 1e-5, "replace_one"), rel=0.01)
    budget = TradeOff.of_budget(spent, 1e-5)  # one point of the curve allows more than the whole of it
    assert found["membership_advantage"] < budget.largest_advantage()
    assert found["auc"] < budget.largest_auc()
    assert 0.01 < found["tpr_at_fpr_0.01"] < budget.most_power(0.01)
    gates = [Release(2.0, 1.0, 3, "a"), Release(2.0, 1.0, 5, "b"), Release(2.0, 1.0, 2)]
    apart = meaning(gates, 1.0, 1e-5, "add_remove")["epsilon_without_amplification"]
    assert apart == pytest.approx(epsilon([Release(2.0, 1.0, 7)], 1e-5), rel=0.01)


@pytest.mark.parametrize("spent", [0.1, 0.5, 1.0, 3.0])
def test_the_group_that_is_not_protected_is_the_first(spent):
    def certainty(k):
        grown = math.exp(k * spent)
        bad = 1e-5 * (grown - 1) / (math.exp(spent) - 1)
        return 1.0 if bad >= 1 else (1 + (grown - 1 + 2 * bad) / (grown + 1)) / 2

    size = group_size(spent, 1e-5)
    assert certainty(size) >= 0.99
    assert size == 1 or certainty(size - 1) < 0.99

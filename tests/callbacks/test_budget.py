import dataclasses
import logging

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_dp.callbacks import PrivacyBudget
from lightning_dp.errors import ConfigError
from lightning_dp.methods import SGD
from lightning_dp.privacy.accounting import Release, epsilon
from tests.methods.runs import PRIVACY, STEPS, fit, make_module


def logged(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    return [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]


def test_logs_the_ledgers_epsilon_after_each_step(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, callbacks=[PrivacyBudget(4)], logger=logger)
    rows = [row for row in logged(tmp_path) if row["privacy/epsilon"]]
    assert [float(row["privacy/steps_left"]) for row in rows] == [8, 4, 0]
    for row, count in zip(rows, (4, 8, 12), strict=True):
        expected = epsilon([Release(1.0, 60 / 1240, count)], 1e-5)
        assert float(row["privacy/epsilon"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["privacy/delta"]) == pytest.approx(1e-5)
        assert float(row["privacy/noise_multiplier"]) == 1.0


def test_says_what_the_epsilon_means_at_the_start_and_at_the_end(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, callbacks=[PrivacyBudget()])
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("private training")]
    assert len(said) == 2
    for line in said:
        assert all(word in line for word in ("epsilon", "delta 1e-05", "add_remove one image", "accountant pld"))
    assert f"{STEPS} releases left" in said[0]


def test_stops_before_the_step_that_would_cross_the_target(tmp_path):
    privacy = dataclasses.replace(PRIVACY, epsilon=1.5, steps=400)
    module = fit(tmp_path, make_module(privacy), callbacks=[PrivacyBudget()], max_steps=400)
    made = len(module.mechanism.ledger)
    assert epsilon([Release(1.0, 60 / 1240, made)], 1e-5) <= 1.5
    assert epsilon([Release(1.0, 60 / 1240, made + 1)], 1e-5) > 1.5


def test_is_silent_without_a_mechanism(tmp_path):
    module = fit(tmp_path, make_module(method=SGD), callbacks=[PrivacyBudget(1)], logger=CSVLogger(tmp_path))
    assert not [name for name in module.trainer.logged_metrics if name.startswith("privacy/")]


def test_refuses_an_impossible_interval():
    with pytest.raises(ConfigError, match="log_every_n_steps 0"):
        PrivacyBudget(0)


def test_by_default_it_logs_twenty_values_a_run(tmp_path):
    privacy = dataclasses.replace(PRIVACY, steps=40)
    fit(tmp_path, make_module(privacy), callbacks=[PrivacyBudget()], logger=CSVLogger(tmp_path, "", ""), max_steps=40)
    assert len([row for row in logged(tmp_path) if row["privacy/epsilon"]]) == 20

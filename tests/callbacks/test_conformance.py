"""Each way of breaking the mechanism is caught by name; a right one is left alone, and unchanged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_dp.callbacks import Conformance
from lightning_dp.callbacks.conformance import ViolationError
from lightning_dp.errors import ConfigError
from lightning_dp.methods import NearestMean, NeuroMix
from lightning_dp.models import ConvNet, LinearHead
from lightning_dp.privacy import Ledger, Mechanism, PoissonBatchSampler, clipping, noise
from lightning_dp.privacy.conformance import DrawStatistics, NoiseStatistics
from lightning_dp.privacy.engines import kernels, tape
from tests.methods.runs import PRIVACY, fit, make_module, weights
from tests.methods.test_ddp import run_two
from tests.methods.test_psg import make as make_psg

LONG = replace(PRIVACY, steps=60, expected_batch_size=100)


def watch(folder, privacy=LONG, module=None, **settings):
    module = make_module(privacy) if module is None else module
    return fit(folder, module, max_steps=privacy.steps, callbacks=[Conformance(**settings)])


@pytest.mark.parametrize("method", ["dp_sgd", "psg", "neuromix", "full_batch", "control", "secure"])
def test_a_right_mechanism_is_left_alone_and_as_it_was(tmp_path, method):
    make = {
        "dp_sgd": lambda: make_module(LONG),
        "psg": lambda: make_psg(LONG),
        "neuromix": lambda: NeuroMix(
            LinearHead(1, 8, 10, max_length=1.0), NearestMean(), 9, privacy=replace(LONG, expected_batch_size=1)
        ),
        "full_batch": lambda: make_module(replace(LONG, expected_batch_size=1240)),
        "control": lambda: make_module(replace(LONG, noise_multiplier=0.0, max_norm=float("inf"))),
        "secure": lambda: make_module(replace(LONG, secure=True)),
    }[method]
    watched = watch(tmp_path / "watched", LONG, make(), steps=None)
    plain = fit(tmp_path / "plain", make(), max_steps=60)
    assert torch.equal(weights(watched), weights(plain))
    assert watched.mechanism.observers == []


def test_noise_that_is_two_percent_too_small_is_caught(tmp_path, monkeypatch):
    original = noise.gaussian
    monkeypatch.setattr(noise, "gaussian", lambda size, std, generator: original(size, 0.98 * std, generator))
    module = make_module(LONG, net=ConvNet(1, 8, 10, width=32, depth=1))
    with pytest.raises(ViolationError, match=r"noise has 0\.98\d* times its accounted standard deviation"):
        watch(tmp_path, LONG, module)


def test_no_noise_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "gaussian", lambda size, std, generator: torch.zeros(size))
    with pytest.raises(ViolationError, match=r"noise has 0\.0000 times"):
        watch(tmp_path)


def test_a_noise_seed_that_is_used_again_is_caught(tmp_path, monkeypatch):
    original = Mechanism._noise
    monkeypatch.setattr(Mechanism, "_noise", lambda self, like, step: original(self, like, step % 5))
    with pytest.raises(ViolationError, match="noise repeats that of 5 releases ago"):
        watch(tmp_path)


@pytest.mark.parametrize("share", [0.3, -0.3])
def test_noise_that_depends_on_the_release_before_is_caught(share):
    generator, statistics = np.random.default_rng(0), NoiseStatistics()
    last, found = generator.standard_normal(300), []
    for _ in range(20):
        last = share * last + np.sqrt(1 - share**2) * generator.standard_normal(300)
        found.append(statistics.add(last))
    assert "depends on that of the release before" in next(word for word in found if word)


def test_no_clipping_is_caught(tmp_path, monkeypatch):
    def ones(norms, max_norm, clipping):
        return torch.ones_like(norms)

    for module in (clipping, tape, kernels):
        if "clip_factors" in vars(module):
            monkeypatch.setattr(module, "clip_factors", ones)
    privacy = replace(LONG, max_norm=0.1)
    with pytest.raises(ViolationError, match=r"a single record adds .*, above the clip norm 0\.1"):
        watch(tmp_path, privacy)


def draws(monkeypatch, change):
    original = PoissonBatchSampler.draw
    monkeypatch.setattr(PoissonBatchSampler, "draw", lambda self, step: change(self, original(self, step), step))


def test_a_record_twice_in_a_batch_is_caught(tmp_path, monkeypatch):
    draws(monkeypatch, lambda self, drawn, step: np.append(drawn, drawn[-1:]))
    with pytest.raises(ViolationError, match="a record is in a batch twice"):
        watch(tmp_path)


def test_shuffled_batches_are_caught(tmp_path, monkeypatch):
    def shuffled(self, drawn, step):
        order = np.random.default_rng(step // 12).permutation(self.num_records)
        return order[step % 12 * 100 :][:100]

    draws(monkeypatch, shuffled)
    with pytest.raises(ViolationError, match="shuffled batches"):
        watch(tmp_path)


def test_another_rate_is_caught(tmp_path, monkeypatch):
    draws(monkeypatch, lambda self, drawn, step: drawn[: len(drawn) // 2])
    with pytest.raises(ViolationError, match="records are drawn at the rate"):
        watch(tmp_path)


def test_a_forgotten_ledger_entry_is_caught(tmp_path, monkeypatch):
    original, calls = Ledger.record, []

    def record(self, *releases):
        calls.append(releases)
        if len(calls) != 3:
            original(self, *releases)

    monkeypatch.setattr(Ledger, "record", record)
    with pytest.raises(ViolationError, match="3 releases were made and 2 are in the ledger"):
        watch(tmp_path)


def test_after_its_steps_nothing_is_watched(tmp_path, monkeypatch):
    original = noise.gaussian
    calls = []

    def late(size, std, generator):
        calls.append(size)
        return original(size, std if len(calls) <= 10 else 0.0, generator)

    monkeypatch.setattr(noise, "gaussian", late)
    watch(tmp_path / "short", steps=10)
    calls.clear()
    with pytest.raises(ViolationError):
        watch(tmp_path / "long", steps=None)


def test_ten_thousand_clean_steps_raise_nothing():
    generator = np.random.default_rng(0)
    noises, drawn = NoiseStatistics(), DrawStatistics(1000, 0.05)
    for _ in range(10_000):
        assert drawn.add(np.flatnonzero(generator.random(1000) < 0.05)) is None
        assert noises.add(generator.standard_normal(128)) is None


@pytest.mark.parametrize(("records", "rate"), [(60_000, 256 / 60_000), (1_000, 0.5), (50, 0.02)])
def test_right_draws_of_other_sizes_raise_nothing(records, rate):
    generator = np.random.default_rng(1)
    statistics = DrawStatistics(records, rate)
    for _ in range(300):
        assert statistics.add(np.flatnonzero(generator.random(records) < rate)) is None


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        Conformance(steps=0)


TWO = """
import sys
from pathlib import Path
import torch
from lightning_dp.callbacks import Conformance
from lightning_dp.callbacks.conformance import ViolationError
from lightning_dp.methods import DPSGD
from lightning_dp.privacy import Mechanism
from tests.methods.runs import make_data, make_module, make_trainer
folder = Path(sys.argv[1])
fault = FAULT
module, data = make_module(), make_data()
trainer = make_trainer(folder, strategy="ddp", devices=2, callbacks=[Conformance()])
if fault == "noise":
    original = Mechanism.release
    Mechanism.release = lambda self, total, step, rank, *rest: original(self, total, step, 1, *rest)
if fault == "weights":
    original = DPSGD.update
    def update(self, mean):
        original(self, {name: value * (1 + self.trainer.global_rank) for name, value in mean.items()})
    DPSGD.update = update
found = "nothing"
try:
    trainer.fit(module, datamodule=data)
except ViolationError as error:
    found = str(error)
(folder / f"found{trainer.global_rank}").write_text(found)
"""


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("fault", "message"),
    [("none", "nothing"), ("weights", "the processes have different weights"), ("noise", "no process added noise")],
)
def test_two_processes_stop_together(tmp_path, fault, message):
    run_two(tmp_path, script=TWO.replace("FAULT", repr(fault)))
    for rank in (0, 1):
        assert message in (tmp_path / f"found{rank}").read_text()


def test_it_is_on_by_default():
    from pathlib import Path

    import yaml

    base = yaml.safe_load((Path(__file__).parents[2] / "configs" / "base.yaml").read_text())
    assert "Conformance" in [callback["class_path"] for callback in base["trainer"]["callbacks"]]

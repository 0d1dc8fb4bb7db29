"""Interrupted, killed, continued, moved: what was released is never forgotten."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from lightning_dp.callbacks import PrivacyBudget, PrivacyCard
from lightning_dp.errors import ConfigError
from lightning_dp.methods import SGD
from lightning_dp.privacy.accounting import Release, epsilon
from lightning_dp.privacy.ledger import read
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module, make_trainer, weights


def checkpoints(folder, every=5):
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=every, save_top_k=-1, filename="{step}")


class StopAt(Callback):
    """Leaves the fit in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


def interrupted(folder, module=None, extra=(), **settings):
    """A run stopped after 5 of its 12 steps, with a checkpoint there; returns the checkpoint's path."""
    callbacks = [checkpoints(folder), StopAt(5), *extra]
    fit(folder, module, callbacks=callbacks, enable_checkpointing=True, **settings)
    return folder / "step=5.ckpt"


@pytest.mark.parametrize("averaging", [False, True])
def test_resumed_in_mid_epoch_equals_uninterrupted(tmp_path, averaging):
    extra = [EMAWeightAveraging(decay=0.9)] if averaging else []
    whole = fit(tmp_path / "whole", callbacks=extra)
    extra = [EMAWeightAveraging(decay=0.9)] if averaging else []
    path = interrupted(tmp_path / "part", extra=extra)
    extra = [EMAWeightAveraging(decay=0.9)] if averaging else []
    resumed = fit(tmp_path / "rest", ckpt_path=path, callbacks=extra)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.mechanism.ledger.releases == (Release(1.0, 60 / 1240, STEPS),)


def test_the_checkpoint_is_plain_and_holds_the_ledger(tmp_path):
    stored = torch.load(interrupted(tmp_path), weights_only=True)["privacy"]
    assert json.loads(json.dumps(stored)) == stored
    assert stored["ledger"]["releases"] == [[1.0, 60 / 1240, 5]]
    assert stored["noise_multiplier"] == 1.0


def test_a_resumed_run_writes_on_in_its_own_ledger(tmp_path):
    path = interrupted(tmp_path / "part")
    resumed = fit(tmp_path / "rest", ckpt_path=path)
    assert resumed.mechanism.ledger.path.parent == tmp_path / "part"
    assert not (tmp_path / "rest" / "ledger.jsonl").exists()
    assert read(resumed.mechanism.ledger.path)[1] == (Release(1.0, 60 / 1240, STEPS),)


def test_releases_after_the_checkpoint_are_counted(tmp_path):
    """Going back to an old checkpoint does not give its budget back."""
    path = interrupted(tmp_path / "part")
    fit(tmp_path / "first", ckpt_path=path)
    again = fit(tmp_path / "second", ckpt_path=path)
    assert len(again.mechanism.ledger) == STEPS + (STEPS - 5)


def test_a_killed_run_reports_all_it_released_and_goes_on(tmp_path):
    """SIGKILL in the middle; under a fixed seed the continued run ends where the uninterrupted one does."""
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from pytorch_lightning.callbacks import Callback\n"
        "from tests.methods.runs import fit\n"
        "from tests.methods.test_resume import checkpoints\n"
        "class Kill(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 8:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folder = Path({str(tmp_path / 'killed')!r})\n"
        "fit(folder, callbacks=[checkpoints(folder), Kill()], enable_checkpointing=True)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert read(tmp_path / "killed" / "ledger.jsonl")[1] == (Release(1.0, 60 / 1240, 8),)

    resumed = fit(tmp_path / "rest", ckpt_path=tmp_path / "killed" / "last.ckpt")
    assert len(resumed.mechanism.ledger) == STEPS + 3
    assert torch.equal(weights(resumed), weights(fit(tmp_path / "whole")))


def test_lost_releases_end_a_budgeted_run_early(tmp_path):
    """With a target epsilon the budget wins over the number of steps."""
    privacy = dataclasses.replace(PRIVACY, noise_multiplier=None, epsilon=3.0)
    path = interrupted(tmp_path / "part", make_module(privacy))
    fit(tmp_path / "first", make_module(privacy), ckpt_path=path, callbacks=[StopAt(8)])
    with pytest.warns(UserWarning, match="3 fewer than privacy.steps asks for: 3 releases were made"):
        again = fit(tmp_path / "second", make_module(privacy), ckpt_path=path)
    assert len(again.mechanism.ledger) == STEPS
    assert again.trainer.global_step == STEPS - 3
    assert again.mechanism.epsilon() <= 3.0


def test_a_longer_plan_does_not_recalibrate(tmp_path):
    privacy = dataclasses.replace(PRIVACY, noise_multiplier=None, epsilon=3.0)
    path = interrupted(tmp_path / "part", make_module(privacy))
    longer = make_module(dataclasses.replace(privacy, steps=2 * STEPS))
    with pytest.raises(ConfigError, match=r"privacy.steps 24 would exceed the budget"):
        fit(tmp_path / "rest", longer, ckpt_path=path, max_steps=2 * STEPS)


@pytest.mark.parametrize(
    "changes", [{"num_examples": 1235}, {"expected_batch_size": 61}, {"max_norm": 2.0}, {"noise_multiplier": 2.0}]
)
def test_another_mechanism_is_refused(tmp_path, changes):
    path = interrupted(tmp_path / "part")
    with pytest.raises(ConfigError, match=r"privacy\." + next(iter(changes))):
        fit(tmp_path / "rest", make_module(dataclasses.replace(PRIVACY, **changes)), ckpt_path=path)


def test_another_split_is_refused(tmp_path):
    """Records could change sides: private ones would become public, or audited."""
    path = interrupted(tmp_path / "part")
    with pytest.raises(ConfigError, match="trained on another split"):
        fit(tmp_path / "rest", data=make_data(split_seed=5), ckpt_path=path)
    make_trainer(tmp_path).test(make_module(), datamodule=make_data(split_seed=5), ckpt_path=path, verbose=False)


def test_nobody_is_told_less_than_was_released(tmp_path, caplog):
    """The file knows of 12 releases, the checkpoint of 5: no message and no card may say 5."""
    path = interrupted(tmp_path / "part")
    fit(tmp_path / "first", ckpt_path=path)
    with caplog.at_level("INFO"):
        fit(tmp_path / "second", ckpt_path=path, callbacks=[PrivacyBudget(), PrivacyCard()])
    said = [record.getMessage() for record in caplog.records if "spent so far" in record.getMessage()]
    spent = epsilon([Release(1.0, 60 / 1240, STEPS)], 1e-5)
    assert f"spent so far: epsilon {spent:.4g} " in said[-1]

    (tmp_path / "part" / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        fit(tmp_path / "third", ckpt_path=path, callbacks=[PrivacyCard()])
    assert not (tmp_path / "third" / "privacy_card.json").exists()


def test_a_run_that_failed_can_go_on_in_the_same_process(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                raise RuntimeError("out of memory")

    failed = make_module()
    callbacks = [checkpoints(tmp_path), Fails()]
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, failed, callbacks=callbacks, enable_checkpointing=True)
    assert len(fit(tmp_path / "rest", ckpt_path=tmp_path / "last.ckpt").mechanism.ledger) == STEPS + 2


def test_loading_the_weights_into_a_new_run_carries_the_ledger_on(tmp_path):
    path = interrupted(tmp_path / "part")
    module = type(make_module()).load_from_checkpoint(
        path, net=make_module().net, optimizer=make_module().make_optimizer, privacy=PRIVACY, weights_only=True
    )
    fit(tmp_path / "rest", module)
    assert len(module.mechanism.ledger) == 5 + STEPS


def test_a_second_fit_counts_on(tmp_path):
    module = fit(tmp_path / "first")
    fit(tmp_path / "second", module)
    assert len(module.mechanism.ledger) == 2 * STEPS


def test_a_second_fit_within_a_spent_budget_releases_nothing(tmp_path):
    module = fit(tmp_path / "first", make_module(dataclasses.replace(PRIVACY, noise_multiplier=None, epsilon=3.0)))
    before = weights(module).clone()
    fit(tmp_path / "second", module)
    assert len(module.mechanism.ledger) == STEPS
    assert torch.equal(weights(module), before)


def test_weights_without_a_ledger_are_refused(tmp_path):
    folder = tmp_path / "sgd"
    fit(folder, make_module(method=SGD), callbacks=[checkpoints(folder)], enable_checkpointing=True)
    with pytest.raises(ConfigError, match="no privacy ledger"):
        fit(tmp_path / "rest", ckpt_path=folder / "step=5.ckpt")


def test_a_missing_ledger_is_refused_and_a_moved_run_is_found(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    path = interrupted(folder)
    (folder / "ledger.jsonl").rename(tmp_path / "run" / "ledger.jsonl")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints" / path.name
    assert len(fit(tmp_path / "rest", ckpt_path=moved).mechanism.ledger) == STEPS
    (tmp_path / "moved" / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        fit(tmp_path / "again", ckpt_path=moved)

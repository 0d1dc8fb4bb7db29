"""Two processes against one: the same draw, noise once, one all-reduce."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dp.privacy.accounting import Release
from tests.methods.runs import STEPS, fit, weights

SCRIPT = """
import sys
from pathlib import Path
import torch
from lightning_dp.callbacks import PrivacyBudget, PrivacyCard
from lightning_dp.data import Shift
from tests.methods.runs import fit, make_data, make_module, make_trainer, weights
folder, workers, ckpt = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None
module, data = make_module(physical_batch_size=7), make_data(num_workers=workers, augment=Shift(1), validation="public")
trainer = make_trainer(
    folder, strategy="ddp", devices=2, callbacks=[PrivacyBudget(1), PrivacyCard()], num_sanity_val_steps=2
)
trainer.fit(module, datamodule=data, ckpt_path=ckpt)
assert trainer.world_size == 2
torch.save((weights(module), module.mechanism.ledger.releases), folder / f"rank{trainer.global_rank}.pt")
trainer.save_checkpoint(folder / "end.ckpt")
metrics = trainer.test(module, datamodule=data, verbose=False)
torch.save(metrics, folder / f"metrics{trainer.global_rank}.pt")
"""
ROOT = Path(__file__).parents[2]


def run_two(folder, workers=0, ckpt="", script=SCRIPT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder), str(workers), str(ckpt)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    from lightning_dp.data import Shift
    from tests.methods.runs import make_data

    return fit(tmp_path_factory.mktemp("one"), data=make_data(augment=Shift(1)))


def load(path):
    return torch.load(path, weights_only=False)


@pytest.mark.ddp
def test_two_processes_end_where_one_does(two, one):
    values, releases = load(two / "rank0.pt")
    torch.testing.assert_close(values, weights(one), rtol=0, atol=1e-5)
    assert releases == (Release(1.0, 60 / 1240, STEPS),)


@pytest.mark.ddp
def test_replicas_are_identical(two):
    first, second = load(two / "rank0.pt"), load(two / "rank1.pt")
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.ddp
def test_only_rank_zero_writes_the_ledger_and_the_card(two):
    assert len((two / "ledger.jsonl").read_text().splitlines()) == 1 + STEPS
    assert not (two / "ledger-1.jsonl").exists()
    card = json.loads((two / "privacy_card.json").read_text())
    assert (card["devices"], card["releases"]) == (2, [[1.0, 60 / 1240, STEPS]])


@pytest.mark.ddp
def test_evaluation_counts_each_record_once(two, one):
    from tests.methods.runs import make_data

    first, second = load(two / "metrics0.pt"), load(two / "metrics1.pt")
    assert first == second
    data = make_data()
    data.setup("test")
    test = data.role("test")
    with torch.no_grad():
        correct = (one.net(data.normalize(test.images)).argmax(1) == test.labels).float().mean().item()
    assert first[0]["test/accuracy"] == pytest.approx(correct, abs=0.003)


FRESH = """
import dataclasses, sys
from pathlib import Path
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tests.methods.runs import PRIVACY, fit, make_data, make_module, weights
folder, ckpt = Path(sys.argv[1]), sys.argv[3] or None
privacy = dataclasses.replace(PRIVACY, seed=None, noise_multiplier=None, epsilon=3.0)
save = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
module = make_module(privacy)
fit(folder, module, ckpt_path=ckpt, strategy="ddp", devices=2, callbacks=[save], enable_checkpointing=True)
sampler = module.trainer.train_dataloader.batch_sampler
rank = module.trainer.global_rank
torch.save(
    (weights(module), len(module.mechanism.ledger), module.trainer.global_step, sampler.draw(3), list(sampler)[3]),
    folder / f"rank{rank}.pt",
)
"""


@pytest.mark.ddp
def test_fresh_randomness_is_shared_and_lost_releases_count_on_both_ranks(tmp_path):
    """Without a seed every rank must still make the same global draw, or a record is on two ranks at once."""
    folder = run_two(tmp_path / "a", script=FRESH)
    first = [load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert first[0][3].tolist() == first[1][3].tolist()
    assert not set(first[0][4]) & set(first[1][4])
    assert torch.equal(first[0][0], first[1][0])

    # The ledger's file holds 12 releases, the checkpoint 5: nothing is left, and both ranks have to know.
    resumed = run_two(tmp_path / "b", ckpt=tmp_path / "a" / "step=5.ckpt", script=FRESH)
    for rank in range(2):
        _, spent, step, *_ = load(resumed / f"rank{rank}.pt")
        assert (spent, step) == (STEPS, 5)


@pytest.mark.ddp
def test_loader_workers_and_resume_on_two_processes(two, tmp_path):
    """A finished run that is resumed does nothing more, on both ranks, and does not hang."""
    folder = run_two(tmp_path / "again", workers=1, ckpt=two / "end.ckpt")
    assert torch.equal(load(folder / "rank0.pt")[0], load(two / "rank0.pt")[0])

"""The command line on the digits: every line a user would type."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_dp.cli import main
from lightning_dp.methods import DPSGD
from lightning_dp.privacy import epsilon
from lightning_dp.privacy.accounting import Release, search_epsilon

ROOT = Path(__file__).parents[1]
PARTS = ("base", "data/digits", "method/dp_sgd", "privacy/eps8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    return tmp_path


def arguments(verb="fit", parts=PARTS, *more):
    files = [word for part in parts for word in ("-c", str(ROOT / "configs" / f"{part}.yaml"))]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    return [verb, *files, *quiet, *more]


def short(*more):
    return arguments("fit", PARTS, "--privacy.steps", "4", "--privacy.noise_multiplier", "8", *more)


def test_one_composed_command_leaves_everything_a_run_should(here, capsys):
    main(short())
    run = here / "runs" / "version_0"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "privacy_card.json",
        "privacy_card.md",
        "checkpoints",
        "ledger.jsonl",
        "splits.json",
    }
    assert [path for path in run.iterdir() if path.name.startswith("events")]
    card = json.loads((run / "privacy_card.json").read_text())
    assert card["releases"] == [[8.0, 1024 / 1240, 4]]
    assert "test/accuracy" in card["metrics"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["privacy"]["steps"] == 4
    assert "test/accuracy" in capsys.readouterr().out


def test_a_trained_run_is_tested_validated_predicted_and_loaded(here, capsys):
    main(short())
    checkpoint = here / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    assert "privacy" in torch.load(checkpoint, weights_only=True)
    module = DPSGD.load_from_checkpoint(checkpoint, weights_only=True)
    first = json.loads((here / "runs" / "version_0" / "privacy_card.json").read_text())["metrics"]["test/accuracy"]
    for verb in ("test", "validate", "predict"):
        main([*arguments(verb), "--ckpt_path", str(checkpoint)])
    assert str(first)[:7] in capsys.readouterr().out
    assert module.net.linear.weight.abs().sum() > 0


def test_resume_from_last(here):
    main(short())
    last = here / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    main(arguments("fit", PARTS, "--privacy.steps", "6", "--privacy.noise_multiplier", "8", "--ckpt_path", str(last)))
    card = json.loads((here / "runs" / "version_1" / "privacy_card.json").read_text())
    assert card["releases"] == [[8.0, 1024 / 1240, 6]]


def test_one_privacy_section_serves_model_data_and_trainer(here, capsys):
    with pytest.raises(SystemExit):
        main([*short(), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["privacy"]["steps"] == 4
    with pytest.raises(SystemExit, match=r'max_steps 5 must be given via "privacy.steps", which is 4'):
        main([*short(), "--trainer.max_steps=5"])


REFUSED = {
    "there is no class DPSDG; nearest: DPSGD": ["--model", "DPSDG"],
    "there is no class MNITS; nearest: MNIST": ["--data.init_args.source", "MNITS"],
    "there is no class EarlyStoping; nearest: EarlyStopping": ["--trainer.callbacks+", "EarlyStoping"],
    "there is no class torch.optim.Adm; nearest: Adam": ["--model.init_args.optimizer", "torch.optim.Adm"],
    "DPDataModule takes no audits; nearest: audit": ["--data.init_args.audits", "3"],
    "--privacy.epsilonn": ["--privacy.epsilonn", "3"],
    "MNIST was not found below .*data.init_args.download true": ["--data.init_args.source", "MNIST"],
    "privacy.delta 0.5 must lie": ["--privacy.delta", "0.5"],
    "trainer.gradient_clip_val clips the batch": ["--trainer.gradient_clip_val", "1"],
    "trainer.accumulate_grad_batches 2": ["--trainer.accumulate_grad_batches", "2"],
    "expected_batch_size 2000 exceeds": ["--privacy.expected_batch_size", "2000"],
    "physical_batch_size 0": ["--model.init_args.physical_batch_size", "0"],
}


@pytest.mark.parametrize(("message", "given"), REFUSED.items())
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing(here, message, given):
    with pytest.raises(SystemExit, match=message) as stopped:
        main([*short(), *given])
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)
    assert not list(here.glob("runs/**/*.ckpt"))
    assert not list(here.glob("runs/**/ledger.jsonl"))


def test_without_a_privacy_section_the_trainer_has_its_own_number_of_steps(here):
    public = ["--data=PublicDataModule", "--data.source=Digits", "--data.batch_size=8", "--model=ClassDiffusion"]
    model = ["--model.num_classes=10", "--model.image_size=8", "--model.widths=[16]", "--trainer.max_steps=3"]
    main(arguments("fit", ["base"], *public, *model))
    checkpoint = here / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3


def test_help_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(verb in shown for verb in ("fit", "validate", "test", "predict", "dp plan` prints"))


def test_plan_prints_both_adjacencies_and_accountants_and_saves_a_plot(here, capsys):
    numbers = ["--num_examples", "1000", "--expected_batch_size", "100", "--steps", "50", "--delta", "1e-5"]
    main(["plan", *numbers, "--epsilon", "2", "--plot", "out/plan.png"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("add_remove", "replace_one", "pld", "prv", "delta 1e-05", "50 steps"))
    row = next(line for line in shown.splitlines() if line.startswith("add_remove")).split()
    assert 0.995 * 2 <= float(row[2]) <= 2 < float(row[3]) < 2.02
    assert (here / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_says_what_a_declared_search_costs(here, capsys):
    numbers = ["--num_examples", "1000", "--expected_batch_size", "100", "--steps", "50", "--delta", "1e-5"]
    main(["plan", *numbers, "--noise_multiplier", "2", "--plot", "null"])
    assert "search" not in capsys.readouterr().out
    main(["plan", *numbers, "--noise_multiplier", "2", "--plot", "null", "--search_mean", "5", "--search_shape", "0"])
    one = [Release(2.0, 0.1, 50)]
    best, alone = search_epsilon(one, 1e-5, 5, 0), epsilon(one, 1e-5, accountant="rdp")
    assert f"epsilon {best:.4f} for the best of a random number of such runs, 5 on average" in capsys.readouterr().out
    assert alone < best


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (["--epsilon", "2", "--delta", "1e-5", "--search_mean", "1"], "mean number of runs above 1"),
        (["--epsilon", "2", "--delta", "0.5"], "privacy.delta"),
        (["--delta", "1e-5"], "no privacy budget"),
        (["--delta", "1e-5", "--noise_multiplier", "0"], "no finite epsilon"),
        (["--epsilon", "2"], "delta"),
    ],
)
def test_plan_answers_mistakes_in_one_line(here, numbers, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["plan", "--num_examples", "1000", "--expected_batch_size", "100", "--steps", "50", *numbers])
    assert "\n" not in str(stopped.value)
    assert not (here / "runs").exists()

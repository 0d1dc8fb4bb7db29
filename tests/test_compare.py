"""Comparisons: planned, run, killed, resumed and written up. Most with a stand-in for `fit` that takes milliseconds."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from lightning_dp import compare as module
from lightning_dp.cli import main
from lightning_dp.compare import Part, Row, plan_runs, read_results
from lightning_dp.report import certified, summarise

ROOT = Path(__file__).parents[1]

# Leaves what `fit` leaves; the accuracy is a function of the settings. `slow` sleeps until somebody touches `go`.
STAND_IN = """
import json, os, sys, time, pathlib
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(given["--trainer.logger.save_dir"], given["--trainer.logger.version"])
assert os.environ["OMP_NUM_THREADS"] == "1"
while "--slow" in given and not pathlib.Path("go").exists():
    time.sleep(0.02)
if "--edit" in given:
    pathlib.Path(given["--edit"]).open("a").write("# edited\\n")
if "--fail" in given and not pathlib.Path("go").exists():
    sys.exit("no luck")
seed, epsilon = int(given["--seed_everything"]), given.get("--privacy.epsilon")
accuracy = {None: 0.9, "1.0": 0.5, "3.0": 0.7}[epsilon] + 0.01 * seed
(folder / "metrics.json").write_text(json.dumps({"test/accuracy": accuracy}))
if epsilon:
    card = {"method": "DPSGD", "epsilon": float(epsilon) - 0.01, "delta": 1e-5, "adjacency": "add_remove",
            "unit": "image", "accountant": "pld", "noise_multiplier": 1.0, "rng": "fresh", "data": {"encoder": "A"},
            "metrics": {"test/accuracy": accuracy}}
    (folder / "privacy_card.json").write_text(json.dumps(card))
"""

SPEC = {
    "output": "out",
    "seeds": [0, 1],
    "epsilons": [1.0, 3.0],
    "common": {"files": ["common.yaml"]},
    "rows": {
        "paragon": {"private": False, "settings": {"model": "SGD"}},
        "ours": {"settings": {"model.init_args.lr": 0.5}},
    },
    "paragon": "paragon",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stand_in.py").write_text(STAND_IN)
    Path("common.yaml").write_text("seed_everything: 0\n")
    monkeypatch.setattr(module, "_FIT", (sys.executable, "stand_in.py"))
    return tmp_path


def run(spec, *more):
    Path("spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    main(["compare", "-c", "spec.yaml", *more])


def lines():
    return [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]


def test_rows_seeds_epsilons_and_axes_are_crossed_and_controls_run_once_per_seed(here):
    for name in ("base", "five", "ours"):
        Path(f"{name}.yaml").touch()
    rows = {"control": Row(private=False), "ours": Row(files=["ours.yaml"], settings={"b": [1, 2]})}
    axes = {"shots": {"2": Part(settings={"a": 2}), "5": Part(["five.yaml"])}}
    runs = list(plan_runs(rows, [0, 1], [1.0, 3.0], Part(["base.yaml"], {"a": 1}), axes, ["seed_everything", "s"]))
    assert len(runs) == 2 * 2 * (1 + 2)
    assert [(run.row, run.epsilon) for run in runs[:3]] == [("control", None), ("ours", 1.0), ("ours", 3.0)]
    words = ("-c", "base.yaml", "-c", "ours.yaml", "--a=2", "--b=[1, 2]", "--privacy.epsilon=3.0")
    assert runs[2].arguments == (*words, "--seed_everything=0", "--s=0")
    assert runs[5].files == ("base.yaml", "five.yaml", "ours.yaml")


def test_a_comparison_ends_with_a_table_a_plot_and_what_epsilon_means(here, capsys):
    run(SPEC, "--jobs", "2")
    assert len(lines()) == 2 * (1 + 2)
    assert {line["version"] for line in lines()} == {version("lightning_dp")}
    assert [line["card"]["data"] for line in lines() if line["row"] == "ours"] == 4 * [{"encoder": "A"}]
    table = list(csv.DictReader(Path("out/table.csv").read_text().splitlines()))
    assert [(line["row"], line["epsilon target"], line["n"]) for line in table] == [
        ("paragon", "", "2"),
        ("ours", "1.0", "2"),
        ("ours", "3.0", "2"),
    ]
    errors = [float(line["error %"]) for line in table]
    assert errors == pytest.approx([9.5, 49.5, 29.5])
    assert float(table[1]["standard error"]) == pytest.approx(0.5)
    assert float(table[2]["error increase %"]) == pytest.approx(100 * (29.5 / 9.5 - 1))
    text = Path("out/table.md").read_text()
    assert "epsilon 2.99 at delta 1e-05, add_remove one image, pld" in text
    assert "no guarantee" in text
    assert Path("out/plot.png").read_bytes().startswith(b"\x89PNG")
    assert "6 runs: out/table.md" in capsys.readouterr().out


def test_finished_runs_are_not_made_again_and_changed_ones_are(here):
    run(SPEC)
    before = lines()
    run(SPEC)
    assert lines() == before
    Path("common.yaml").write_text("seed_everything: 1\n")
    run(SPEC)
    assert len(lines()) == 2 * len(before)
    with Path("out/results.jsonl").open("a") as file:
        file.write('{"name": "torn')
    run({**SPEC, "seeds": [0, 1, 2]})
    assert len(read_results(Path("out/results.jsonl"), "test/accuracy")) == 2 * len(before) + 3


def test_a_run_whose_files_change_under_it_does_not_count(here):
    spec = {**SPEC, "rows": {"ours": SPEC["rows"]["ours"]}, "seeds": [0], "epsilons": [1.0], "paragon": None}
    spec["common"] = {"files": ["common.yaml"], "settings": {"edit": "common.yaml"}}
    with pytest.raises(SystemExit, match=r"1 of 1 runs failed, .* one of common.yaml changed during") as stopped:
        run(spec)
    assert "\n" not in str(stopped.value)
    assert not Path("out/results.jsonl").exists()
    (folder,) = Path("out/runs").iterdir()
    assert str(stopped.value).count(folder.name) == 1
    # a run that waits in the queue while a file changes is not even started: it would spend budget for nothing
    with pytest.raises(SystemExit, match="2 of 2 runs failed"):
        run({**spec, "seeds": [1, 2]})
    assert len(list(Path("out/runs").glob("*/attempt_0"))) == 2


def test_a_killed_comparison_goes_on_and_makes_the_killed_run_again(here):
    spec = {**SPEC, "rows": {**SPEC["rows"], "ours": {"settings": {"slow": 1}}}, "epsilons": [3.0]}
    Path("spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    script = "import sys; from lightning_dp import compare, cli; compare._FIT = (sys.executable, 'stand_in.py')\n"
    script += "cli.main(['compare', '-c', 'spec.yaml'])"
    with Path("log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-c", script], stderr=log, start_new_session=True,
                                 env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(Path("out").glob("runs/ours*/attempt_0")) and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(SystemExit, match="another comparison is writing into out"):
            run(spec)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert [line["row"] for line in lines()] == ["paragon"]
    Path("go").touch()
    run(spec)
    assert sorted(line["row"] for line in lines()) == ["ours", "ours", "paragon", "paragon"]
    again = next(line for line in lines() if line["row"] == "ours")
    # the folder of the killed attempt stays: its ledger says what was released
    assert again["folder"].endswith("attempt_1")
    assert Path(again["folder"]).parent.joinpath("attempt_0").is_dir()


def test_failed_runs_are_named_and_the_rest_is_written_up(here):
    spec = {**SPEC, "rows": {**SPEC["rows"], "bad": {"private": False, "settings": {"fail": 1}}}}
    with pytest.raises(
        SystemExit, match=r"2 of 8 runs failed, .* bad-seed0-\w+ ended with status 1: see .*log.txt"
    ) as stopped:
        run(spec)
    assert "\n" not in str(stopped.value)
    assert "ours" in Path("out/table.md").read_text()
    Path("go").touch()
    run(spec)
    assert len(lines()) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paragon": "parragon"}, "parragon is not among the rows paragon, ours"),
        ({"only_public": "ours"}, "row ours is paragon or only_public"),
        ({"epsilons": []}, "needs rows, seeds"),
        ({"seeds": [0, 1, 0]}, r"seeds \[0, 1, 0\] has a value twice"),
        ({"epsilons": [1, 1.0]}, r"epsilons \[1.0, 1.0\] has a value twice"),
        ({"common": {"files": ["gone.yaml"]}}, "gone.yaml cannot be read"),
        ({"jobs": 0}, "--jobs 0"),
        ({"metric": "test/f1"}, "left no test/f1"),
        ({"rowss": 1}, "rowss"),
    ],
)
def test_mistakes_are_answered_in_one_line(here, change, message):
    if "metric" in change:
        run(SPEC)
    with pytest.raises(SystemExit, match=message) as stopped:
        run({**SPEC, **change})
    assert "\n" not in str(stopped.value)


def test_a_row_has_the_worst_certified_epsilon_of_its_runs_and_says_if_a_seed_was_fixed():
    card = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "adjacency": "add_remove",
        "unit": "image",
        "accountant": "pld",
        "rng": "fresh",
    }
    runs = [{"card": card}, {"card": {**card, "epsilon": 1.5, "rng": "fixed seed: NOT FOR RELEASE"}}]
    assert certified(runs) == "epsilon 1.5 at delta 1e-05, add_remove one image, pld, NOT FOR RELEASE (fixed seed)"
    assert certified([{"card": {**card, "epsilon": None}}]) == "no guarantee"


def test_increases_refer_to_the_paragon_at_the_same_place_of_the_axes():
    results = [
        {
            "row": row,
            "axes": {"shots": shots},
            "epsilon_target": epsilon,
            "card": None,
            "seconds": 1.0,
            "metrics": {"test/accuracy": accuracy},
        }
        for row, shots, epsilon, accuracy in (
            ("p", "2", None, 0.9),
            ("p", "5", None, 0.8),
            ("a", "2", 1.0, 0.8),
            ("a", "5", 1.0, 0.7),
        )
    ]
    table = summarise(results, ["p", "a"], "test/accuracy", "p")
    found = {(line["shots"], line["row"]): line["error increase %"] for line in table}
    assert found[("2", "a")] == pytest.approx(100)
    assert found[("5", "a")] == pytest.approx(50)
    assert table[0]["standard error"] is None


@pytest.mark.slow
def test_real_runs_on_the_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    parts = [str(ROOT / "configs" / f"{part}.yaml") for part in ("base", "data/digits", "privacy/eps3")]
    methods = {name: str(ROOT / "configs" / "method" / f"{name}.yaml") for name in ("sgd", "dp_sgd")}
    short = {"privacy.steps": 4, "trainer.accelerator": "cpu"}
    rows = {name: {"files": [path], "settings": short} for name, path in methods.items()}
    rows["sgd"]["private"] = False
    spec = {**SPEC, "seeds": [0, 1], "epsilons": [3.0], "common": {"files": parts}, "rows": rows, "paragon": "sgd"}
    run(spec)
    assert {line["row"]: line["card"] is None for line in lines()} == {"sgd": True, "dp_sgd": False}
    assert len(lines()) == 4
    assert "at delta 1e-05, add_remove one image, pld" in Path("out/table.md").read_text()

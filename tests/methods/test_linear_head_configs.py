"""Every file of configs/method/linear_head fits the digits; the comparison's rows and places exist."""

from pathlib import Path

import pytest
import yaml

from lightning_dp.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
HEADS = sorted(path for path in CONFIGS.glob("method/linear_head/*.yaml") if path.stem != "zero_shot")


@pytest.mark.parametrize("method", HEADS, ids=lambda path: path.stem)
def test_every_linear_head_method_fits_and_leaves_its_metrics(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    paths = [CONFIGS / "base.yaml", CONFIGS / "data" / "digits.yaml", CONFIGS / "privacy" / "eps8.yaml", method]
    files = [word for path in paths for word in ("-c", str(path))]
    given = ["--privacy.expected_batch_size=1240", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if method.stem != "only_public":
        given += ["--privacy.steps=2"]
    if method.stem not in ("only_public", "paragon"):
        given += ["--privacy.noise_multiplier=8"]
    main(["fit", *files, *given])
    run = tmp_path / "runs" / "version_0"
    assert (run / "metrics.json").is_file()
    assert (run / "privacy_card.json").is_file() == (method.stem != "only_public")


@pytest.mark.parametrize("name", ["adamix.yaml", "adamix_cifar10.yaml"])
def test_the_comparison_names_files_that_exist(name):
    spec = yaml.safe_load((CONFIGS / "compare" / name).read_text())
    parts = [
        spec["common"],
        *spec["rows"].values(),
        *(place for axis in spec.get("axes", {}).values() for place in axis.values()),
    ]
    assert not [file for part in parts for file in part.get("files", []) if not (ROOT / file).is_file()]

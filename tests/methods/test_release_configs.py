"""Every file of configs/method/release makes a release of the digits; the comparison names files that exist."""

from pathlib import Path

import pytest
import yaml

from lightning_dp.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RELEASES = sorted(CONFIGS.glob("method/release/*.yaml"))


@pytest.mark.parametrize("method", RELEASES, ids=lambda path: path.stem)
def test_every_release_method_fits_and_leaves_its_metrics(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    paths = [CONFIGS / "base.yaml", CONFIGS / "data" / "digits.yaml", CONFIGS / "privacy" / "eps8.yaml", method]
    given = ["--privacy.noise_multiplier=8", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if method.stem.startswith("neuromix"):
        given += ["--privacy.steps=20", "--model.init_args.degree=9"]
    elif method.stem.startswith("psg"):
        given += ["--privacy.steps=4", "--privacy.expected_batch_size=60", "--model.init_args.updates_per_release=1"]
        given += [f"--model.init_args.net.init_args.{name}" for name in ("image_size=8", "width=8", "depth=1")]
        given += ["--model.init_args.training.epochs=2"]
    else:
        given += ["--privacy.expected_batch_size=1240"]
    main(["fit", *(word for path in paths for word in ("-c", str(path))), *given])
    run = tmp_path / "runs" / "version_0"
    assert (run / "metrics.json").is_file()
    assert (run / "privacy_card.json").is_file()
    assert (run / "release" / "release.safetensors").is_file() == method.stem.startswith(("neuromix", "psg"))


def test_the_comparison_names_files_that_exist():
    spec = yaml.safe_load((CONFIGS / "compare" / "neuromix.yaml").read_text())
    places = (place for axis in spec["axes"].values() for place in axis.values())
    parts = [spec["common"], *spec["rows"].values(), *places]
    assert not [file for part in parts for file in part.get("files", []) if not (ROOT / file).is_file()]

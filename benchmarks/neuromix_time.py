"""Time and memory of a NeuroMix release over the number of mixtures, on made features of MNIST's ScatterNet size.

    python -m benchmarks.neuromix_time [--threads 2] [--output runs/neuromix_time.png]

Drawing, summing, noise and the ledger; not the encoding, and not the head. Each size in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import torch
from pytorch_lightning import Trainer
from torch import Tensor

mpl.use("Agg")
import matplotlib.pyplot as plt

from lightning_dp.data import MNIST, DPDataModule, Records
from lightning_dp.methods import NearestMean, NeuroMix
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig

OUTPUTS = (7_500, 15_000, 30_000, 60_000)
RECORDS, SHAPE = 60_000, (81, 7, 7)


class MadeFeatures(DPDataModule):
    """All records private, with features in the place of images."""

    def setup(self, stage: str = "fit") -> None:
        """Nothing is read."""

    def role(self, name: str) -> Records:
        """Features of unlike lengths."""
        return Records(torch.randn(RECORDS, *SHAPE), torch.arange(RECORDS) % 10)

    def normalize(self, images: Tensor) -> Tensor:
        """Features as they are."""
        return images

    def train_dataloader(self) -> object:
        """The ordinary loader, over records that nobody looks at."""
        from lightning_dp.data import RecordDataset

        self._datasets["private"] = RecordDataset(Records(torch.zeros(RECORDS, 1), torch.zeros(RECORDS).long()))
        return super().train_dataloader()


def release(outputs: int, epsilon: float) -> dict[str, float]:
    """Seconds (wall and CPU) and the peak of the memory, MiB, of one release."""
    privacy = PrivacyConfig(RECORDS, 1, outputs, 1e-5, epsilon=epsilon)
    net = LinearHead(81, 7, 10, groups=27, max_length=1.0)
    with tempfile.TemporaryDirectory() as folder:
        module = NeuroMix(net, NearestMean(), privacy=privacy)
        trainer = Trainer(
            max_steps=outputs, max_epochs=-1, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, accelerator="cpu",
        )  # fmt: skip
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.fit(module, datamodule=MadeFeatures(MNIST(), privacy=privacy))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"outputs": outputs, "degree": module.mechanism.config.expected_batch_size, "wall": wall, "cpu": cpu} | {
        "peak_mb": peak
    }


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neuromix_time")
    parser.add_argument("--output", type=Path, default=Path("runs/neuromix_time.png"))
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(release(arguments.measure, arguments.epsilon)))
        return
    found = []
    for outputs in OUTPUTS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.neuromix_time", "--measure", str(outputs)]
        command += ["--epsilon", str(arguments.epsilon), "--threads", str(arguments.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print({key: round(value, 1) for key, value in found[-1].items()}, flush=True)
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for clock in ("wall", "cpu"):
        axes.plot([row["outputs"] for row in found], [row[clock] for row in found], marker="o", label=f"{clock} time")
    axes.set(xlabel="mixtures T", ylabel="seconds", xlim=0, ylim=0)
    axes.set_title(f"A release of {RECORDS:,} records, 3,969 features", fontsize=9)
    axes.legend()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120, bbox_inches="tight")
    print(arguments.output)


if __name__ == "__main__":
    main()

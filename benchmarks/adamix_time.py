"""Time of full-batch AdaMix steps on made features: the whole Lightning loop, loader included.

python -m benchmarks.adamix_time --records 10000 --values 1280 --steps 200
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

from lightning_dp.data import DPDataModule, Records
from lightning_dp.data.sources import Source
from lightning_dp.methods import AdaMix, FeaturePCA, FewShot, GradientSpan
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig

PUBLIC_PER_CLASS, CLASSES = 5, 10


class Made(Source):
    """Random bytes in one of ten clusters each; the encoder only flattens them."""

    def __init__(self, records: int, values: int) -> None:
        self.shape, self.num_classes = (records, values), CLASSES
        self.mean, self.std = (0.5,), (0.5,)

    @property
    def name(self) -> str:
        """Name for cards."""
        return "made"

    def load(self, root: Path, train: bool, download: bool = False) -> Records:
        """One side."""
        generator = torch.Generator().manual_seed(int(train))
        records, values = self.shape
        count = records + PUBLIC_PER_CLASS * CLASSES if train else 1000
        labels = torch.arange(count) % CLASSES
        images = torch.randint(0, 200, (count, 1, values, 1), generator=generator, dtype=torch.uint8)
        images[torch.arange(count), 0, labels] += 50
        return Records(images, labels)


class Clock(Callback):
    """Seconds from the first batch's request to the last update."""

    def on_train_start(self, *_: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.start


def seconds(records: int, values: int, steps: int, chunk: int, projection: Any, profiler: str | None = None) -> float:
    privacy = PrivacyConfig(records, records, steps, 1e-5, epsilon=3.0)
    data = DPDataModule(
        Made(records, values), public_per_class=PUBLIC_PER_CLASS, encoder=torch.nn.Flatten(), privacy=privacy
    )
    module = AdaMix(
        LinearHead(values, 1, CLASSES, groups=1), partial(torch.optim.SGD, lr=0.01), FewShot(),
        physical_batch_size=chunk, privacy=privacy, projection=projection,
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            default_root_dir=folder, callbacks=[clock], profiler=profiler,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("records", 10_000), ("values", 1280), ("steps", 200), ("chunk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    size = f"{given.records} x {given.values}, {CLASSES} classes"
    print(f"{given.steps} full-batch steps on {size}, {torch.get_num_threads()} threads")
    for projection in (None, GradientSpan(), FeaturePCA()):
        taken = seconds(given.records, given.values, given.steps, given.chunk, projection)
        print(f"{type(projection).__name__:>14} {taken:6.1f} s")


if __name__ == "__main__":
    main()

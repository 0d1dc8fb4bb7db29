"""The test's metrics as a file, for every method; the non-private control has no card to carry them."""

import json
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer


class MetricsFile(Callback):
    """Writes ``metrics.json`` into the log directory after a test: the logged values of evaluation, by name.

    Values computed from private records (``private_val/...``) are left out.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: Lightning broadcasts it
        if not trainer.is_global_zero:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test")}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(logged, indent=2) + "\n", encoding="utf-8")

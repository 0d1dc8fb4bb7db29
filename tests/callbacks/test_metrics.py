import dataclasses
import json

from pytorch_lightning import Callback

from lightning_dp.callbacks import MetricsFile
from tests.methods.runs import PRIVACY, make_data, make_module, make_trainer


class LookAgain(Callback):
    """Logs a private metric during a test, where `Trainer.test` does not clear it away first."""

    def on_test_epoch_end(self, trainer, pl_module):
        pl_module.log("private_val/accuracy", 0.5)


def test_metrics_of_private_validation_stay_out_of_the_file(tmp_path):
    privacy = dataclasses.replace(PRIVACY, num_examples=1190, steps=2)
    module, data = make_module(privacy), make_data(privacy, validation="private", validation_private=50)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[LookAgain(), MetricsFile()])
    trainer.fit(module, datamodule=data)
    assert not (tmp_path / "metrics.json").exists()
    trainer.test(module, datamodule=data, verbose=False)
    assert "private_val/accuracy" in trainer.callback_metrics
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"test/accuracy", "test/loss"}

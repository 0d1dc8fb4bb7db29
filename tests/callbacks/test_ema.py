import dataclasses

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F

from lightning_dp.callbacks import PrivacyCard, WeightEMA
from lightning_dp.callbacks.card import make_card
from lightning_dp.errors import ConfigError
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module, make_trainer, weights


class Seen(Callback):
    """The weights after every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(weights(pl_module).clone())


def flat(ema):
    return torch.cat([value.reshape(-1) for value in ema.weights.values()])


def test_it_is_the_average_with_warm_up_of_every_step(tmp_path):
    seen, ema = Seen(), WeightEMA(decay=0.4)
    fit(tmp_path, callbacks=[seen, ema])
    expected = seen.steps[0]
    for t, value in list(enumerate(seen.steps))[1:]:
        decay = min(0.4, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    assert ema.updates == STEPS
    torch.testing.assert_close(flat(ema), expected)
    assert (flat(ema) - seen.steps[-1]).abs().max() > 1e-3


def test_the_run_is_the_same_with_and_without_it(tmp_path):
    without = fit(tmp_path / "without", data=make_data(validation="public"))
    with_it = fit(tmp_path / "with", data=make_data(validation="public"), callbacks=[WeightEMA()])
    assert torch.equal(weights(with_it), weights(without))
    assert with_it.mechanism.ledger.releases == without.mechanism.ledger.releases


def test_both_accuracies_are_logged_and_on_the_card(tmp_path):
    module, data, ema = make_module(), make_data(validation="public"), WeightEMA(0.9)
    trainer = make_trainer(tmp_path, callbacks=[ema, PrivacyCard()])
    trainer.fit(module, datamodule=data)
    assert {"val/accuracy", "val_ema/accuracy"} <= set(make_card(trainer, module)["metrics"])
    before = weights(module).clone()
    trainer.test(module, datamodule=data, verbose=False)
    assert torch.equal(weights(module), before)
    card = make_card(trainer, module)["metrics"]
    test = data.role("test")
    inputs = data.normalize(test.images)
    with torch.no_grad():
        raw = (module.net(inputs).argmax(1) == test.labels).float().mean().item()
        logits = F.linear(inputs.flatten(1), *ema.weights.values())
        averaged = (logits.argmax(1) == test.labels).float().mean().item()
    assert card["test/accuracy"] == pytest.approx(raw)
    assert card["test_ema/accuracy"] == pytest.approx(averaged)
    assert raw != averaged


def test_a_resumed_run_goes_on_from_the_stored_average(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole, rest = WeightEMA(0.9), WeightEMA(0.9)
    fit(tmp_path / "whole", callbacks=[whole, save], enable_checkpointing=True)
    fit(tmp_path / "rest", callbacks=[rest], ckpt_path=tmp_path / "step=5.ckpt")
    assert rest.updates == whole.updates == STEPS
    assert torch.equal(flat(rest), flat(whole))
    stored = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["callbacks"]["WeightEMA"]
    assert stored["updates"] == 10


def test_a_checkpoint_is_tested_with_its_average(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=STEPS, filename="{step}")
    data = make_data()
    fit(tmp_path, data=data, callbacks=[WeightEMA(0.9), save], enable_checkpointing=True)
    trainer = make_trainer(tmp_path, callbacks=[WeightEMA(0.9)])
    metrics = trainer.test(make_module(), datamodule=data, ckpt_path=save.best_model_path, verbose=False)[0]
    assert {"test/accuracy", "test_ema/accuracy"} <= set(metrics)


def test_a_second_fit_starts_a_new_average(tmp_path):
    module, ema = make_module(), WeightEMA()
    fit(tmp_path / "a", module, callbacks=[ema])
    fit(tmp_path / "b", module, callbacks=[ema])
    assert ema.updates == STEPS


def test_private_validation_keeps_its_name(tmp_path):
    privacy = dataclasses.replace(PRIVACY, num_examples=1190)
    data = make_data(privacy, validation="private", validation_private=50)
    module = fit(tmp_path, make_module(privacy), data, callbacks=[WeightEMA()])
    logged = set(module.trainer.callback_metrics)
    assert "private_val_ema/accuracy" in logged
    assert "val_ema/accuracy" not in logged
    assert make_card(module.trainer, module)["metrics"] == {}


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ConfigError, match=r"WeightEMA\.decay"):
        WeightEMA(decay)

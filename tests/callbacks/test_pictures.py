import json
import logging

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from lightning_dp.callbacks import Pictures, PrivacyCard
from lightning_dp.callbacks.card import make_card
from lightning_dp.data import Shift
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPMix
from tests.data.made import Generated
from tests.methods.runs import STEPS, fit, make_data, make_module, weights
from tests.methods.test_resume import checkpoints, interrupted

VIEWS = {"k_base": 3, "k_self": 2, "k_diff": 1}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A TensorBoard logger, and what was drawn on it by tag."""
    logger, grids = TensorBoardLogger(tmp_path, name=""), {}
    monkeypatch.setattr(logger.experiment, "add_image", lambda tag, grid, step: grids.update({tag: grid}))
    return logger, grids


def run(folder, logger, pictures, **data):
    settings = {"augment": Shift(1), "synthetic": Generated(), **data}
    module = make_module(method=DPMix, **(VIEWS if settings["synthetic"] else {**VIEWS, "k_diff": 0}))
    return fit(folder, module, make_data(**settings), callbacks=[pictures, PrivacyCard()], logger=logger)


def cell(grid, row, column):
    """One image of a grid of 8 x 8 pixels with a margin of 2."""
    return grid[0, 2 + 10 * row :, 2 + 10 * column :][:8, :8]


def test_grids_are_of_public_records_and_of_synthetic_images(tmp_path, drawn):
    logger, grids = drawn
    module = run(tmp_path, logger, Pictures(records=5))
    data = module.datamodule
    assert set(grids) == {f"pictures/{tag}" for tag in ("records", "views", "synthetic", "mixtures")}
    widths = {"records": 1, "views": 3, "synthetic": 1, "mixtures": 2}
    public = data.role("public").images.float() / 255
    for tag, columns in widths.items():
        assert grids[f"pictures/{tag}"].shape == (3, 2 + 10 * 5, 2 + 10 * columns)
    for row in range(5):
        torch.testing.assert_close(cell(grids["pictures/records"], row, 0), public[row, 0], rtol=0, atol=1e-4)
        own = Shift(1)(public[row].expand(9, 1, 8, 8), torch.cartesian_prod(*[torch.tensor([0.1, 0.5, 0.9])] * 2))
        view = cell(grids["pictures/views"], row, 2)
        assert min((view - shifted[0]).abs().max() for shifted in own) < 1e-4


def test_nothing_changes_and_no_private_image_is_drawn(tmp_path, drawn):
    logger, grids = drawn
    module = run(tmp_path / "with", logger, Pictures())
    settings = {"augment": Shift(1), "synthetic": Generated()}
    without = fit(tmp_path / "without", make_module(method=DPMix, **VIEWS), make_data(**settings))
    assert torch.equal(weights(module), weights(without))
    private = module.datamodule.role("private").images.float() / 255
    for row in range(8):
        assert (private[:, 0] - cell(grids["pictures/records"], row, 0)).abs().amax((1, 2)).min() > 0.05
    outside = make_card(module.trainer, module)["outside_the_guarantee"]
    assert not [line for line in outside if "picture" in line]


def test_private_records_are_drawn_on_request_and_confessed(tmp_path, drawn):
    logger, grids = drawn
    module = run(tmp_path, logger, Pictures(private_records=3))
    private = module.datamodule.role("private").images.float() / 255
    torch.testing.assert_close(cell(grids["pictures/private_records"], 2, 0), private[2, 0], rtol=0, atol=1e-4)
    outside = make_card(module.trainer, module)["outside_the_guarantee"]
    assert outside[0].startswith("pictures of 3 private records")


def test_a_resumed_run_still_confesses_what_was_drawn(tmp_path):
    """Same log folder, without the callback: the card is written anew."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    path = interrupted(tmp_path, extra=[Pictures(private_records=3)], logger=logger)
    for _ in range(2):  # also one that goes on from there
        callbacks = [PrivacyCard(), checkpoints(tmp_path)]
        fit(tmp_path, make_module(), None, path, callbacks=callbacks, logger=logger, enable_checkpointing=True)
        card = json.loads((tmp_path / "privacy_card.json").read_text())
        drawn = [line for line in card["outside_the_guarantee"] if line.startswith("pictures of 3 private records")]
        assert len(drawn) == 1
        path = tmp_path / "last.ckpt"


def test_without_public_and_synthetic_records_there_is_a_line_and_no_grid(tmp_path, drawn, caplog):
    logger, grids = drawn
    with caplog.at_level(logging.INFO):
        module = run(tmp_path, logger, Pictures(), synthetic=None, public_per_class=0, audit=200)
    assert grids == {}
    assert len([record for record in caplog.records if "no pictures" in record.getMessage()]) == 1
    assert len(module.mechanism.ledger) == STEPS


def test_features_are_not_drawn(tmp_path, drawn, caplog):
    logger, grids = drawn
    module = make_module(net=nn.Linear(64, 10))
    with caplog.at_level(logging.INFO):
        fit(tmp_path, module, make_data(encoder=nn.Flatten()), callbacks=[Pictures()], logger=logger)
    assert grids == {}
    assert "no pictures: data.encoder" in caplog.text


def test_other_methods_show_their_augmentation(tmp_path, drawn):
    logger, grids = drawn
    fit(tmp_path, data=make_data(augment=Shift(1)), callbacks=[Pictures(2)], logger=logger)
    assert set(grids) == {"pictures/records", "pictures/views"}


@pytest.mark.parametrize("settings", [{"records": 0}, {"private_records": -1}])
def test_impossible_numbers_are_refused(settings):
    with pytest.raises(ConfigError, match=r"Pictures\.records must be at least 1"):
        Pictures(**settings)

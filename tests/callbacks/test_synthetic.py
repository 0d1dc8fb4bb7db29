"""What is shown of a synthetic set, and what it teaches; none of it changes the run."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dp.callbacks import ReleaseAccuracy, SyntheticImages, TaskAccuracy
from lightning_dp.callbacks.synthetic import taught_accuracy
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, ReleaseTraining, Tasks
from lightning_dp.models import ConvNet
from tests.methods.test_psg import PRIVACY, fit, make, partial

TASKS = Tasks([[0, 1], [2, 3]])
TRAINING = ReleaseTraining(epochs=3)


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_pictures_and_accuracy_are_logged_and_nothing_else_changes(tmp_path):
    board = TensorBoardLogger(tmp_path, name=None, version="v")
    watching = [SyntheticImages(4), ReleaseAccuracy(4, TRAINING)]
    watched = fit(tmp_path, make(outer_loops=2, inner_epochs=1), callbacks=watching, logger=board)
    plain = fit(tmp_path / "plain", make(outer_loops=2, inner_epochs=1))
    assert torch.equal(watched.images, plain.images)
    found = events(tmp_path / "v")
    assert [event.step for event in found.Images("release/images")] == [4, 8, 8]
    accuracies = found.Scalars("release/accuracy")
    assert [event.step for event in accuracies] == [4, 8]
    assert accuracies[1].value == pytest.approx(taught_accuracy(watched, TRAINING, list(range(10))), abs=1e-5)
    with Image.open(tmp_path / "v" / "release" / "images.png") as picture:
        assert picture.size == (2 * (8 + 2) + 2, 10 * (8 + 2) + 2)  # two images a row, one row a class


@pytest.mark.parametrize("method", ["psg", "dpsgd"])
def test_accuracy_is_taken_after_each_task_among_the_classes_seen(tmp_path, method):
    privacy = replace(PRIVACY, steps=40, expected_batch_size=600, noise_multiplier=0.2)
    if method == "psg":
        settings = {"matched": ["head."], "releases_per_point": 1, "updates_per_release": 5}
        module = make(privacy, tasks=TASKS, optimizer=partial(torch.optim.SGD, lr=5.0), **settings)
    else:
        net = ConvNet(1, 8, 10, width=8, depth=1)
        module = DPSGD(net, partial(torch.optim.SGD, lr=2.0), privacy=privacy, tasks=TASKS)
    board = TensorBoardLogger(tmp_path, name=None, version="v")
    fit(tmp_path, module, callbacks=[TaskAccuracy(ReleaseTraining(epochs=200))], logger=board)
    accuracies = json.loads((tmp_path / "v" / "tasks.json").read_text())["accuracy"]
    assert len(accuracies) == 2
    assert accuracies[0] > 0.9  # two classes
    assert accuracies[1] < accuracies[0]
    # what comes last is remembered by DP-SGD, and forgets the first task; images are kept
    assert (accuracies[1] > 0.7) == (method == "psg")
    found = events(tmp_path / "v")
    assert [event.step for event in found.Scalars("tasks/accuracy")] == [1, 2]
    assert found.Tags()["images"] == ["tasks/curve"]


def test_refusals():
    for callback in (SyntheticImages, ReleaseAccuracy):
        with pytest.raises(ConfigError, match="at least 1"):
            callback(every_n_steps=0)

"""Reference models of `attack.py`: trained as a run was, on random halves of its private and audit records."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_dp.data import DPDataModule, Records, content_hashes
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, Classifier
from lightning_dp.models import LinearHead

_FIT = (sys.executable, "-m", "lightning_dp", "fit")
_CHUNK = 1000


@dataclass(frozen=True)
class Game:
    """Who is under attack, and who is in which half.

    Args:
        pool: all records that references may be trained on; their features or images.
        halves: (k, pool), boolean.
        asked: numbers of the records under attack in the pool, (n,).
        member: whether these are private, (n,).
        rows: rows of the pool in the training side of the source.
    """

    pool: Records
    halves: np.ndarray
    asked: np.ndarray
    member: np.ndarray
    rows: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """(k, n)."""
        return np.asarray(self.halves[:, self.asked])

    @property
    def labels(self) -> np.ndarray:
        """(n,)."""
        return np.asarray(self.pool.labels.numpy()[self.asked])


def deal(data: DPDataModule, references: int, records: int, seed: int) -> Game:
    """Choose the records under attack and the halves.

    Args:
        data: of the run, set up with its own split.
        references: how many halves.
        records: members and non-members under attack, at most.
        seed: of the choice.
    """
    draw = np.random.default_rng(seed)
    members, others = data.role("private"), data.role("audit")
    rows = json.loads(Path(str(data.splits)).read_text(encoding="utf-8"))["indices"]
    # twice the private records where there are so many, so that a half is as large as the run's own training set
    chosen = np.sort(draw.permutation(len(others))[: len(members)])
    some = torch.from_numpy(chosen)
    pool = Records(torch.cat([members.images, others.images[some]]), torch.cat([members.labels, others.labels[some]]))
    # a copy of a member is no non-member: whoever occurs twice is in every reference, and not asked about
    alone = ~_copied(pool)
    sides = np.flatnonzero(alone[: len(members)]), len(members) + np.flatnonzero(alone[len(members) :])
    size = min(records, *map(len, sides))
    asked = np.concatenate([draw.permutation(side)[:size] for side in sides])
    # each record in exactly half of the models, so that both sides of it are known
    halves = draw.random((references, len(pool))).argsort(0) < references // 2
    halves[:, ~alone] = True
    places = np.concatenate([rows["private"], np.array(rows["audit"])[chosen]])
    return Game(pool, halves, asked, np.arange(2 * size) < size, places)


def _copied(pool: Records) -> np.ndarray:
    """Which records have a twin by content, boolean (pool,)."""
    _, group, counts = np.unique(content_hashes(pool.images), return_inverse=True, return_counts=True)
    return np.asarray(counts[group] > 1)


def many_heads(
    run: Path, config: dict[str, Any], data: DPDataModule, model: Classifier, head: LinearHead, game: Game, seed: int
) -> list[nn.Module]:
    """All reference heads at once: one product per step for all of them, batches in common, noise for each."""
    privacy, sigma = config["privacy"], noise_multiplier(run, config)
    with torch.no_grad():
        features = torch.cat([head.features(data.normalize(part)) for part in torch.split(game.pool.images, _CHUNK)])
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    heads, classes = len(game.halves), head.linear.out_features
    weights = nn.Parameter(torch.zeros(heads, classes, inputs.shape[1]))
    optimizer: Any = model.make_optimizer(iter([weights]))
    schedule: Any = None if model.make_scheduler is None else model.make_scheduler(optimizer)
    private, batch = isinstance(model, DPSGD), privacy["expected_batch_size"]
    rate = min(1.0, batch / game.halves[0].sum())
    draw, noise = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    halves = torch.from_numpy(game.halves.T.copy()).float()
    lengths = inputs.norm(dim=1)
    bound = float(privacy["max_norm"] or np.inf)
    for _ in tqdm(range(privacy["steps"]), desc=f"{heads} reference heads"):
        rows = torch.from_numpy(np.flatnonzero(draw.random(len(inputs)) < rate))
        there, labels = inputs[rows], game.pool.labels[rows]
        with torch.no_grad():
            logits = (there @ weights.view(heads * classes, -1).T).view(len(rows), heads, classes)
            errors = logits.softmax(2)
            errors[torch.arange(len(rows)), :, labels] -= 1
            factors = halves[rows]
            if private:
                norms = errors.norm(dim=2) * lengths[rows, None]
                clipping = bound / norms.clamp(min=1e-12)
                factors = factors * (clipping if privacy["clipping"] == "automatic" else clipping.clamp(max=1))
            total = ((errors * factors[:, :, None]).view(len(rows), -1).T @ there).view_as(weights)
            if private and sigma > 0:
                total += sigma * bound * torch.randn(weights.shape, generator=noise)
            weights.grad = total / batch
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return [_with_weights(head, weights[j].detach()) for j in range(heads)]


def _with_weights(head: LinearHead, weights: Tensor) -> nn.Module:
    made = nn.Linear(weights.shape[1] - 1, len(weights))
    with torch.no_grad():
        made.weight.copy_(weights[:, :-1])
        made.bias.copy_(weights[:, -1])
    return _Head(head.features, made)


class _Head(nn.Module):
    def __init__(self, features: Callable[[Tensor], Tensor], linear: nn.Linear) -> None:
        super().__init__()
        self.features, self.linear = features, linear

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(inputs))
        return logits


def fits(run: Path, config: dict[str, Any], model: Classifier, game: Game, folder: Path, seed: int) -> list[nn.Module]:
    """A fit of its own for every reference; those that are there already are read."""
    return [_Stored(model.net, _fit(run, config, game, folder, seed, j)) for j in tqdm(range(len(game.halves)))]


class _Stored(nn.Module):
    """A reference that lies on the disk, read when it is asked."""

    def __init__(self, net: nn.Module, path: Path) -> None:
        super().__init__()
        self.__dict__["net"] = net  # shared by all references: not a part of this module
        self.path = path

    def forward(self, inputs: Tensor) -> Tensor:
        stored = torch.load(self.path, map_location="cpu", weights_only=True)["state_dict"]
        net: nn.Module = self.__dict__["net"]
        net.load_state_dict({name[4:]: value for name, value in stored.items() if name.startswith("net.")})
        logits: Tensor = net.eval()(inputs)
        return logits


def _fit(run: Path, config: dict[str, Any], game: Game, folder: Path, seed: int, number: int) -> Path:
    place = folder / "references" / f"{seed}-{number}"
    found = sorted(place.glob("*/checkpoints/last.ckpt"))
    if found:
        return found[-1]
    privacy, sigma = config["privacy"], noise_multiplier(run, config)
    splits = json.loads((run / "splits.json").read_text(encoding="utf-8"))
    half = game.halves[number]
    unused = np.setdiff1d(splits["indices"]["audit"], game.rows)
    splits["indices"]["audit"] = np.sort(np.concatenate([game.rows[~half], unused])).tolist()
    splits["indices"]["private"] = np.sort(game.rows[half]).tolist()
    place.mkdir(parents=True, exist_ok=True)
    (place / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    size = int(half.sum())
    given = {
        "data.init_args.splits": place / "splits.json",
        "privacy.num_examples": size,
        "privacy.expected_batch_size": min(size, privacy["expected_batch_size"]),
        "privacy.epsilon": "null",
        "privacy.noise_multiplier": sigma,
        "privacy.seed": "null",
        "seed_everything": seed * 1000 + number + 1,
        "trainer.logger": "TensorBoardLogger",
        "trainer.logger.init_args.save_dir": place,
        "trainer.logger.init_args.name": "null",
        "trainer.callbacks": "[{class_path: ModelCheckpoint, init_args: {save_last: true}}]",
        "trainer.enable_progress_bar": "false",
    }
    words = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run([*_FIT, "-c", str(run / "config.yaml"), *words], capture_output=True, text=True, check=False)
    found = sorted(place.glob("*/checkpoints/last.ckpt"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"reference model {number} could not be trained: {last}")
    return found[-1]


def noise_multiplier(run: Path, config: dict[str, Any]) -> float:
    """The one that the run was made with; 0 for a method without privacy, which has no card."""
    card = run / "privacy_card.json"
    if card.is_file():
        return float(json.loads(card.read_text(encoding="utf-8"))["noise_multiplier"])
    if config["model"]["class_path"].rsplit(".", 1)[-1] != "SGD":
        raise ConfigError(f"{card} is missing: --run must be a run that ended with its card")
    return 0.0

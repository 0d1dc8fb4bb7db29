"""``lightning-dp attack``: membership inference with reference models against a finished run.

Reference models are trained as the run was, on random halves of the run's private and audit records. Where the model
is a linear head, all are trained at once; otherwise each is a ``lightning-dp fit`` of its own, and an attack that was
stopped goes on where it was. What comes out is computed from private records without noise: it is written into the
folder ``private`` of the run, and is not for release.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from scipy.special import expit
from torch import nn

from lightning_dp.callbacks.meaning import cap_of
from lightning_dp.data import Augmentation, DPDataModule, Records
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, SGD, Classifier
from lightning_dp.models import LinearHead
from lightning_dp.privacy import Release, attacks
from lightning_dp.privacy.auditing import TradeOff, roc
from lightning_dp.references import Game, deal, fits, many_heads

_CHUNK = 1000
_FPRS = (0.1, 0.01, 0.001)
_FEW = 4


def attack(
    run: Path,
    references: int = 64,
    records: int = 10_000,
    queries: int = 1,
    augment: Augmentation | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Attack a finished run and print what LiRA, RMIA, shadow models and thresholds find.

    Args:
        run: log directory of the run, with config.yaml, splits.json and checkpoints/last.ckpt.
        references: reference models. LiRA wants 64; RMIA makes do with 1 to 4.
        records: members and non-members under attack, at most, as many of each.
        queries: views of each record that LiRA asks for, the first unchanged; more than 1 need ``augment``.
        augment: random change of an image for the other views.
        seed: of random halves, views and reference models.
        output: folder for results; null: ``private`` below the run.

    Raises:
        ConfigError: the run is not whole, or the settings contradict each other.
    """
    if references < 2 or records < 10 or queries < 1 or (queries > 1 and augment is None):
        raise ConfigError("--references must be 2 or more, --records 10 or more; --queries above 1 needs --augment")
    folder = run / "private" if output is None else output
    config, data, model = _open(run)
    game = deal(data, references, records, seed)
    views = _Views(data, augment, queries, seed)
    target = views.logits(model.net, game)
    if isinstance(model, DPSGD | SGD) and type(model.net) is LinearHead and data.augment is None:
        known = many_heads(run, config, data, model, model.net, game, seed)
        others = np.stack([views.logits(net, game) for net in known])
    else:
        others = np.stack([views.logits(net, game) for net in fits(run, config, model, game, folder, seed)])
    folder.mkdir(parents=True, exist_ok=True)
    test = data.role("test")
    report, scores = _report(target, others, game, views.logits_of(model.net, test), test.labels.numpy(), _cap(run))
    np.savez_compressed(folder / "attack.npz", members=game.member, **scores)  # type: ignore[arg-type]  # names, no flags
    (folder / "attack.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(_table(report))
    print(f"not for release: {folder / 'attack.json'}")


def _open(run: Path) -> tuple[dict[str, Any], DPDataModule, Classifier]:
    """Configuration, data and trained model of a run."""
    for name in ("config.yaml", "splits.json", "checkpoints/last.ckpt"):
        if not (run / name).is_file():
            raise ConfigError(f"{run / name} is missing: --run must be the log directory of a fit that ran to its end")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DPDataModule, "data")
    parser.add_subclass_arguments(Classifier, "model")
    made = parser.instantiate_classes(parser.parse_object({key: config[key] for key in ("data", "model")}))
    data, model = made.data, made.model
    data.splits = run / "splits.json"
    data.prepare_data()
    data.setup("test")
    if not data.roles()["audit"]:
        raise ConfigError("the run held no records out: train it with data.audit")
    stored = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    weights = {name[4:]: value for name, value in stored["state_dict"].items() if name.startswith("net.")}
    model.net.load_state_dict(weights)
    return config, data, model.eval()


class _Views:
    """The views of every record that a model is asked about; the same for all models."""

    def __init__(self, data: DPDataModule, augment: Augmentation | None, queries: int, seed: int) -> None:
        self.data, self.augment, self.queries, self.seed = data, augment, queries, seed

    def logits(self, net: nn.Module, game: Game) -> np.ndarray:
        """(queries, n, classes) of the records under attack."""
        rows = torch.from_numpy(game.asked)
        chosen = Records(game.pool.images[rows], game.pool.labels[rows])
        return np.stack([self.logits_of(net, chosen, query) for query in range(self.queries)])

    @torch.no_grad()
    def logits_of(self, net: nn.Module, records: Records, query: int = 0) -> np.ndarray:
        """(n, classes) of any records, in float64."""
        found = []
        generator = torch.Generator().manual_seed(self.seed * 1000 + query)
        for images in torch.split(records.images, _CHUNK):
            inputs = self.data.normalize(images)
            if query and self.augment is not None:
                inputs = self.augment(inputs, torch.rand(len(inputs), self.augment.num_coins, generator=generator))
            found.append(net(inputs).double())
        return torch.cat(found).numpy()


def _cap(run: Path) -> TradeOff | None:
    """What the ledger of the run allows; None without a guarantee."""
    card = run / "privacy_card.json"
    if not card.is_file():
        return None
    found = json.loads(card.read_text(encoding="utf-8"))
    if found["epsilon"] is None:
        return None
    releases = [Release(*row) for row in found["releases"]]
    return cap_of(releases, found["adjacency"])


def _scores(target: np.ndarray, others: np.ndarray, game: Game) -> dict[str, np.ndarray]:
    """Score of every attack on the records, (n,).

    ``target`` has logits (queries, n, classes), ``others`` (k, queries, n, classes). RMIA takes its
    population from the non-members under attack.
    """
    own, known = (attacks.log_odds(logits, game.labels) for logits in (target, others))
    likely, general = expit(own[0]), expit(known[:, 0])
    inside, population = game.inside, np.flatnonzero(~game.member)
    found = {
        "loss": own[0],
        "lira_offline": attacks.lira(own, known, inside, online=False),
        "lira_online": attacks.lira(own, known, inside, online=True),
        "rmia_offline": attacks.rmia(likely, general, inside, population, online=False),
        "rmia_online": attacks.rmia(likely, general, inside, population, online=True),
        "shadow": attacks.shadow(target[0], others[:, 0], inside, game.labels),
    }
    # with few references: the first so many that leave every record one model without it
    few = max(_FEW, 1 + int(np.argmax((~inside).cumsum(0).min(1) > 0)))
    found[f"rmia_offline_{few}"] = attacks.rmia(likely, general[:few], inside[:few], population, online=False)
    return found


def _report(
    target: np.ndarray,
    others: np.ndarray,
    game: Game,
    population: np.ndarray,
    labels: np.ndarray,
    cap: TradeOff | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of every attack, with a control that cannot know the members: the first reference as the target."""
    scores = _scores(target, others, game)
    rest = replace(game, halves=game.halves[1:])
    control = _scores(others[0], others[1:], rest) if len(game.halves) > _FEW + 1 else {}
    figures: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        found = roc(values[game.member], values[~game.member])
        figures[name] = {"auc": found.auc, "auc_error": found.auc_error, "advantage": found.advantage}
        if name in control:
            figures[name]["control_auc"] = roc(control[name][game.member], control[name][~game.member]).auc
        for fpr in _FPRS:
            rate = found.tpr_at(fpr)
            figures[name][f"tpr_at_fpr_{fpr:g}"] = (
                None if math.isnan(rate.value) else {"value": rate.value, "low": rate.low, "high": rate.high}
            )
    thresholds = {}
    for fpr in _FPRS:
        called = attacks.population_threshold(scores["loss"], attacks.log_odds(population, labels), fpr)
        thresholds[f"{fpr:g}"] = {"tpr": float(called[game.member].mean()), "fpr": float(called[~game.member].mean())}
    report: dict[str, Any] = {
        "outside_the_guarantee": "computed from private records without noise: not for release",
        "members": int(game.member.sum()),
        "non_members": int((~game.member).sum()),
        "references": len(game.halves),
        "attacks": figures,
        "attack_p": thresholds,
        "caps": None,
    }
    if cap is not None:
        report["caps"] = {"auc": cap.largest_auc(), **{f"tpr_at_fpr_{fpr:g}": cap.most_power(fpr) for fpr in _FPRS}}
    return report, scores


def _table(report: dict[str, Any]) -> str:
    lines = ["| attack | AUC | control | TPR at FPR 10 % | 1 % | 0.1 % |", "|---|---|---|---|---|---|"]
    for name, found in report["attacks"].items():
        rates = [found[f"tpr_at_fpr_{fpr:g}"] for fpr in _FPRS]
        cells = [
            "-" if rate is None else f"{rate['value']:.4f} [{rate['low']:.4f}, {rate['high']:.4f}]" for rate in rates
        ]
        control = f"{found['control_auc']:.4f}" if "control_auc" in found else "-"
        lines.append(f"| {name} | {found['auc']:.4f} ± {found['auc_error']:.4f} | {control} | {' | '.join(cells)} |")
    if report["caps"] is not None:
        caps = [f"{report['caps'][f'tpr_at_fpr_{fpr:g}']:.4f}" for fpr in _FPRS]
        lines.append(f"| cap by the ledger | {report['caps']['auc']:.4f} | - | {' | '.join(caps)} |")
    return "\n".join(lines) + "\n"

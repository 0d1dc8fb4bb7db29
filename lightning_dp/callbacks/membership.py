"""Membership inference against the model of the run, with intervals, a blind control and the caps of its own ledger."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_dp.callbacks import page
from lightning_dp.callbacks.meaning import cap_of
from lightning_dp.data import Records
from lightning_dp.errors import ConfigError
from lightning_dp.methods import Classifier, DPModule
from lightning_dp.privacy.accounting import Adjacency
from lightning_dp.privacy.auditing import Rate, Roc, TradeOff, roc

_FOLDER = "private"
_CHUNK = 500

Scores = dict[str, tuple[np.ndarray, np.ndarray]]
"""Attack -> scores of members and of non-members."""


@final
class MembershipInference(Callback):
    """Attacks the trained network with records that were trained on, and others of the same law that were not.

    Members are a fixed random part of the private role, non-members the audit role; both without augmentation. Scores:
    loss (Yeom et al. 2018), margin, entropy and modified entropy (Song and Mittal 2021), all recalled. The blind
    control is the same attack on the weights before the first step, which cannot know the members: what it finds is a
    difference of the two sets, not leakage.

    The results are computed from private records without noise: **outside the guarantee**. They go into the folder
    ``private`` of the log directory, to no logger, so nothing can be monitored by them; the card says that they exist.
    Weights are bit for bit those of a run without it.

    Args:
        records: members, and non-members, at most.
        every_n_steps: steps between two attacks besides the one at the end; None for none.
        fprs: false positive rates at which the true positive rate is given, where 10 or more false alarms make it up.

    Raises:
        ConfigError: a number is out of range; at the start of a fit, there are no audit records.
    """

    def __init__(
        self, records: int = 10_000, every_n_steps: int | None = None, fprs: Sequence[float] = (0.1, 0.01, 0.001)
    ) -> None:
        if records < 2 or (every_n_steps is not None and every_n_steps < 1) or not all(0 < fpr < 1 for fpr in fprs):
            raise ConfigError(
                "MembershipInference.records must be at least 2, every_n_steps at least 1, fprs in (0, 1)"
            )
        self.records = records
        self.every_n_steps = every_n_steps
        self.fprs = tuple(fprs)
        self._blind: Scores | None = None
        self._over_epsilon: list[tuple[float, float, float]] = []
        self._folder = Path(_FOLDER)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder while every rank takes part."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / _FOLDER

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the records, and attack the initial weights."""
        if not isinstance(pl_module, Classifier):
            return
        data = pl_module.datamodule
        if not data.roles()["audit"]:
            raise ConfigError("MembershipInference needs records that were never trained on: set data.audit")
        members, others = data.role("private"), data.role("audit")
        choice = np.random.default_rng(0)
        self._members, self._others = (
            _some(records, choice.permutation(len(records))[: self.records]) for records in (members, others)
        )
        if isinstance(pl_module, DPModule):
            pl_module.disclose(
                f"membership inference on {len(self._members)} private records is in the folder {_FOLDER} "
                "(MembershipInference)"
            )
        self._blind = None
        self._over_epsilon = []
        if trainer.is_global_zero and trainer.global_step == 0:
            self._blind = attack_scores(pl_module, self._members, self._others)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Attack now and then."""
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due and isinstance(pl_module, Classifier) and trainer.is_global_zero:
            self._follow(pl_module, attack_scores(pl_module, self._members, self._others))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack the final weights, and write everything."""
        if not isinstance(pl_module, Classifier) or not trainer.is_global_zero:
            return
        scores = attack_scores(pl_module, self._members, self._others)
        self._follow(pl_module, scores)
        self._write(trainer, pl_module, scores)

    def _follow(self, module: Classifier, scores: Scores) -> None:
        if isinstance(module, DPModule):
            found = roc(*scores["loss"])
            self._over_epsilon.append((module.mechanism.epsilon(), found.auc, found.auc_error))

    def _write(self, trainer: Trainer, module: Classifier, scores: Scores) -> None:
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        cap = ledger_cap(module) if isinstance(module, DPModule) else None
        curves = {name: roc(*sides) for name, sides in scores.items()}
        blind = {name: roc(*sides) for name, sides in (self._blind or {}).items()}
        report: dict[str, Any] = {
            "outside_the_guarantee": "computed from private records without noise: not for release",
            "members": len(self._members.labels),
            "non_members": len(self._others.labels),
            "guarantee": module.mechanism.summary() if isinstance(module, DPModule) else None,
            "caps": None if cap is None else self._caps(cap),
            "attacks": {name: self._figures(found, blind.get(name)) for name, found in curves.items()},
        }
        (folder / "membership.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        arrays = {
            f"{name}_{side}": part for name, pair in scores.items() for side, part in zip(_SIDES, pair, strict=True)
        }
        if self._blind is not None:
            for name, pair in self._blind.items():
                arrays |= {f"blind_{name}_{side}": part for side, part in zip(_SIDES, pair, strict=True)}
        np.savez_compressed(folder / "membership.npz", **arrays)  # type: ignore[arg-type]  # names, no flags
        with SummaryWriter(folder) as board:  # apart from the run's logger
            for name, found in curves.items():
                board.add_scalar(f"mia/{name}/auc", found.auc, trainer.global_step)
            figures = {"roc": _roc_figure(curves, cap), "scores": _score_figure(scores["loss"])}
            if self._over_epsilon:
                figures["auc_over_epsilon"] = _trajectory_figure(self._over_epsilon)
            self._page(folder, report, figures)
            for tag, figure in figures.items():
                figure.savefig(folder / f"{tag}.png", dpi=110, bbox_inches="tight")
                board.add_figure(f"mia/{tag}", figure, trainer.global_step)
        loss = report["attacks"]["loss"]
        rank_zero_info(
            f"membership inference (loss): AUC {loss['auc']:.4f} ± {loss['auc_error']:.4f}"
            + (f", blind {loss['blind_auc']:.4f}" if blind else "")
            + (f", at most {report['caps']['auc']:.4f} by the ledger" if cap is not None else "")
        )

    def _page(self, folder: Path, report: dict[str, Any], figures: dict[str, Figure]) -> None:
        """The same as a web page in one file."""
        names = list(report["attacks"]["loss"])
        rows = [[name, *(_cell(figures.get(key)) for key in names)] for name, figures in report["attacks"].items()]
        if report["caps"] is not None:
            rows.append(["at most, by the ledger", *(_cell(report["caps"].get(key)) for key in names)])
        text = f"{report['members']} members, {report['non_members']} others; {report['guarantee'] or 'no guarantee'}."
        parts = [
            page.lead("Computed from private records without noise: not for release.", warning=True),
            page.paragraph(text),
            page.table(rows, ["attack", *names]),
            *(page.picture(figure, tag) for tag, figure in figures.items()),
        ]
        whole = page.page("Membership inference", parts)
        (folder / "membership.html").write_text(whole, encoding="utf-8")

    def _figures(self, found: Roc, blind: Roc | None) -> dict[str, Any]:
        rates = {f"tpr_at_fpr_{fpr:g}": _rate(found.tpr_at(fpr)) for fpr in self.fprs}
        control = {} if blind is None else {"blind_auc": blind.auc, "auc_minus_blind": found.auc - blind.auc}
        return {"auc": found.auc, "auc_error": found.auc_error, "advantage": found.advantage, **control, **rates}

    def _caps(self, cap: TradeOff) -> dict[str, float]:
        rates = {f"tpr_at_fpr_{fpr:g}": cap.most_power(fpr) for fpr in self.fprs}
        return {"auc": cap.largest_auc(), "advantage": cap.largest_advantage(), **rates}


_SIDES = ("members", "non_members")


@torch.no_grad()
def attack_scores(module: Classifier, members: Records, others: Records) -> Scores:
    """Scores of both sides by every attack; higher means member. The modules' modes are put back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    sides = [
        membership_scores(
            torch.cat([
                module(module.datamodule.normalize(images.to(module.device))).double().cpu()
                for images in torch.split(side.images, _CHUNK)
            ]),
            side.labels,
        )
        for side in (members, others)
    ]  # fmt: skip
    for part, training in modes.items():
        part.training = training
    return {name: (sides[0][name], sides[1][name]) for name in sides[0]}


def membership_scores(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Scores of the attacks that need nothing but the model: float64 (n,), higher means member.

    Args:
        logits: (n, classes), float64.
        labels: (n,).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
        >>> {name: values.round(3).tolist() for name, values in membership_scores(logits, torch.tensor([0, 0])).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'loss': [2.0, -1.0], 'margin': [2.0, -1.0], 'entropy': [-0.365, -0.582],
         'modified_entropy': [-0.03, -1.92]}
    """
    logs = logits.log_softmax(1)
    rows = torch.arange(len(labels))
    own, probabilities = logs[rows, labels], logs.exp()
    others = logits.clone()
    others[rows, labels] = -math.inf
    # log(1 - p), the label's from the sum over the others, which does not cancel
    rest = torch.log1p(-probabilities.clamp(max=1 - 1e-16))
    rest[rows, labels] = torch.logsumexp(others, 1) - torch.logsumexp(logits, 1)
    wrong = probabilities * rest
    wrong[rows, labels] = 0.0
    entropy = (probabilities * logs).sum(1)
    scores = {
        # as log odds, which order as the loss does and never round to 0
        "loss": logits[rows, labels] - torch.logsumexp(others, 1),
        "margin": logits[rows, labels] - others.amax(1),
        "entropy": entropy,
        "modified_entropy": rest[rows, labels].exp() * own + wrong.sum(1),
    }
    return {name: values.numpy() for name, values in scores.items()}


def ledger_cap(module: DPModule, adjacency: Adjacency | None = None) -> TradeOff | None:
    """What the ledger of the run allows any attack, by its own adjacency or another; None without a guarantee."""
    mechanism = module.mechanism
    if not math.isfinite(mechanism.epsilon()):
        return None
    which = mechanism.config.adjacency if adjacency is None else adjacency
    return cap_of(list(mechanism.ledger.releases), which)


def _some(records: Records, rows: np.ndarray) -> Records:
    chosen = torch.from_numpy(rows)
    return Records(records.images[chosen], records.labels[chosen])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value or "-")


def _rate(rate: Rate) -> dict[str, float] | str:
    if math.isnan(rate.value):
        return "too few non-members for this rate"
    return {"value": rate.value, "low": rate.low, "high": rate.high}


def _roc_figure(curves: dict[str, Roc], cap: TradeOff | None) -> Figure:
    figure, axes = plt.subplots(figsize=(4.5, 4))
    least = 1 / max(found.non_members for found in curves.values())
    grid = np.geomspace(least, 1, 200)
    for name, found in curves.items():
        axes.step(np.maximum(found.fpr, least), np.maximum(found.tpr, least), where="post", label=name, linewidth=1)
    axes.plot(grid, grid, color="grey", linewidth=0.8, label="guessing")
    if cap is not None:
        axes.plot(grid, [cap.most_power(fpr) for fpr in grid], "k--", linewidth=1, label="cap by the ledger")
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(fontsize=7)
    return figure


def _score_figure(sides: tuple[np.ndarray, np.ndarray]) -> Figure:
    figure, axes = plt.subplots(figsize=(4.5, 3))
    bins = np.histogram_bin_edges(np.concatenate(sides), 60).tolist()
    for part, name in zip(sides, _SIDES, strict=True):
        axes.hist(part, bins=bins, histtype="step", density=True, label=name.replace("_", "-"))
    axes.set(xlabel="minus the loss", ylabel="density", yscale="log")
    axes.legend(fontsize=7)
    return figure


def _trajectory_figure(points: list[tuple[float, float, float]]) -> Figure:
    figure, axes = plt.subplots(figsize=(4.5, 3))
    epsilons, aucs, errors = zip(*points, strict=True)
    axes.errorbar(epsilons, aucs, yerr=errors, marker="o", capsize=2)
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set(xlabel="epsilon spent", ylabel="AUC of the loss attack")
    return figure

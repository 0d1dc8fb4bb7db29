"""The privacy card: what a run released and what that guarantees, as JSON for programs and Markdown for people."""

import dataclasses
import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_dp.callbacks import page
from lightning_dp.callbacks.audit import CanaryAudit
from lightning_dp.callbacks.audit import sentence as audit_sentence
from lightning_dp.callbacks.conformance import Conformance
from lightning_dp.callbacks.meaning import cap_of, meaning
from lightning_dp.data import DPDataModule
from lightning_dp.methods import DPModule
from lightning_dp.privacy import Mechanism, Release, epsilon
from lightning_dp.privacy.accounting import SMALLEST_FFT_DELTA

_SECTIONS = ("releases", "meaning", "evidence", "metrics", "data", "versions")
_SENTENCES = {
    "add_remove": "adding or removing one {unit}",
    "replace_one": "replacing one {unit} by another",
}


class PrivacyCard(Callback):
    """Writes ``privacy_card.json``, ``privacy_card.md`` and ``privacy_card.html`` into the log directory.

    Written at the end of every fit, also of an interrupted or failed one, and again after a test in the same process,
    with its metrics. Everything on it is public: configuration, the ledger, and metrics of public or test data.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder while every rank takes part; after a failure the ranks can no longer ask each other."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the card of a fit that ran to its end."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the card of a fit that was stopped."""
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the card again, with the metrics of the test."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder
        if folder is None or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, DPModule) or not pl_module.was_trained:
            return
        card = make_card(trainer, pl_module)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "privacy_card.json": json.dumps(card, indent=2) + "\n",
            "privacy_card.md": to_markdown(card),
            "privacy_card.html": to_html(card),
        }
        release = folder / "release"  # published data travel with a card of their own
        for place in (folder, release) if release.is_dir() else (folder,):
            for name, text in texts.items():
                # Replaced whole, so that an interrupt leaves the old card or the new one.
                draft = place / f".{name}.draft"
                draft.write_text(text, encoding="utf-8")
                os.replace(draft, place / name)
        rank_zero_info(f"privacy card: {folder / 'privacy_card.md'}")


def make_card(trainer: Trainer, module: DPModule) -> dict[str, Any]:
    """The card as plain JSON values; epsilon is null where there is no guarantee (infinite)."""
    mechanism = module.mechanism
    config = mechanism.config
    second, second_accountant = mechanism.second_opinion()
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
    data = datamodule.describe() if isinstance(datamodule, DPDataModule) else {}
    private_validation = isinstance(datamodule, DPDataModule) and datamodule.validation_is_private
    return {
        "method": type(module).__name__,
        "epsilon": _finite(mechanism.epsilon()),
        "delta": config.delta,
        "adjacency": config.adjacency,
        "unit": config.unit,
        "accountant": config.accountant,
        "epsilon_second_opinion": _finite(second),
        "second_accountant": second_accountant,
        "epsilon_target": config.epsilon,
        "noise_multiplier": mechanism.noise_multiplier,
        "max_norm": _finite(config.max_norm),
        "clipping": config.clipping,
        "sample_rate": config.sample_rate,
        "expected_batch_size": config.expected_batch_size,
        "num_examples": config.num_examples,
        "steps": config.steps,
        "all_runs_on_these_records": _all_runs(module),
        "releases": [_release(release) for release in mechanism.ledger.releases],
        "ledger": None if mechanism.ledger.path is None else mechanism.ledger.path.name,
        "rng": "; then ".join(mechanism.rng_history),
        "meaning": _meaning(mechanism) if 0 < mechanism.epsilon() < math.inf else None,
        "claims": module.claims(),
        "outside_the_guarantee": [*module.private_diagnostics(), *_outside(private_validation)],
        "evidence": _evidence(trainer),
        "metrics": _metrics(trainer),
        "data": data,
        "precision": trainer.precision,
        "devices": trainer.world_size,
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("lightning_dp", "torch", "pytorch-lightning", "dp-accounting", "opacus")
            },
        },
    }


def to_markdown(card: dict[str, Any]) -> str:
    """The card for people: the guarantee in one sentence, then every number."""
    sentence = f"**{headline(card)}**" if card["epsilon"] is None else headline(card)
    rows = [(key, value) for key, value in card.items() if key not in _SECTIONS]
    lines = ["# Privacy card", "", sentence, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows]
    lines += ["", "## Releases", "", "| noise multiplier | sample rate | count | group |", "|---|---|---|---|"]
    lines += [
        f"| {sigma:.6g} | {rate:.6g} | {count} | {'; '.join(group)} |"
        for sigma, rate, count, *group in card["releases"]
    ]
    if card["meaning"] is not None:
        lines += ["", "## What it means", "", *(f"- {line}" for line in plain(card))]
    for title in ("evidence", "metrics", "data", "versions"):
        lines += ["", f"## {title.capitalize()}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in card[title].items()]
    return "\n".join(lines) + "\n"


def headline(card: dict[str, Any]) -> str:
    """The guarantee in one sentence."""
    unit = card["unit"]
    if card["epsilon"] is None:
        return "NO GUARANTEE: no noise was added, epsilon is infinite."
    return (
        f"The training is ({card['epsilon']:.4g}, {card['delta']:g})-differentially private under "
        f"{_SENTENCES[card['adjacency']].format(unit=unit)} (accountant {card['accountant']}): whatever anyone "
        f"concludes from the released model, they would conclude with nearly the same probability without any "
        f"single {unit}."
    )


def plain(card: dict[str, Any]) -> list[str]:
    """What the guarantee means, in sentences."""
    unit, found = card["unit"], card["meaning"]
    if found is None:
        nothing = "there is no guarantee" if card["epsilon"] is None else "nothing was released"
        return [f"There is nothing to be said: {nothing}."]
    return [
        f"Whoever tries to tell whether one {unit} was there finds at most {100 * found['tpr_at_fpr_0.01']:.1f} % of "
        f"those that were, if 1 % of those that were not may be called members; AUC at most {found['auc']:.3f}, "
        f"advantage (true minus false positive rate) at most {found['membership_advantage']:.3f}.",
        f"From {found['group_size_meaningless']} records of one person on, the guarantee says nothing useful about "
        f"that person.",
        f"Epsilon would be {found['epsilon_without_amplification']:.4g} if it were known who was in which batch; the "
        f"difference rests on the secrecy of the draws.",
    ]


def to_html(card: dict[str, Any]) -> str:
    """The card as a web page in one file, with what the guarantee excludes as a picture."""
    metrics = [[name, f"{value:.4g}"] for name, value in card["metrics"].items()]
    parts = [page.lead(headline(card), warning=card["epsilon"] is None)]
    if metrics:
        parts.append(page.section("How good it is", page.table(metrics)))
    parts.append(page.section("What it means", page.bullets(plain(card))))
    if card["meaning"] is not None:
        parts += [page.picture(figure, text) for figure, text in _figures(card)]
    if card["claims"]:
        parts.append(page.section("As published", page.bullets(card["claims"])))
    parts.append(page.section("Evidence", *_evidence_parts(card["evidence"])))
    parts.append(page.section("Not covered", page.bullets(card["outside_the_guarantee"])))
    rows = [[key, _cell(value)] for key, value in card.items() if key not in (*_SECTIONS, "outside_the_guarantee")]
    parts.append(page.section("All numbers", page.table(rows)))
    releases = [[_cell(value) for value in row] for row in card["releases"]]
    parts.append(page.section("Releases", page.table(releases, ["noise multiplier", "sample rate", "count", "group"])))
    for title in ("data", "versions"):
        cells = [[key, _cell(value)] for key, value in card[title].items()]
        parts.append(page.section(title.capitalize(), page.table(cells)))
    return page.page(f"Privacy card: {card['method']}", parts)


def _evidence_parts(evidence: dict[str, Any]) -> list[str]:
    watched, audit = evidence["conformance"], evidence["audit"]
    parts = [page.paragraph(watched or "The mechanism was not watched while it ran (callback Conformance).")]
    if audit is None:
        return [*parts, page.paragraph("The run was not audited (lightning-dp audit).")]
    rows = [[key, _cell(value)] for key, value in audit.items()]
    return [*parts, page.paragraph(audit_sentence(audit)), page.table(rows)]


def _figures(card: dict[str, Any]) -> list[tuple[Figure, str]]:
    """Epsilon over releases, and the most that a membership attack can reach."""
    releases = [Release(*row) for row in card["releases"]]
    cap = cap_of(releases, card["adjacency"])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = [10 ** (-4 + 4 * i / 200) for i in range(201)]
    left.plot(rates, [cap.most_power(rate) for rate in rates], label="at most")
    left.plot(rates, rates, color="grey", linewidth=0.8, label="guessing")
    left.set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="members found", ylim=(1e-4, 1))
    left.legend(fontsize=8)
    shares = [part / 8 for part in range(1, 9)]
    spent = [_first(releases, share) for share in shares]
    curve = [epsilon(part, card["delta"], card["adjacency"]) for part in spent]
    right.plot([100 * share for share in shares], curve, marker="o", markersize=3)
    right.set(xlabel="share of the releases, %", ylabel=f"epsilon at delta {card['delta']:g} (pld)", ylim=(0, None))
    return [(figure, "Left: the most that an attack on membership can find. Right: epsilon as it was spent.")]


def _first(releases: list[Release], share: float) -> list[Release]:
    return [dataclasses.replace(release, count=max(1, round(share * release.count))) for release in releases]


def _meaning(mechanism: Mechanism) -> dict[str, Any]:
    config = mechanism.config
    return meaning(list(mechanism.ledger.releases), mechanism.epsilon(), config.delta, config.adjacency)


def _all_runs(module: DPModule) -> dict[str, Any] | None:
    """The dataset ledger's total up to this run; epsilon is null where one of them has no guarantee."""
    found, config = module.dataset_ledger, module.mechanism.config
    if found is None or (config.adjacency == "replace_one" and config.delta < SMALLEST_FFT_DELTA):
        return None
    return {"runs": len(found.runs()), "epsilon": _finite(found.epsilon(config.delta, config.adjacency))}


def _release(release: Release) -> list[float | str]:
    """A line of the ledger; with its group if it has one."""
    numbers: list[float | str] = [release.noise_multiplier, release.sample_rate, release.count]
    return [*numbers, release.group] if release.group else numbers


def _outside(private_validation: bool) -> list[str]:
    """What the guarantee does not cover in this run."""
    always = [
        "choice of hyper-parameters by earlier runs on the same records (`lightning-dp ledger` adds them up)",
        "test metrics computed on records that are not part of the private role",
        "access to the machine during training (memory, un-noised sums between processes)",
        "data that public weights or encoders were trained on",
        "the rounding of floating-point noise, unless privacy.secure was set",
    ]
    looked = "validation metrics were computed from private records without noise and are in the logs"
    return [looked, *always] if private_validation else always


def _evidence(trainer: Trainer) -> dict[str, Any]:
    """What callbacks found that may be published: canaries are nobody's records."""
    audits = [callback.result for callback in trainer.callbacks if isinstance(callback, CanaryAudit)]  # type: ignore[attr-defined]
    watches = [callback.summary for callback in trainer.callbacks if isinstance(callback, Conformance)]  # type: ignore[attr-defined]
    return {"conformance": watches[0] if watches else None, "audit": audits[0] if audits else None}


def _metrics(trainer: Trainer) -> dict[str, float]:
    """Logged values of evaluation on roles outside the private one."""
    logged = trainer.callback_metrics
    return {
        name: float(value)
        for name, value in logged.items()
        if name.startswith(("val/", "test/", "val_ema/", "test_ema/"))
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "; ".join(_cell(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)

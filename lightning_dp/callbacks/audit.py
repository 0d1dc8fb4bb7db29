"""One-run audit: guesses on canaries against the claim of the run's own ledger."""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn import functional as F

from lightning_dp.callbacks.membership import ledger_cap
from lightning_dp.data import CanaryDataModule
from lightning_dp.errors import ConfigError
from lightning_dp.methods import Classifier, DPModule, GradientModule
from lightning_dp.models import DiracCanaries
from lightning_dp.privacy import Release
from lightning_dp.privacy.auditing import OneRunAudit, TradeOff, gaussian_mu, judge, roc
from lightning_dp.privacy.clipping import unflatten
from lightning_dp.privacy.sampling import PoissonBatchSampler

_CHUNK = 500


@dataclass
class _Steps:
    """Every step by itself: canaries in the batch against all others, by their own coordinate over the clip norm."""

    inside: int = 0
    outside: int = 0
    misses: int = 0
    alarms: int = 0

    def add(self, values: np.ndarray, in_batch: np.ndarray) -> None:
        """One step: call "in the batch" whatever is above one half."""
        guess = values > 0.5
        self.inside += int(in_batch.sum())
        self.outside += int((~in_batch).sum())
        self.misses += int((~guess & in_batch).sum())
        self.alarms += int((guess & ~in_batch).sum())

    def report(self, noise_multiplier: float, p: float) -> dict[str, Any]:
        """A lower bound on mu of one step, against 1 / noise multiplier."""
        found = gaussian_mu(self.misses, self.inside, self.alarms, self.outside, p)
        claimed = 1 / noise_multiplier
        verdict = "FAIL" if found > claimed else "PASS"
        return {**asdict(self), "mu_lower": found, "mu_claimed": claimed, "verdict": verdict}


@final
class CanaryAudit(Callback):
    """Guesses from what training left behind which canaries of `CanaryDataModule` took part, and judges the claim.

    The claim is the privacy curve of the run's ledger under add-or-remove, or ``claimed_epsilon``. The number of
    guesses is fixed here, before anything is scored. Writes ``audit.json`` into the log directory: a verdict (PASS,
    FAIL or UNDERPOWERED, `OneRunAudit`), bounds on epsilon and what limits them.

    Scores: "black_box": how much the final weights gained on a canary's label, in log odds, over the initial ones.
    "white_box": what the noisy sums have in common with the canary's gradient, added up over all steps; with
    `DiracCanaries` the canary's own coordinate. There every single step is tested besides: whether the noisy sums tell
    canaries in the batch from others better than the noise multiplier allows.

    Args:
        score: as above; "white_box" needs a gradient method on one process.
        guesses: share of the canaries that is guessed on, half of these "in".
        p: level of the verdict: how often a right mechanism may fail.
        claimed_epsilon: claim to be tested, with the delta of the run, in the place of the ledger's.

    Raises:
        ConfigError: a number is out of range; at the start of a fit, the data have no canaries, there is no claim, or
            ``score`` does not go with the method.
    """

    def __init__(
        self,
        score: Literal["black_box", "white_box"] = "black_box",
        guesses: float = 0.1,
        p: float = 1e-3,
        claimed_epsilon: float | None = None,
    ) -> None:
        if not 0 < guesses <= 1 or not 0 < p < 1 or (claimed_epsilon is not None and not claimed_epsilon > 0):
            raise ConfigError("CanaryAudit.guesses must be in (0, 1], p in (0, 1), claimed_epsilon above 0: correct it")
        self.score = score
        self.guesses = guesses
        self.p = p
        self.claimed_epsilon = claimed_epsilon
        self.result: dict[str, Any] | None = None
        self._before: list[float] = []
        self._sums: list[float] = []
        self._steps = _Steps()
        self._listening = False

    def state_dict(self) -> dict[str, Any]:
        """Scores so far, in plain numbers."""
        return {"before": self._before, "sums": self._sums, "steps": asdict(self._steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scores of the run that goes on."""
        self._before, self._sums = list(state_dict["before"]), list(state_dict["sums"])
        self._steps = _Steps(**state_dict["steps"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder while every rank takes part."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the canaries at the initial weights, and listen to the noisy sums."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if not isinstance(data, CanaryDataModule) or not isinstance(pl_module, Classifier):
            raise ConfigError("CanaryAudit needs canaries: set data to CanaryDataModule (configs/audit)")
        if self.claimed_epsilon is None and not _has_claim(pl_module):
            raise ConfigError("there is no guarantee to audit: set CanaryAudit.claimed_epsilon, or add noise")
        self.result = None
        self._data: CanaryDataModule = data
        if not self._before:
            self._before = self._log_odds(pl_module).tolist()
            self._sums = [0.0] * data.num_canaries
        if self.score == "white_box":
            if not isinstance(pl_module, GradientModule) or trainer.world_size > 1:
                raise ConfigError("CanaryAudit.score white_box needs a gradient method and one process: set black_box")
            self._listen(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Guess, judge and write."""
        self._let_go()
        assert isinstance(pl_module, Classifier)
        if self.score == "black_box":
            scores = self._log_odds(pl_module) - np.array(self._before)
        else:
            scores = np.array(self._sums)
        config = pl_module.privacy
        assert config is not None
        if self.claimed_epsilon is not None:
            curve: TradeOff | None = TradeOff.of_budget(self.claimed_epsilon, config.delta)
        else:
            assert isinstance(pl_module, DPModule)
            curve = ledger_cap(pl_module, "add_remove")
        assert curve is not None
        inside = self._data.inside
        number = max(2, round(self.guesses * len(scores)))
        found = judge(scores, inside, number, curve, config.delta, self.p)
        self.result = self._report(pl_module, found, scores, inside)
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "audit.json").write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")
        rank_zero_info(sentence(self.result))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._let_go()

    def _report(self, module: Classifier, found: OneRunAudit, scores: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
        report: dict[str, Any] = asdict(found)
        report["claim"] = (
            module.mechanism.summary()
            if self.claimed_epsilon is None and isinstance(module, DPModule)
            else f"epsilon {self.claimed_epsilon:g} at delta {module.privacy.delta if module.privacy else 0:g}"
        )
        report |= {"adjacency": "add_remove", "score": self.score, "kind": self._data.kind}
        if 0 < inside.sum() < len(inside):
            report["auc"] = roc(scores[inside], scores[~inside]).auc
        if self._steps.inside + self._steps.outside:
            assert isinstance(module, DPModule)
            report["steps"] = self._steps.report(module.mechanism.noise_multiplier, self.p)
            if report["steps"]["verdict"] == "FAIL":
                report["verdict"] = "FAIL"
        report["assumptions"] = [
            "coins are fair, independent and unknown to the training",
            "the number of guesses was fixed before scoring",
            "epsilon_lower_gaussian: the mechanism is Gaussian in shape",
        ]
        return report

    @torch.no_grad()
    def _log_odds(self, module: Classifier) -> np.ndarray:
        """Log p - log(1 - p) of each canary's label."""
        modes = {part: part.training for part in module.modules()}
        module.eval()
        found = []
        for start in range(0, self._data.num_canaries, _CHUNK):
            images, labels = self._inputs(module, slice(start, start + _CHUNK))
            logits = module(images).double()
            rows = torch.arange(len(labels), device=logits.device)
            own = logits[rows, labels].clone()
            logits[rows, labels] = -torch.inf
            found.append((own - logits.logsumexp(1)).cpu())
        for part, training in modes.items():
            part.training = training
        return np.asarray(torch.cat(found).numpy())

    def _inputs(self, module: Classifier, rows: slice) -> tuple[Tensor, Tensor]:
        canaries = self._data.canaries
        return (
            self._data.normalize(canaries.images[rows].to(module.device)),
            canaries.labels[rows].to(module.device),
        )

    def _listen(self, trainer: Trainer, module: GradientModule) -> None:
        loader: Any = trainer.train_dataloader
        sampler = loader.batch_sampler
        assert isinstance(sampler, PoissonBatchSampler)
        self._module, self._sampler = module, sampler
        self._drawn: deque[np.ndarray] = deque()
        sampler.observers.append(self._note_draw)
        module.mechanism.observers.append(self._note_sum)
        self._listening = True

    def _let_go(self) -> None:
        if self._listening:
            self._sampler.observers.remove(self._note_draw)
            self._module.mechanism.observers.remove(self._note_sum)
            self._listening = False

    def _note_draw(self, drawn: np.ndarray) -> None:
        self._drawn.append(drawn)

    def _note_sum(self, alone: Tensor, noisy: Tensor, entries: Sequence[Release], rank: int) -> None:
        drawn = self._drawn.popleft()
        total = unflatten(noisy, self._module.template())
        names = [name for name, part in self._module.net.named_modules() if isinstance(part, DiracCanaries)]
        if names:
            own = total[f"{names[0]}.canaries".lstrip(".")].double().cpu().numpy()
            self._steps.add(own / self._module.mechanism.config.max_norm, self._in_batch(drawn))
        else:
            own = self._along(total)
        self._sums = (np.array(self._sums) + own).tolist()

    def _in_batch(self, drawn: np.ndarray) -> np.ndarray:
        first = self._sampler.num_records - self._data.num_canaries
        taken = np.zeros(self._data.num_canaries, dtype=bool)
        taken[drawn[drawn >= first] - first] = True
        return np.asarray(taken & self._data.inside)

    def _along(self, total: dict[str, Tensor]) -> np.ndarray:
        """Inner product of a sum with the gradient of each canary's loss, by one forward-mode pass."""
        module = self._module
        weights = module.template()
        found = []
        for start in range(0, self._data.num_canaries, _CHUNK):
            images, labels = self._inputs(module, slice(start, start + _CHUNK))

            def losses(at: dict[str, Tensor], images: Tensor = images, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(functional_call(module.net, at, (images,)), labels, reduction="none")

            found.append(jvp(losses, (weights,), (total,))[1].double().cpu())
        return np.asarray(torch.cat(found).detach().numpy())


def _has_claim(module: Classifier) -> bool:
    return isinstance(module, DPModule) and module.mechanism.noise_multiplier > 0


def sentence(result: dict[str, Any]) -> str:
    """A verdict in one line, for people."""
    line = (
        f"audit: {result['verdict']}: {result['right']} of {result['guesses']} guesses on {result['canaries']} "
        f"{result['kind']} canaries were right, p = {result['p_value']:.2g} for {result['claim']}; "
        f"epsilon is above {result['epsilon_lower']:.2f} at level {result['p']:g}, of at most {result['cap']:.2f} "
        "that this many guesses can show"
    )
    if "steps" in result:
        step = result["steps"]
        line += f"; single steps: mu above {step['mu_lower']:.4f}, {step['mu_claimed']:.4f} claimed"
    return line

"""Binds sampling, clipping, noise and accounting: the public numbers of a run, and the one place where it spends.

Every method releases noisy clipped sums and nothing else. `Mechanism.release` records the release, adds the noise and
hands the result out in one call; there is no other way to a sum of private records.
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import ConfigError
from lightning_dp.privacy import accounting, noise
from lightning_dp.privacy.accounting import Accountant, Adjacency, Release
from lightning_dp.privacy.clipping import Clipping, Tensors, flatten, unflatten
from lightning_dp.privacy.ledger import Ledger
from lightning_dp.privacy.randomness import Randomness

# Far below it, float32 factors underflow to 0.
_SMALLEST_NORM = 1e-12

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrivacyConfig:
    """The public numbers of a private run. None is ever computed from the private records.

    Args:
        num_examples: public size N of the private role, rounded is fine; it only sets the sample rate.
        expected_batch_size: expected records per step over all devices; also the divisor of every released sum.
            Equal to ``num_examples`` it means full batch.
        steps: noisy sums the run may release; becomes ``trainer.max_steps``.
        delta: probability bound of the guarantee, below 1 / N.
        epsilon: target. sigma is calibrated so that ``steps`` releases stay within it, and the run stops before a
            release that would cross it. May be left out if ``noise_multiplier`` is given.
        noise_multiplier: sigma, standard deviation of the noise over ``max_norm``; overrides calibration. 0 is a
            control without any guarantee.
        max_norm: L2 bound of one record's contribution, in the units of the method (gradient units).
        clipping: "flat" or "automatic" (normalised), see `clipping.clip_factors`.
        adjacency: "add_remove" or "replace_one"; printed with every epsilon.
        accountant: "pld" (certified, default), "prv" or "rdp" (for delta below 1e-9).
        unit: what one record is for the people behind it, e.g. "image"; printed on the card, changes nothing.
        dataset_epsilon: most that all runs on the private data together may reach, by the data's own ledger and under
            ``delta``; a run that could cross it is refused before its first release. None for no limit.
        seed: fixed seed of batches and noise, for tests and research only: whoever knows it can remove the noise.
            None takes both from the operating system.
        secure: cryptographic generator for batches and noise (needs the extra ``secure``).

    Raises:
        ConfigError: the numbers contradict each other.

    Example:
        >>> config = PrivacyConfig(num_examples=60000, expected_batch_size=600, steps=1000, delta=1e-6, epsilon=3.0)
        >>> config.sample_rate, config.steps_per_epoch
        (0.01, 100)
    """

    num_examples: int
    expected_batch_size: int
    steps: int
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    max_norm: float = 1.0
    clipping: Clipping = "flat"
    adjacency: Adjacency = "add_remove"
    accountant: Accountant = "pld"
    unit: str = "image"
    dataset_epsilon: float | None = None
    seed: int | None = None
    secure: bool = False

    def __post_init__(self) -> None:
        self._check_batch()
        self._check_budget()

    @property
    def sample_rate(self) -> float:
        """Probability of each record to be in a batch."""
        return self.expected_batch_size / self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which a record was seen once in expectation, rounded up."""
        return math.ceil(self.num_examples / self.expected_batch_size)

    def _check_batch(self) -> None:
        if self.num_examples < 1 or self.steps < 1 or self.expected_batch_size < 1:
            raise ConfigError("privacy.num_examples, privacy.expected_batch_size and privacy.steps must be at least 1")
        if self.expected_batch_size > self.num_examples:
            raise ConfigError(
                f"privacy.expected_batch_size {self.expected_batch_size} exceeds privacy.num_examples "
                f"{self.num_examples}: lower it; equal numbers mean full batch"
            )
        if not self.max_norm >= _SMALLEST_NORM or (self.clipping == "automatic" and math.isinf(self.max_norm)):
            raise ConfigError("privacy.max_norm must be at least 1e-12, and finite with privacy.clipping automatic")

    def _check_budget(self) -> None:
        if not 0 < self.delta < 1 / self.num_examples:
            raise ConfigError(
                f"privacy.delta {self.delta:g} must lie above 0 and below 1 / num_examples = {1 / self.num_examples:g}"
                ", since a larger delta allows a record to be published outright: lower it"
            )
        if self.accountant != "rdp" and self.delta < accounting.SMALLEST_FFT_DELTA:
            raise ConfigError(
                f"privacy.delta {self.delta:g} is below what privacy.accountant {self.accountant} can resolve (1e-9): "
                "set privacy.accountant to rdp or raise delta"
            )
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(
                "no privacy budget: set privacy.epsilon (sigma is calibrated) or privacy.noise_multiplier"
            )
        if self.epsilon is not None and not self.epsilon > 0:
            raise ConfigError(f"privacy.epsilon {self.epsilon:g} must be above 0")
        if self.dataset_epsilon is not None and not self.dataset_epsilon > 0:
            raise ConfigError(f"privacy.dataset_epsilon {self.dataset_epsilon:g} must be above 0")
        if self.noise_multiplier is not None and not self.noise_multiplier >= 0:
            raise ConfigError(f"privacy.noise_multiplier {self.noise_multiplier:g} must be 0 or above")
        if self.noise_multiplier != 0 and math.isinf(self.max_norm):
            raise ConfigError(
                "privacy.max_norm is infinite, so no noise bounds a record: set it, or noise_multiplier 0"
            )


class BudgetExceededError(ConfigError):
    """A release was asked for that the declared budget does not cover."""


# A resumed run must go on with the mechanism that its ledger describes.
_FIXED = ("num_examples", "expected_batch_size", "max_norm", "clipping", "adjacency", "delta")


class Mechanism:
    """Spends the budget: one `release` is one noisy sum and one entry of the ledger.

    Args:
        config: the public numbers.
        previous: ``state_dict`` of the run that is continued, if any. Its sigma and its ledger go on.
        plan: everything the run will release, where that is not ``config.steps`` sums at ``config.sample_rate``; the
            noise multipliers in it are not read. sigma is calibrated for the whole plan, and nothing else is released.

    Raises:
        ConfigError: the budget does not cover a single release, or not the whole ``plan``, or ``previous`` was
            another mechanism.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        previous: dict[str, Any] | None = None,
        plan: Sequence[Release] | None = None,
    ) -> None:
        assert previous is None or plan is None, "a planned release is not continued"
        self.config = config
        self._shares = None if plan is None else _counts(plan)
        self.ledger = Ledger() if previous is None else Ledger.from_state_dict(previous["ledger"])
        self.noise_multiplier = self._calibrated(plan) if previous is None else self._continued(previous)
        if plan is not None:
            self._check_plan(plan)
        self._planned = config.steps if previous is None else int(previous["config"]["steps"])
        self._release = Release(self.noise_multiplier, config.sample_rate)
        # Called with the sum, the sum with noise, the entries and the rank. They are told, and change nothing.
        self.observers: list[Callable[[Tensor, Tensor, Sequence[Release], int], None]] = []
        self._last_step = -1
        self.rng_history: list[str] = [] if previous is None else list(previous["rng_history"])
        self.renew_randomness()
        self._most = 0
        self.renew_allowance()
        if previous is None and self._most < 1:
            raise ConfigError(
                f"privacy.epsilon {config.epsilon:g} is below one step at noise_multiplier "
                f"{self.noise_multiplier:g}: raise epsilon or noise_multiplier"
            )

    def release(
        self,
        total: Tensors,
        step: int,
        rank: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
        draws: Sequence[Release] | None = None,
    ) -> Tensors:
        """The noisy mean over the logical batch: (sum over ranks of ``total`` + noise) / expected batch size.

        Guarantee: a Gaussian mechanism with noise ``noise_multiplier * max_norm`` on a sum that one record moves by at
        most ``max_norm``; it is written to the ledger before anything leaves. The divisor is a public constant.

        Args:
            total: this rank's clipped sum; or several sums of batches that were drawn independently, side by side.
            step: the trainer's step; addresses the noise, and only grows.
            rank: index of this process. Noise is drawn on rank 0 only, and added before the sum over ranks.
            reduce: sum over ranks of one flat tensor; None for a single process.
            draws: which batches ``total`` holds the sums of, where that is not one batch at ``config.sample_rate``:
                one entry for each kind that a record can be in, at this mechanism's noise multiplier.

        Raises:
            BudgetExceededError: the release would cross ``epsilon``, or is not planned; nothing was released.
            ConfigError: ``step`` was used before, so batch and noise would repeat; nothing was released.
            ValueError: ``draws`` at another noise multiplier; nothing was released.
        """
        entries = (self._release,) if draws is None else tuple(draws)
        if not self._covers(entries):
            raise BudgetExceededError(f"the budget is spent after {len(self.ledger)} releases: {self.summary()}")
        if step <= self._last_step:
            raise ConfigError(
                f"step {step} was released before, so its noise would repeat and cancel: update() must step the "
                "optimizer once, which moves trainer.global_step"
            )
        self._last_step = step
        self.ledger.record(*entries)
        flat = flatten(total)
        alone = flat
        if rank == 0:
            flat = flat + self._noise(flat, step)
        for observer in self.observers:
            observer(alone, flat, entries, rank)
        if reduce is not None:
            flat = reduce(flat)
        return unflatten(flat / self.config.expected_batch_size, total)

    @property
    def releases_left(self) -> int:
        """Releases that the declared budget still covers."""
        return self._most - len(self.ledger)

    def whole_plan(self, steps_left: float = math.inf) -> list[Release]:
        """What the ledger holds and what may still come, for a trainer that makes ``steps_left`` steps at most."""
        if self._shares is not None:
            return [Release(self.noise_multiplier, rate, count, group) for (rate, group), count in self._shares.items()]
        ahead = dataclasses.replace(self._release, count=int(min(self.releases_left, steps_left)))
        return list(accounting.merge([*self.ledger.releases, ahead]))

    @property
    def noise_std_of_mean(self) -> float:
        """Standard deviation of the noise in each value of a released mean."""
        if self.noise_multiplier == 0:
            return 0.0
        return self.noise_multiplier * self.config.max_norm / self.config.expected_batch_size

    def renew_randomness(self) -> None:
        """Take a fresh key, for a fit that counts its steps from 0 again: no noise vector is ever used twice.

        A configured seed gives the same streams again, one more reason why it is not for releases.
        """
        self.randomness = Randomness.from_seed(self.config.seed, self.config.secure)
        self._last_step = -1
        if self.randomness.describe() not in self.rng_history:
            self.rng_history.append(self.randomness.describe())

    def renew_allowance(self) -> None:
        """Work out how many releases the ledger may hold; after the ledger has grown from outside."""
        if self._shares is not None:
            self._most = sum(self._shares.values())
            return
        spent, plan = len(self.ledger), self.config.steps
        if self.config.epsilon is None:
            # Without a target, steps is the whole declaration; what a crash lost is counted and does not end the run.
            self._most = spent + plan
            return
        self._most = spent + accounting.affordable_steps(
            self.ledger.releases, self._release, self.config.epsilon, self.config.delta, plan,
            self.config.adjacency, self.config.accountant,
        )  # fmt: skip

    def planned_releases(self, done: int) -> int:
        """Releases still to come for a run whose trainer has done ``done`` steps.

        Releases made after the last checkpoint of a killed run count although their steps are lost, so there may be
        fewer than ``steps - done``.

        Raises:
            ConfigError: ``steps`` was raised beyond what the budget covers.
        """
        wanted = self.config.steps - done
        if wanted > self.releases_left and self.config.steps > self._planned:
            raise ConfigError(
                f"privacy.steps {self.config.steps} would exceed the budget: {self.summary()} is spent and "
                f"{self.releases_left} more steps fit into epsilon {self.config.epsilon:g}; set privacy.steps to at "
                f"most {done + self.releases_left} or raise privacy.epsilon"
            )
        return min(wanted, self.releases_left)

    def epsilon(self) -> float:
        """Certified epsilon of everything in the ledger."""
        config = self.config
        return accounting.epsilon(self.ledger.releases, config.delta, config.adjacency, config.accountant)

    def second_opinion(self) -> tuple[float, str]:
        """Epsilon of the ledger by an independent accountant, and its name."""
        config = self.config
        return accounting.second_opinion(self.ledger.releases, config.delta, config.adjacency, config.accountant)

    def summary(self) -> str:
        """Epsilon in one line, never without what it means."""
        config = self.config
        return (
            f"epsilon {self.epsilon():.4g} at delta {config.delta:g}, {config.adjacency} one {config.unit}, "
            f"accountant {config.accountant}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; holds no random state."""
        return {
            "config": dataclasses.asdict(self.config),
            "noise_multiplier": self.noise_multiplier,
            "rng_history": self.rng_history,
            "ledger": self.ledger.state_dict(),
        }

    def _covers(self, entries: Sequence[Release]) -> bool:
        """Whether the declared budget has room for all of ``entries``."""
        if any(entry.noise_multiplier != self.noise_multiplier for entry in entries):
            raise ValueError(f"all sums of this mechanism have the noise multiplier {self.noise_multiplier:g}")
        if self._shares is None:
            kinds = {(entry.sample_rate, entry.group) for entry in entries}
            return kinds == {(self.config.sample_rate, "")} and _counts(entries).total() <= self.releases_left
        after = _counts([*self.ledger.releases, *entries])
        return all(count <= self._shares[kind] for kind, count in after.items())

    def _noise(self, like: Tensor, step: int) -> Tensor:
        std = self.noise_std_of_mean * self.config.expected_batch_size
        if std == 0:
            return torch.zeros_like(like)
        if self.config.secure:
            drawn = noise.gaussian_secure(like.numel(), std, self.randomness.numpy("noise", step))
        elif like.device.type == "cuda":
            drawn = noise.gaussian_on(like.numel(), std, self.randomness.cuda("noise", step, like.device))
        else:
            drawn = noise.gaussian(like.numel(), std, self.randomness.numpy("noise", step))
        return drawn.to(like)

    def _calibrated(self, plan: Sequence[Release] | None) -> float:
        config = self.config
        if config.noise_multiplier is not None:
            return config.noise_multiplier
        assert config.epsilon is not None
        whole = [Release(0.0, config.sample_rate, config.steps)] if plan is None else plan
        sigma = accounting.calibrate_plan(config.epsilon, config.delta, whole, config.adjacency, config.accountant)
        log.info("noise_multiplier %.4f gives epsilon %g after %d steps", sigma, config.epsilon, config.steps)
        return sigma

    def _check_plan(self, plan: Sequence[Release]) -> None:
        """Refuse a plan that a given sigma does not hold within the target: half a plan would be spent for nothing."""
        config = self.config
        whole = [dataclasses.replace(release, noise_multiplier=self.noise_multiplier) for release in plan]
        spent = accounting.epsilon(whole, config.delta, config.adjacency, config.accountant)
        if config.epsilon is not None and spent > config.epsilon:
            raise ConfigError(
                f"privacy.noise_multiplier {self.noise_multiplier:g} makes the planned releases cost epsilon "
                f"{spent:.4g}, above privacy.epsilon {config.epsilon:g}: raise one of them, or leave one out"
            )

    def _continued(self, previous: dict[str, Any]) -> float:
        """The stored sigma, after checking that the configured mechanism is the stored one."""
        stored, mine = previous["config"], dataclasses.asdict(self.config)
        for name in _FIXED:
            if stored[name] != mine[name]:
                raise ConfigError(
                    f"privacy.{name} is {mine[name]} but the checkpoint's ledger was made with {stored[name]}: "
                    "use the stored value, or start a new run"
                )
        sigma = float(previous["noise_multiplier"])
        if self.config.noise_multiplier not in (None, sigma):
            raise ConfigError(
                f"privacy.noise_multiplier is {self.config.noise_multiplier:g} but the checkpoint was made with "
                f"{sigma:g}: leave it out or start a new run"
            )
        return sigma


def _counts(releases: Iterable[Release]) -> Counter[tuple[float, str]]:
    """How many sums of each kind."""
    counts: Counter[tuple[float, str]] = Counter()
    for release in releases:
        counts[release.sample_rate, release.group] += release.count
    return counts

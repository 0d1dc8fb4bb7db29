"""NeuroMixGDP: publishes noisy mixtures of the features of private records, once (Li, Cao, Yao 2024, arXiv 2202.06467).

Each of T outputs is the sum of the features, and of the labels, of a Poisson batch of m expected records, over m, with
noise. Features and labels, each over its noise, are one vector of length at most 1 and one Gaussian mechanism, so an
output is a subsampled Gaussian at rate m / n, certified like a step of DP-SGD. Whatever is trained on the outputs is
free. The paper's accountant is a central limit theorem; what it claims is printed beside what holds.

Class gates (the paper's hierarchical sampling) are public here. In the paper they are secret, and its Proposition E.3
takes the rate m / n for an output that a record can only be in if its class is open, with all the others of its class:
the gate is common to them and shows. Here a record of class k takes part, at the rate m / (n p), in the outputs whose
gates are open for k, and each such output counts.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.data import Published
from lightning_dp.data.release import encoder_name
from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch
from lightning_dp.methods.dp import DPModule
from lightning_dp.methods.mixture_heads import ReleaseHead
from lightning_dp.methods.public_head import linear_head, write_head
from lightning_dp.models import LinearHead
from lightning_dp.privacy import Mechanism, PrivacyConfig, Release, gdp
from lightning_dp.privacy.clipping import Tensors, clip_factors, record_norms
from lightning_dp.privacy.sampling import poisson_draws

# nu / mu at the maximum of nu log(1 + mu^2 / nu^2), the signal of a linear model (the paper's section 3.2).
_BEST_DEGREE = 0.5050
_CHUNK = 4096  # records whose features are prepared at a time


@final
@dataclass(frozen=True)
class GammaWeights:
    """Random weights of the records of a mixture (RW-Mix), each drawn by itself: mean 1 before they are bounded.

    Dirichlet weights, which are these over their sum, would let one record move the weights of all others.

    Args:
        alpha: shape of the Gamma distribution; the larger, the more alike.
        bound: weights above are set to it (the paper's Cw, in units of 1 / m).

    Raises:
        ConfigError: a number is not above 0.
    """

    alpha: float
    bound: float = 1.0

    def __post_init__(self) -> None:
        if not min(self.alpha, self.bound) > 0:
            raise ConfigError("GammaWeights.alpha and bound must be above 0: correct them")

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Weights (count,), float32, between 0 and ``bound``."""
        drawn = generator.gamma(self.alpha, 1 / self.alpha, count).clip(max=self.bound)
        return drawn.astype(np.float32) * np.float32(1 - 1e-6)  # rounding stays inside the bound


@final
class NeuroMix(DPModule):
    """Publishes ``privacy.steps`` noisy mixtures, and trains a linear head on them.

    The log directory gets ``release/release.safetensors``; any classifier may be trained on it later, for nothing
    (`ReleaseDataModule`). A release is made in one go and not continued.

    Args:
        net: a `LinearHead`; its norm and ``max_length`` make the feature vectors, and its weights are the result.
        head: how the head is trained on the mixtures.
        degree: m, expected records of a mixture and the divisor of its sums; "auto" is optimal for a linear model and
            needs no private record.
        open_classes: classes whose gates are open in an output, the same number in each and each class equally often
            (to one); None for plain Poisson mixtures of all classes.
        labels: of class-gated mixtures, "public": the expected masses of the open classes, at no cost; "noisy": those
            of the records, with noise. Plain mixtures have noisy ones.
        class_sizes: public numbers of records by class; None for equal ones. Only public labels depend on them.
        weights: of the records of a mixture, at random; None for equal ones.
        noise_split: lambda, noise multiplier of the labels over that of the features.
        feature_norm: Cx, bound on the length of a record's features.
        label_norm: Cy, bound on the length of a record's label.
        gate_seed: of the gates; public.
        outputs_per_step: mixtures of one step, and of one line of the ledger; performance only.
        as_published: take the noise of the paper's Theorem 3.1 for ``privacy.epsilon``, which is NOT a guarantee: the
            certified epsilon is larger, by far with gates.
        privacy: linked from the ``privacy`` section. ``steps`` is the number of mixtures T, ``expected_batch_size``
            must be 1: the loader's batches are not looked at.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def __init__(
        self,
        net: nn.Module,
        head: ReleaseHead,
        degree: int | Literal["auto"] = "auto",
        open_classes: int | None = None,
        labels: Literal["public", "noisy"] = "public",
        class_sizes: list[int] | None = None,
        weights: GammaWeights | None = None,
        noise_split: float = 1.0,
        feature_norm: float = 1.0,
        label_norm: float = 1.0,
        gate_seed: int = 0,
        outputs_per_step: int = 1000,
        as_published: bool = False,
        privacy: PrivacyConfig | None = None,
    ) -> None:
        super().__init__(linear_head(net, "NeuroMix"), partial(torch.optim.SGD, lr=0.0), privacy=privacy)
        if not min(noise_split, feature_norm, label_norm) > 0 or outputs_per_step < 1:
            raise ConfigError("model.noise_split, feature_norm, label_norm and outputs_per_step must be above 0")
        if degree != "auto" and degree < 1:
            raise ConfigError(f"model.degree {degree} must be at least 1, or auto")
        self.head = head
        self.degree: int | Literal["auto"] = degree
        self.open_classes = open_classes
        self.public_labels = open_classes is not None and labels == "public"
        self.class_sizes = class_sizes
        self.weights = weights
        self.noise_split = noise_split
        self.feature_norm = feature_norm
        self.label_norm = label_norm
        self.gate_seed = gate_seed
        self.outputs_per_step = outputs_per_step
        self.as_published = as_published
        if privacy is not None:
            self._check(privacy)

    def new_mechanism(self, privacy: PrivacyConfig, previous: dict[str, Any] | None) -> Mechanism:
        """Mixtures of the chosen degree, at the noise that the whole release needs.

        Raises:
            ConfigError: a checkpoint was given, or a class gate would have to draw records at a rate above 1.
        """
        if previous is not None:
            raise ConfigError("NeuroMix makes a release in one go: start anew without ckpt_path; the ledger stays")
        degree = best_degree(privacy, self._openings(privacy)) if self.degree == "auto" else self.degree
        config = replace(privacy, expected_batch_size=degree)
        if self.as_published:
            assert privacy.epsilon is not None
            sigma = published_sigma(privacy.epsilon, privacy.delta, privacy.num_examples, privacy.steps, degree)
            config = replace(config, epsilon=None, noise_multiplier=sigma)
        gates = self.gates(privacy)
        if gates is None:
            return Mechanism(config, plan=[Release(0.0, config.sample_rate, config.steps)])
        rate = self._gate_rate(config)
        if rate > 1:
            most = int(privacy.num_examples * self._gate_share())
            raise ConfigError(f"model.degree {degree} asks a gate for more than all of its class: at most {most}")
        counts = gates.sum(0).tolist()
        return Mechanism(config, plan=[Release(0.0, rate, count, f"class {k}") for k, count in enumerate(counts)])

    def gates(self, privacy: PrivacyConfig) -> np.ndarray | None:
        """Which classes are open in which output, bool (T, classes); public. None for plain mixtures."""
        if self.open_classes is None:
            return None
        return draw_gates(privacy.steps, self._num_classes(), self.open_classes, self.gate_seed)

    def claims(self) -> list[str]:
        """What the paper's Theorem 3.1 says of this release. It is a limit, not a bound; with gates it is wrong."""
        config = self.mechanism.config
        epsilon = published_epsilon(
            self.mechanism.noise_multiplier, config.delta, config.num_examples, config.steps, config.expected_batch_size
        )
        why = "a central limit theorem, not a bound"
        if self.open_classes is not None:
            why = "wrong for class gates: Proposition E.3 amplifies by a gate that shows"
        return [
            f"as published (Theorem 3.1): epsilon {epsilon:.4g} at delta {config.delta:g}; NOT a guarantee, {why}. "
            f"Certified: {self.mechanism.summary()}"
        ]

    def on_train_start(self) -> None:
        """Prepare the features of all private records, and room for the release."""
        super().on_train_start()
        if self.trainer.world_size > 1:
            raise ConfigError("NeuroMix makes a release in one process: set trainer.devices to 1")
        assert self.privacy is not None
        private = self.datamodule.role("private")
        self._labels = private.labels.numpy()
        self._classes = [np.flatnonzero(self._labels == k) for k in range(self._num_classes())]
        self._features, self._factors = self._prepared(private.images)
        self._gates = self.gates(self.privacy)
        self._inputs = torch.empty(self.privacy.steps, self._features.shape[1])
        self._targets = torch.empty(self.privacy.steps, self._num_classes())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One release: a block of mixtures; after the last one the file and the head."""
        assert self.privacy is not None
        step, total = self.trainer.global_step, self.privacy.steps
        rows = slice(step * self.outputs_per_step, min(total, (step + 1) * self.outputs_per_step))
        coins = self.mechanism.randomness.numpy("mixtures", step)
        outputs, records, draws = self._draw(rows, coins)
        weights = None if self.weights is None else self.weights.draw(len(records), coins) / self.weights.bound
        sums = self.bounded_sums(outputs, records, rows.stop - rows.start, weights)
        self._keep(rows, self.mechanism.release(sums, step, draws=draws))
        if rows.stop == total:
            self.update({"inputs": self._inputs, "targets": self._targets})
            del self._features, self._factors
        self.optimizers().step()  # type: ignore[union-attr]  # of rate 0: moves the counter that noise is bound to

    def bounded_sums(
        self, outputs: np.ndarray, records: np.ndarray, count: int, weights: np.ndarray | None = None
    ) -> Tensors:
        """Sums of the bounded records of each output, in units in which a record is at most 1 long.

        Args:
            outputs: number of the output, ascending, of every drawn record, (draws,).
            records: the record drawn, (draws,).
            count: number of outputs.
            weights: of each drawn record, between 0 and 1, (draws,); None for 1.

        Returns:
            ``inputs`` (count, values) and, unless labels are public, ``targets`` (count, classes).
        """
        drawn = torch.from_numpy(records)
        starts = torch.from_numpy(np.searchsorted(outputs, np.arange(count)))
        factors = self._factors[drawn]
        if weights is not None:
            factors = factors * torch.from_numpy(weights)
        sums = F.embedding_bag(drawn, self._features, starts, mode="sum", per_sample_weights=factors)
        x_share, y_share = self._shares()
        found = {"inputs": sums / (self.feature_norm * x_share)}
        if not self.public_labels:
            places = outputs * self._num_classes() + self._labels[records]
            counts = np.bincount(places, weights, minlength=count * self._num_classes()).reshape(count, -1)
            bound = float(clip_factors(torch.ones(1), self.label_norm, "flat"))
            found["targets"] = torch.from_numpy(counts).float() * (bound / (self.label_norm * y_share))
        return found

    def update(self, mean: Tensors) -> None:
        """Write the release and train the head on it. Post-processing."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "release"
        Published(mean["inputs"], mean["targets"], self.about()).save(folder)
        assert isinstance(self.net, LinearHead)
        head = self.head(mean["inputs"], mean["targets"], self.noise_std)
        write_head(self.net, head.to(self.device))

    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """What one record adds to an output that it is drawn for, at most 1 long; `bounded_sums` adds up many."""
        assert isinstance(self.net, LinearHead)
        x_share, y_share = self._shares()
        features = self.net.features(image[None])[0]
        factor = clip_factors(record_norms(features[None]), self.feature_norm, "flat")
        found = {"inputs": features * factor / (self.feature_norm * x_share)}
        if not self.public_labels:
            whole = F.one_hot(label, self._num_classes()) * clip_factors(torch.ones(1), self.label_norm, "flat")
            found["targets"] = whole / (self.label_norm * y_share)
        return found

    def template(self) -> Tensors:
        """One contribution."""
        assert isinstance(self.net, LinearHead)
        weight = self.net.linear.weight.detach()
        found = {"inputs": weight.new_zeros(weight.shape[1])}
        return found if self.public_labels else found | {"targets": weight.new_zeros(len(weight))}

    def about(self) -> dict[str, Any]:
        """Public facts of the release, for its file."""
        assert isinstance(self.net, LinearHead)
        config, datamodule = self.mechanism.config, self.datamodule
        pixels = [datamodule.source.channels, *2 * [datamodule.source.image_size]]
        return {
            "kind": "features",
            "shape": pixels if datamodule.encoder is None else None,
            "method": type(self).__name__,
            "source": datamodule.source.name,
            "encoder": encoder_name(datamodule.encoder),
            "groups": self.net.norm.num_groups if isinstance(self.net.norm, nn.GroupNorm) else None,
            "max_length": self.net.max_length,
            "feature_norm": self.feature_norm,
            "outputs": config.steps,
            "degree": config.expected_batch_size,
            "open_classes": self.open_classes,
            "noise_std": self.noise_std,
            "guarantee": self.mechanism.summary(),
            "claims": self.claims(),
        }

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each value of the released inputs; public."""
        bound = 1.0 if self.weights is None else self.weights.bound
        return self.mechanism.noise_std_of_mean * self.feature_norm * self._shares()[0] * bound

    def _check(self, privacy: PrivacyConfig) -> None:
        if privacy.max_norm != 1 or privacy.clipping != "flat":
            raise ConfigError("privacy.max_norm must be 1 and clipping flat with NeuroMix: set model.feature_norm")
        if privacy.expected_batch_size != 1:
            raise ConfigError(
                "privacy.expected_batch_size must be 1 with NeuroMix, which draws batches of its own: set model.degree"
            )
        if (self.as_published or self.degree == "auto") and privacy.epsilon is None:
            raise ConfigError("model.as_published and model.degree auto need privacy.epsilon: set it")
        classes, open_classes = self._num_classes(), self.open_classes
        if open_classes is not None and not 1 <= open_classes <= classes:
            raise ConfigError(f"model.open_classes {open_classes} must lie between 1 and {classes}, or be null")
        if open_classes is not None and privacy.adjacency != "add_remove":
            raise ConfigError(
                "model.open_classes needs privacy.adjacency add_remove: a replaced record may change class"
            )
        if self.weights is not None and self.public_labels:
            raise ConfigError("model.weights go with labels of the records: set model.labels to noisy, or no gates")
        if self.class_sizes is not None and (len(self.class_sizes) != classes or min(self.class_sizes) < 1):
            raise ConfigError(f"model.class_sizes must be {classes} numbers of at least 1")

    def _num_classes(self) -> int:
        assert isinstance(self.net, LinearHead)
        return self.net.linear.out_features

    def _gate_share(self) -> float:
        """p, the share of the outputs in which a class is open."""
        assert self.open_classes is not None
        return self.open_classes / self._num_classes()

    def _gate_rate(self, config: PrivacyConfig) -> float:
        """q, the rate at which records of an open class are drawn."""
        return config.expected_batch_size / (config.num_examples * self._gate_share())

    def _openings(self, privacy: PrivacyConfig) -> tuple[float, float]:
        """Outputs that a record can be in, and the share of the records that are drawn from in an output."""
        share = 1.0 if self.open_classes is None else self._gate_share()
        return share * privacy.steps, share

    def _shares(self) -> tuple[float, float]:
        """Noise of features and of labels over that of the whole; their inverse squares add up to 1."""
        if self.public_labels:
            return 1.0, math.inf
        root = math.sqrt(self.noise_split**2 + 1)
        return root / self.noise_split, root

    @torch.no_grad()
    def _prepared(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature vectors (n, values) of all records, and the factor of each (n,) that bounds it."""
        assert isinstance(self.net, LinearHead)
        vectors = torch.empty(len(images), self.net.linear.in_features)
        factors = torch.empty(len(images))
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            vectors[part] = self.net.features(self.datamodule.normalize(images[part]).to(self.device)).cpu()
            factors[part] = clip_factors(record_norms(vectors[part]), self.feature_norm, "flat")
            vectors[part][factors[part] == 0] = 0.0  # 0 * inf is NaN
        return vectors, factors

    def _draw(self, rows: slice, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[Release]]:
        """Who is in the outputs ``rows``: (output, record) pairs by output, and their entries in the ledger."""
        config, sigma, count = self.mechanism.config, self.mechanism.noise_multiplier, rows.stop - rows.start
        if self._gates is None:
            records, starts = poisson_draws(len(self._labels), config.sample_rate, count, generator)
            sizes = np.diff(starts, append=len(records))
            return np.repeat(np.arange(count), sizes), records, [Release(sigma, config.sample_rate, count)]
        rate = self._gate_rate(config)
        pairs, entries = [], []
        for k, members in enumerate(self._classes):
            opened = np.flatnonzero(self._gates[rows, k])
            drawn, starts = poisson_draws(len(members), rate, len(opened), generator)
            pairs.append((np.repeat(opened, np.diff(starts, append=len(drawn))), members[drawn]))
            if len(opened):
                entries.append(Release(sigma, rate, len(opened), f"class {k}"))
        outputs, drawn = (np.concatenate(part) for part in zip(*pairs, strict=True))
        order = np.argsort(outputs, kind="stable")
        return outputs[order], drawn[order], entries

    def _keep(self, rows: slice, mean: Tensors) -> None:
        """Noisy means in the units of features and labels."""
        bound = 1.0 if self.weights is None else self.weights.bound
        x_share, y_share = (share * bound for share in self._shares())
        torch.mul(mean["inputs"], self.feature_norm * x_share, out=self._inputs[rows])
        if not self.public_labels:
            torch.mul(mean["targets"], self.label_norm * y_share, out=self._targets[rows])
            return
        assert self._gates is not None
        config = self.mechanism.config
        equal = [config.num_examples / self._num_classes()] * self._num_classes()
        masses = torch.tensor(self.class_sizes or equal, dtype=torch.float32) * (
            self._gate_rate(config) / config.expected_batch_size
        )
        self._targets[rows] = torch.from_numpy(self._gates[rows]) * masses


def draw_gates(outputs: int, classes: int, open_classes: int, seed: int) -> np.ndarray:
    """Gates (outputs, classes), bool: ``open_classes`` open in each output, each class equally often, to one.

    Example:
        >>> draw_gates(4, 4, 2, 0).sum(0).tolist(), draw_gates(4, 4, 2, 0).sum(1).tolist()
        ([2, 2, 2, 2], [2, 2, 2, 2])
    """
    generator = np.random.default_rng(seed)
    gates = np.zeros((outputs, classes), dtype=bool)
    opened = np.zeros(classes, dtype=np.int64)
    for row in gates:
        chosen = np.lexsort((generator.random(classes), opened))[:open_classes]  # the least often open, ties by chance
        row[chosen] = True
        opened[chosen] += 1
    return gates


def best_degree(privacy: PrivacyConfig, openings: tuple[float, float]) -> int:
    """The m with most signal for a linear model under mu-GDP (the paper's section 3.2); no private number enters.

    Args:
        privacy: its target sets mu.
        openings: outputs that a record can be in, and the share of the records that an output is drawn from.
    """
    assert privacy.epsilon is not None
    outputs, share = openings
    rate = _BEST_DEGREE * gdp.mu_of(privacy.epsilon, privacy.delta) / math.sqrt(outputs)
    return max(1, min(round(rate * share * privacy.num_examples), int(share * privacy.num_examples)))


def published_sigma(epsilon: float, delta: float, num_examples: int, outputs: int, degree: int) -> float:
    """Noise multiplier of features and labels together by the paper's Theorem 3.1. NOT certified.

    Example:
        >>> round(published_sigma(1.0, 1e-5, 50000, 50000, 64), 3)
        1.26
    """
    rate = degree / num_examples
    return 1 / math.sqrt(math.log1p(gdp.mu_of(epsilon, delta) ** 2 / (rate**2 * outputs)))


def published_epsilon(sigma: float, delta: float, num_examples: int, outputs: int, degree: int) -> float:
    """Epsilon that the paper's Theorem 3.1 claims for a noise multiplier. NOT a guarantee.

    Example:
        >>> round(published_epsilon(1.2602, 1e-5, 50000, 50000, 64), 3)
        1.0
    """
    if sigma == 0:
        return math.inf
    mu = degree / num_examples * math.sqrt(outputs * math.expm1(1 / sigma**2)) if sigma > 0.05 else math.inf
    return gdp.epsilon_of(mu, delta) if math.isfinite(mu) else math.inf


def neural_collapse(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """How far records of one class are alike, and classes apart (Papyan, Han and Donoho 2020, arXiv 2008.08186).

    Args:
        features: (n, values), of PUBLIC records: nothing is noised.
        labels: (n,).

    Returns:
        NC1, the trace of the scatter within classes times the pseudo-inverse of that between them, over the number of
        classes; and the smallest Euclidean distance between two class means.
    """
    features = features.double()
    kinds = torch.unique(labels)
    means = torch.stack([features[labels == k].mean(0) for k in kinds])
    centred = torch.cat([features[labels == k] - mean for k, mean in zip(kinds, means, strict=True)])
    between = means - means.mean(0)
    # between has few rows, so the pseudo-inverse of between.T @ between / K is taken in its row space
    _, lengths, axes = torch.linalg.svd(between, full_matrices=False)
    kept = lengths > 1e-9 * lengths.max()
    within = (centred @ axes[kept].T).square().sum(0) / len(features)
    nc1 = float((within / (lengths[kept].square() / len(kinds))).sum() / len(kinds))
    return nc1, float(torch.pdist(means).min())

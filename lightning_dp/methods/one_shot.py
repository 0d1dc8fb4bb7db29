"""One noisy sum over all records, and a head in closed form: what every larger method has to beat.

`ClassSums` releases the sum of the features of each class; its head is the nearest mean. `SufficientStatistics`
releases second moments as well; its head is ridge regression to the classes: noisy normal equations with a ridge set by
the noise (AdaSSP, Wang 2018, arXiv 1803.02596), as a private last layer DP-LS (Mehta et al. 2022, arXiv 2211.13403).
Both are recalled, not read.
"""

import math
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.methods.dp import DPModule
from lightning_dp.methods.mixture_heads import means_as_head
from lightning_dp.methods.public_head import linear_head, write_head
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig
from lightning_dp.privacy.clipping import Tensors, clip_factors, record_norms


@final
class ClassSums(DPModule):
    """The noisy sum of the bounded features of each class; a nearest-mean head.

    A record adds its feature vector to the row of its class: length at most 1.

    Args:
        net: a `LinearHead`; its norm and ``max_length`` make the feature vectors, which are then scaled to length 1.
        class_sizes: public numbers of records by class; None for equal ones.
        physical_batch_size: records at a time; performance only.
        privacy: linked from the ``privacy`` section: one step, full batch, ``max_norm`` 1.
    """

    def __init__(
        self,
        net: nn.Module,
        class_sizes: list[int] | None = None,
        physical_batch_size: int = 4096,
        privacy: PrivacyConfig | None = None,
    ) -> None:
        head = linear_head(net, "ClassSums")
        super().__init__(head, partial(torch.optim.SGD, lr=0.0), None, physical_batch_size, privacy)
        _check_one_step(privacy, "ClassSums")
        classes = head.linear.out_features
        if class_sizes is not None and (len(class_sizes) != classes or min(class_sizes) < 1):
            raise ConfigError(f"model.class_sizes must be {classes} numbers of at least 1")
        self.class_sizes = class_sizes

    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """The feature vector in the row of its class, (classes, values)."""
        features, _ = bounded_features(self._head(), image[None])
        return {"sums": F.one_hot(label, len(self.template()["sums"])).to(features)[:, None] * features}

    def template(self) -> Tensors:
        """One contribution."""
        return {"sums": self._head().linear.weight.detach()}

    def clipped_sum(self, records: tuple[Tensor, ...]) -> Tensors:
        """The same sum as `DPModule.clipped_sum`, by one product a chunk."""
        total = torch.zeros_like(self.template()["sums"])
        with torch.autocast(self.device.type, enabled=False):
            for part in zip(*(torch.split(tensor, self.physical_batch_size) for tensor in records), strict=True):
                inputs, labels = self.prepare(*part)
                features, _ = bounded_features(self._head(), inputs)
                total += F.one_hot(labels, len(total)).to(features).T @ features
        return {"sums": total}

    def update(self, mean: Tensors) -> None:
        """Means by the public sizes of the classes, as a head."""
        config = self.mechanism.config
        sums = mean["sums"] * config.expected_batch_size
        equal = [config.num_examples / len(sums)] * len(sums)
        sizes = torch.tensor(self.class_sizes or equal, dtype=sums.dtype, device=sums.device)
        means = sums / sizes[:, None]
        write_head(self._head(), means_as_head(means))
        self.optimizers().step()  # type: ignore[union-attr]  # of rate 0: moves the trainer's counter

    def _head(self) -> LinearHead:
        assert isinstance(self.net, LinearHead)
        return self.net


@final
class SufficientStatistics(DPModule):
    """Noisy second moments of the features and noisy class sums; ridge regression to the classes.

    A record adds (x x^T / sqrt(2), x in the row of its class / sqrt(2)), with x at most 1 long and a last value that
    stands for the bias: length at most 1 in all. Of the symmetric x x^T only the upper half is released, its entries
    beside the diagonal times sqrt(2), which keeps the length.

    Args:
        net: a `LinearHead`.
        ridge: over the expected spectral norm of the noise of the moments; 0.5 by default. Public.
        bias: value of the constant feature, in (0, 1); features are bounded at sqrt(1 - bias^2).
        physical_batch_size: records at a time; performance only.
        privacy: linked from the ``privacy`` section: one step, full batch, ``max_norm`` 1.
    """

    def __init__(
        self,
        net: nn.Module,
        ridge: float = 0.5,
        bias: float = 0.3,
        physical_batch_size: int = 4096,
        privacy: PrivacyConfig | None = None,
    ) -> None:
        head = linear_head(net, "SufficientStatistics")
        super().__init__(head, partial(torch.optim.SGD, lr=0.0), None, physical_batch_size, privacy)
        _check_one_step(privacy, "SufficientStatistics")
        if not ridge > 0 or not 0 < bias < 1:
            raise ConfigError("model.ridge must be above 0 and model.bias between 0 and 1: correct them")
        self.ridge = ridge
        self.bias = bias

    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """Second moments (pairs,) and the row of the class (classes, values + 1)."""
        vectors = self._vectors(image[None])
        moments = _packed(vectors.T @ vectors)
        sums = F.one_hot(label, self._head().linear.out_features).to(vectors)[:, None] * vectors
        return {"moments": moments / math.sqrt(2), "sums": sums / math.sqrt(2)}

    def template(self) -> Tensors:
        """One contribution."""
        weight = self._head().linear.weight.detach()
        values = weight.shape[1] + 1
        return {
            "moments": weight.new_empty(values * (values + 1) // 2),
            "sums": weight.new_empty(len(weight), values),
        }

    def clipped_sum(self, records: tuple[Tensor, ...]) -> Tensors:
        """The same sum as `DPModule.clipped_sum`, by two products a chunk."""
        sums = torch.zeros_like(self.template()["sums"])
        moments = sums.new_zeros(sums.shape[1], sums.shape[1])
        with torch.autocast(self.device.type, enabled=False):
            for part in zip(*(torch.split(tensor, self.physical_batch_size) for tensor in records), strict=True):
                inputs, labels = self.prepare(*part)
                vectors = self._vectors(inputs)
                moments.addmm_(vectors.T, vectors)
                sums += F.one_hot(labels, len(sums)).to(vectors).T @ vectors
        return {"moments": _packed(moments) / math.sqrt(2), "sums": sums / math.sqrt(2)}

    def update(self, mean: Tensors) -> None:
        """Solve the noisy normal equations, with eigenvalues below the ridge held at it."""
        count, config = self.mechanism.config.expected_batch_size, self.mechanism.config
        moments = _unpacked(mean["moments"] * (count * math.sqrt(2)), mean["sums"].shape[1]).double()
        sums = (mean["sums"] * (count * math.sqrt(2))).double()
        # a symmetric Gaussian matrix of this standard deviation has a spectral norm of about 2 sqrt(values) std
        noise = 2 * math.sqrt(len(moments)) * self.mechanism.noise_multiplier * config.max_norm
        values, axes = torch.linalg.eigh(moments)
        damped = values.clamp(min=0) + max(self.ridge * noise, 1e-6 * config.num_examples)
        weights = (sums @ axes / damped) @ axes.T
        write_head(self._head(), torch.cat([weights[:, :-1], self.bias * weights[:, -1:]], dim=1).float())
        self.optimizers().step()  # type: ignore[union-attr]  # of rate 0: moves the trainer's counter

    def _vectors(self, inputs: Tensor) -> Tensor:
        """Features with a last value for the bias, (n, values + 1), at most 1 long."""
        features, kept = bounded_features(self._head(), inputs)
        return torch.cat([features * math.sqrt(1 - self.bias**2), kept[:, None] * self.bias], dim=1)

    def _head(self) -> LinearHead:
        assert isinstance(self.net, LinearHead)
        return self.net


def bounded_features(net: LinearHead, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Feature vectors (n, values) of length at most 1, and 1 for each record (n,), or 0 for one that is not finite."""
    features = net.features(inputs.float())
    factors = clip_factors(record_norms(features), 1.0, "flat")
    kept = factors > 0
    # 0 * inf is NaN: a refused record has to be masked, not multiplied
    return torch.where(kept[:, None], features * factors[:, None], 0.0), kept.to(features) * (1 - 1e-6)


def _packed(symmetric: Tensor) -> Tensor:
    """Upper half of a symmetric matrix as a vector of the same length: entries beside the diagonal count twice."""
    row, column = torch.triu_indices(*symmetric.shape, device=symmetric.device)
    return symmetric[row, column] * torch.where(row == column, 1.0, math.sqrt(2)).to(symmetric)


def _unpacked(packed: Tensor, values: int) -> Tensor:
    """The inverse of `_packed`, (values, values)."""
    row, column = torch.triu_indices(values, values, device=packed.device)
    matrix = packed.new_zeros(values, values)
    matrix[row, column] = packed / torch.where(row == column, 1.0, math.sqrt(2)).to(packed)
    return matrix + matrix.triu(1).T


def _check_one_step(privacy: PrivacyConfig | None, name: str) -> None:
    if privacy is None:
        return
    numbers: dict[str, Any] = {"steps": 1, "max_norm": 1.0, "clipping": "flat"}
    numbers["expected_batch_size"] = privacy.num_examples
    for key, value in numbers.items():
        if getattr(privacy, key) != value:
            raise ConfigError(f"privacy.{key} must be {value} with {name}, which sums all records once: set it")

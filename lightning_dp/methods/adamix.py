"""AdaMix (Golatkar et al. 2022, arXiv 2203.11481): a linear head started on public records, then private steps.

The paper's body was not at hand: its algorithm is recalled, and what is uncertain is an option (docs/adamix.md).

Released at each step: the noisy sum over the batch of every private record's gradient, divided by this step's clip norm
tau and clipped at length 1. One record moves it by at most 1, so ``privacy.max_norm`` is 1 and the noise multiplier is
that of the ledger. tau, the subspace and the public gradient come from public records and from weights that were
released before; multiplying the released sum by tau and projecting it are post-processing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dp.errors import ConfigError
from lightning_dp.methods.dp import DPModule
from lightning_dp.methods.public_head import Start, linear_head, with_bias, write_head
from lightning_dp.methods.record_losses import RecordLosses
from lightning_dp.methods.subspaces import Projection, Subspace
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig
from lightning_dp.privacy.clipping import Clipping, Tensors, clip_factors, record_norms

Order = Literal["clip_first", "project_first"]


@dataclass(frozen=True)
class PublicStep:
    """What one step takes from public records at the current head.

    Args:
        features: (M, values), the last one constant.
        residuals: softmax minus label, (M, classes).
        clip_norm: tau, in units of the gradient.
        subspace: where private gradients are kept; None for everywhere.
        order: "clip_first": the sum is projected after the noise; "project_first": records are, before the clip.
    """

    features: Tensor
    residuals: Tensor
    clip_norm: float
    subspace: Subspace | None
    order: Order

    @property
    def coordinates(self) -> Subspace | None:
        """The subspace in whose coordinates records contribute; None if they contribute whole gradients."""
        return self.subspace if self.order == "project_first" else None

    def private_sum(self, noisy: Tensor) -> Tensor:
        """The released sum (units of the clip norm) as a gradient (classes, values)."""
        scaled = noisy * self.clip_norm
        if self.subspace is None:
            return scaled
        return self.subspace.project(scaled) if self.coordinates is None else self.subspace.lift(scaled)


def residuals_of(head: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Softmax minus label (n, classes): the gradient of record i's cross entropy is ``residuals[i] features[i]^T``."""
    logits = features @ head.T
    return logits.softmax(1) - F.one_hot(labels, logits.shape[1]).to(logits)


def gradient_norms(residuals: Tensor, features: Tensor, subspace: Subspace | None) -> Tensor:
    """L2 norms (n,) of the records' gradients, or of their parts in a subspace."""
    if subspace is not None:
        return record_norms(subspace.coordinates(residuals, features))
    return record_norms(residuals) * record_norms(features)


def bounded_sum(
    residuals: Tensor, features: Tensor, clip_norm: float, clipping: Clipping, subspace: Subspace | None
) -> tuple[Tensor, Tensor]:
    """Sum of gradients over ``clip_norm``, each clipped at length 1, and the length of each record's share (n,).

    Guarantee: one record more or less changes the sum by at most 1, whatever the subspace's basis, since the clip
    comes last. A record whose gradient is not finite contributes zero. No gradient is written out: one matrix product.

    Returns:
        The sum, (classes, values) or coordinates (k,); and lengths (n,), which are private.
    """
    if subspace is not None:
        rows = subspace.coordinates(residuals, features)
        norms = record_norms(rows) / clip_norm
        factors = clip_factors(norms, 1.0, clipping)
        rows = rows.masked_fill((factors == 0)[:, None], 0.0)
        return (factors / clip_norm) @ rows, torch.where(factors == 0, 0.0, factors * norms)
    norms = gradient_norms(residuals, features, None) / clip_norm
    factors = clip_factors(norms, 1.0, clipping)
    refused = factors == 0
    if refused.any():
        # 0 * inf is NaN: a refused record has to be masked, not multiplied.
        residuals, features = (tensor.masked_fill(refused[:, None], 0.0) for tensor in (residuals, features))
    total = (residuals * (factors / clip_norm)[:, None]).T @ features
    return total, torch.where(refused, 0.0, factors * norms)


@final
class InverseTimeLR(LambdaLR):
    """Learning rate ``lr / (1 + t / half_life)`` at step t.

    Args:
        optimizer: whose rate is set.
        half_life: steps after which the rate is half the first one.
    """

    def __init__(self, optimizer: Optimizer, half_life: float) -> None:
        if not half_life > 0:
            raise ConfigError(f"InverseTimeLR.half_life {half_life} must be above 0: correct it")
        super().__init__(optimizer, lambda step: 1 / (1 + step / half_life))


@final
class AdaMix(DPModule):
    """Private training of a linear head with the help of a few public records.

    The full batch at every step (``privacy.expected_batch_size`` equal to ``privacy.num_examples``) is the paper's;
    a smaller one gives Poisson batches. Both estimate the same gradient, that of the mean loss over public and private
    records together.

    Args:
        net: a `LinearHead`, usually on the features of ``data.encoder``.
        optimizer: parameters -> optimizer; sees only released and public gradients.
        start: makes the first head from public information.
        scheduler: optimizer -> learning rate schedule, stepped once per step.
        physical_batch_size: records per product and device; performance only.
        privacy: linked from the ``privacy`` section; ``max_norm`` must be 1. None for evaluation only.
        projection: finds the subspace of the private gradients in the public ones; None for no projection.
        order: "clip_first" clips whole gradients and projects the noisy sum; "project_first" clips projected ones.
        clip_quantile: of the public gradients' norms, which is the clip norm of the step; None for a fixed one.
        clip_norm: the fixed clip norm, if ``clip_quantile`` is None, in units of the gradient.
        clip_floor: smallest clip norm by quantile.
        weight_decay: lambda of ``lambda / 2 |head|^2``, added to the mean loss.
        noise_damping: steps are shortened to this multiple of N / sigma, where that is below 1: of the length of a sum
            of N gradients at the clip norm over the noise in any one direction. Public numbers. None for no damping.
        record_losses: PRIVATE diagnostic: every record's own privacy loss, written to ``private/`` in the log
            directory and not for release. Full batch, one process.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        start: Start,
        scheduler: LRSchedulerCallable | None = None,
        physical_batch_size: int = 512,
        privacy: PrivacyConfig | None = None,
        projection: Projection | None = None,
        order: Order = "clip_first",
        clip_quantile: float | None = 0.9,
        clip_norm: float = 1.0,
        clip_floor: float = 1e-3,
        weight_decay: float = 0.0,
        record_losses: bool = False,
        noise_damping: float | None = 0.005,
    ) -> None:
        super().__init__(linear_head(net, "AdaMix"), optimizer, scheduler, physical_batch_size, privacy)
        if privacy is not None and privacy.max_norm != 1:
            raise ConfigError(
                f"privacy.max_norm {privacy.max_norm:g} must be 1 with AdaMix, which divides gradients by a clip norm "
                "of its own: set it to 1, and the norm by model.clip_quantile or model.clip_norm"
            )
        if clip_quantile is not None and not 0 <= clip_quantile <= 1:
            raise ConfigError(f"model.clip_quantile {clip_quantile} must lie in [0, 1], or be null: correct it")
        if not (0 < clip_norm < float("inf") and 0 < clip_floor < float("inf") and weight_decay >= 0):
            raise ConfigError("model.clip_norm and clip_floor must be above 0 and finite, weight_decay 0 or above")
        if record_losses and (privacy is None or privacy.sample_rate != 1 or privacy.noise_multiplier == 0):
            raise ConfigError("model.record_losses needs noise and the full batch: set both, or leave it false")
        self.start = start
        self.projection = projection
        self.order: Order = order
        self.clip_quantile = clip_quantile
        self.clip_norm = clip_norm
        self.clip_floor = clip_floor
        if noise_damping is not None and not noise_damping > 0:
            raise ConfigError(f"model.noise_damping {noise_damping:g} must be above 0, or null: correct it")
        self.weight_decay = weight_decay
        self.noise_damping = noise_damping
        self.losses = RecordLosses() if record_losses else None

    def on_train_start(self) -> None:
        """Read the public role, and write the first head of a new run."""
        super().on_train_start()
        net, public = self._head_net(), self.datamodule.role("public")
        self._public_features = with_bias(net, self.datamodule.normalize(public.images.to(self.device)))
        self._public_labels = public.labels.to(self.device)
        if self.trainer.global_step == 0:
            write_head(net, self.start(self._public_features, self._public_labels, net.linear.out_features))
        if self.losses is not None and self.trainer.world_size > 1:
            raise ConfigError("model.record_losses needs one process: set trainer.devices to 1")
        if self.losses is not None:
            self.disclose("private/record_losses.npz and .png hold every record's own privacy loss: NOT FOR RELEASE")
        self._now = self.public_step()

    def on_train_end(self) -> None:
        """Write the private diagnostic, if it was asked for."""
        super().on_train_end()
        if self.losses is not None:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "private"
            self.losses.save(folder, self.mechanism.noise_multiplier, self.mechanism.config.delta)

    def head(self) -> Tensor:
        """Weights and bias (classes, values), detached; the bias is the last column."""
        linear = self._head_net().linear
        return torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach()

    def public_step(self) -> PublicStep:
        """What public records say about the next step. No private record is read."""
        features = self._public_features
        residuals = residuals_of(self.head(), features, self._public_labels)
        subspace = None if self.projection is None else self.projection(residuals, features)
        clip_norm = self.clip_norm
        if self.clip_quantile is not None:
            norms = gradient_norms(residuals, features, subspace if self.order == "project_first" else None)
            clip_norm = max(self.clip_floor, float(norms.double().quantile(self.clip_quantile)))
        return PublicStep(features, residuals, clip_norm, subspace, self.order)

    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """Gradient of one record's cross entropy over the clip norm, (classes, values), or its coordinates."""
        features = with_bias(self._head_net(), image[None])
        residuals = residuals_of(self.head(), features, label[None])
        subspace = self._now.coordinates
        whole = residuals.T @ features if subspace is None else subspace.coordinates(residuals, features)[0]
        return {"gradient": whole / self._now.clip_norm}

    def template(self) -> Tensors:
        """One contribution."""
        head, subspace = self.head(), self._now.coordinates
        return {"gradient": head if subspace is None else subspace.coordinates_of(head)}

    def clipped_sum(self, records: tuple[Tensor, ...]) -> Tensors:
        """The same sum as `DPModule.clipped_sum`, in closed form."""
        with torch.autocast(self.device.type, enabled=False):
            self._now = now = self.public_step()
            head, clipping = self.head(), self.mechanism.config.clipping
            total, lengths = torch.zeros_like(self.template()["gradient"]), []
            for part in zip(*(torch.split(tensor, self.physical_batch_size) for tensor in records), strict=True):
                inputs, labels = self.prepare(*part)
                features = with_bias(self._head_net(), inputs)
                residuals = residuals_of(head, features, labels)
                share, length = bounded_sum(residuals, features, now.clip_norm, clipping, now.coordinates)
                total += share
                lengths.append(length)
        if self.losses is not None:
            self.losses.add(torch.cat(lengths))
        return {"gradient": total}

    def update(self, mean: Tensors) -> None:
        """Step along the gradient of the mean loss over private (estimated) and public records, and the penalty."""
        assert self.privacy is not None
        now, num_private = self._now, self.privacy.num_examples
        both = now.private_sum(mean["gradient"] * num_private) + now.residuals.T @ now.features
        gradient = both / (num_private + len(now.features)) + self.weight_decay * self.head()
        gradient = gradient * self.damping()
        self.log("public/clip_norm", now.clip_norm)
        self.step_optimizer({"linear.weight": gradient[:, :-1], "linear.bias": gradient[:, -1]})

    def damping(self) -> float:
        """Factor of every step, in (0, 1]."""
        assert self.privacy is not None
        sigma = self.mechanism.noise_multiplier
        if self.noise_damping is None or sigma == 0:
            return 1.0
        # of a Poisson batch, as many records as are expected in it stand against the noise
        return min(1.0, self.noise_damping * self.privacy.expected_batch_size / sigma)

    def _head_net(self) -> LinearHead:
        assert isinstance(self.net, LinearHead)
        return self.net

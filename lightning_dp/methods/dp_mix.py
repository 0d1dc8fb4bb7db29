"""DP-Mix (Bao et al., NeurIPS 2023, arXiv 2311.01295): mixup inside one record's clipping ball.

Released at each step: the sum over the batch of clipped gradients plus Gaussian noise, as in DP-SGD. A record's
gradient is that of the mean loss over views of this one record (De et al. 2022, arXiv 2204.13650), of public synthetic
images and of mixtures of them. No other private record enters it, and it is clipped once, after the mean; so one record
moves the sum by at most ``privacy.max_norm``, whatever the number of views.
"""

from typing import final

import numpy as np
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from scipy.special import betaincinv
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.data import Records
from lightning_dp.data.views import Pairing, ViewPlan, check_views, make_views
from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch
from lightning_dp.methods.dp import GradientModule
from lightning_dp.privacy import PrivacyConfig, Randomness
from lightning_dp.privacy.clipping import Tensors

_PRETRAINING_SEED = 0  # public: pretraining touches no private record


@final
class DPMix(GradientModule):
    """DP-SGD on the mean loss over views of a record: its augmentations, synthetic images, and mixtures of these.

    Guarantee: that of DP-SGD; the accounting does not depend on the views. The synthetic role must not have been made
    from private records, and counts as public. Private records are never mixed with each other.

    Args:
        net: classifier without BatchNorm, (n, channels, height, width) -> logits (n, classes).
        optimizer: parameters -> optimizer; sees only released gradients.
        scheduler: optimizer -> learning rate schedule, stepped once per logical step.
        physical_batch_size: records (with all their views) per forward pass and device; performance only.
        privacy: linked from the ``privacy`` section; None for evaluation only.
        gradient_memory: MiB that gradients of single records may take; performance only.
        k_base: augmented views of the record itself, at least 1; more than 1 needs ``data.augment``.
        k_self: mixtures of two views. With ``k_base`` alone it is the augmentation multiplicity of De et al.
        k_diff: images drawn from the synthetic role for every record and step, without replacement.
        alpha: lambda of a mixture is Beta(alpha, alpha).
        include_unmixed_views: average over the unmixed views too (the authors' code), or mixtures only (their figure).
        pairing: partners of a mixture are any two views ("pool"), or the record's own and a synthetic one.
        mix_labels: mix labels with the same lambda; else a mixture has the label of its heavier partner.
        pretrain_steps: steps of plain SGD on the synthetic role before the first release, in a run that starts anew.
        pretrain_batch_size: synthetic images per such step, drawn with replacement.
        pretrain_learning_rate: of these steps.

    Raises:
        ConfigError: the settings contradict each other; at the start of a fit also if the data cannot serve them.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        physical_batch_size: int = 64,
        privacy: PrivacyConfig | None = None,
        gradient_memory: int = 64,
        k_base: int = 16,
        k_self: int = 18,
        k_diff: int = 0,
        alpha: float = 0.2,
        include_unmixed_views: bool = True,
        pairing: Pairing = "pool",
        mix_labels: bool = True,
        pretrain_steps: int = 0,
        pretrain_batch_size: int = 128,
        pretrain_learning_rate: float = 0.1,
    ) -> None:
        super().__init__(net, optimizer, scheduler, physical_batch_size, privacy, gradient_memory)
        if pretrain_steps < 0 or pretrain_batch_size < 1 or not pretrain_learning_rate > 0:
            raise ConfigError("model.pretrain_steps must be at least 0, pretrain_batch_size and _learning_rate above 0")
        self.plan = ViewPlan(k_base, k_self, k_diff, alpha, include_unmixed_views, pairing, mix_labels)
        self.pretrain_steps = pretrain_steps
        self.pretrain_batch_size = pretrain_batch_size
        self.pretrain_learning_rate = pretrain_learning_rate
        self.synthetic: Records | None = None

    def record_loss(self, parameters: Tensors, image: Tensor, label: Tensor) -> Tensor:
        """Mean cross entropy over the views of one record: ``image`` (k, ...), ``label`` (k, classes)."""
        return F.cross_entropy(functional_call(self.net, parameters, (image,)), label)

    def record_coins(self, records: int, generator: np.random.Generator) -> Tensor:
        """Coins of this rank's ``records``, shape (records, coins); see `make_views`.

        One uniform block, of which row i belongs to place ``rank + i * world_size`` of the global batch. Lambda is the
        Beta quantile of its coin: draws by rejection would take a number of coins that depends on other records.
        """
        augment, mixed = self.datamodule.augment, self.plan.k_self
        width = sum(self.plan.widths(0 if augment is None else augment.num_coins))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        coins = generator.random((records * world, width), dtype=np.float32)[rank::world]
        uniform = coins[:, width - mixed :].astype(np.float64)
        coins[:, width - mixed :] = betaincinv(self.plan.alpha, self.plan.alpha, uniform)
        return torch.from_numpy(coins).to(self.device)

    def prepare(self, images: Tensor, coins: Tensor, labels: Tensor) -> Batch:
        """Views of a chunk of records on the device, as `make_views` returns them."""
        data = self.datamodule
        return make_views(
            images, labels, coins, self.synthetic, self.plan, data.augment, data.normalize, data.num_classes
        )

    def on_fit_start(self) -> None:
        """Check what the views need of the data, and move the synthetic role to the device, once."""
        check_views(self.plan, self.datamodule.augment is not None, self.datamodule.encoder is not None)
        self.synthetic = self._pool() if self.plan.k_diff or self.pretrain_steps else None

    def on_train_start(self) -> None:
        """The checks of every private run; then the pretraining, if nothing was released yet."""
        super().on_train_start()
        if self.pretrain_steps and self.trainer.global_step == 0 and len(self.mechanism.ledger) == 0:
            self._pretrain()

    def _pretrain(self) -> None:
        """Plain SGD on the synthetic role; a function of public data, public seeds and the initial weights."""
        devices = [self.device] if self.device.type == "cuda" else []
        optimizer = torch.optim.SGD(self.trainable().values(), lr=self.pretrain_learning_rate)
        with torch.random.fork_rng(devices):
            torch.manual_seed(_PRETRAINING_SEED)  # dropout and its like
            for step in range(self.pretrain_steps):
                images, labels = self._public_batch(step)
                loss = F.cross_entropy(self.net(images), labels)
                # Not .backward(): DistributedDataParallel would wait for the other ranks.
                gradients = torch.autograd.grad(loss, list(self.trainable().values()))
                for parameter, gradient in zip(self.trainable().values(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                optimizer.zero_grad()
        # Every rank did the same; kernels whose order of sums varies must not let the replicas drift apart.
        first = self.trainer.strategy.broadcast(self.template())
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(first[name])

    def _public_batch(self, step: int) -> Batch:
        """A batch of the synthetic role, augmented; the same on every rank."""
        assert self.synthetic is not None
        generator, augment = Randomness.from_seed(_PRETRAINING_SEED).numpy("pretraining", step), self.datamodule.augment
        rows = torch.from_numpy(generator.integers(len(self.synthetic), size=self.pretrain_batch_size)).to(self.device)
        width = 0 if augment is None else augment.num_coins
        coins = torch.from_numpy(generator.random((len(rows), width), dtype=np.float32)).to(self.device)
        return super().prepare(self.synthetic.images[rows], coins, self.synthetic.labels[rows])

    def _pool(self) -> Records:
        """The synthetic role on the device, uint8 (or features)."""
        size, needed = self.datamodule.roles()["synthetic"], max(1, self.plan.k_diff)
        if size < needed:
            setting = f"k_diff {self.plan.k_diff}" if self.plan.k_diff else f"pretrain_steps {self.pretrain_steps}"
            raise ConfigError(
                f"model.{setting} draws from the synthetic role, which has {size} images: set data.synthetic to a "
                f"source with at least {needed}, or lower it"
            )
        pool = self.datamodule.role("synthetic")
        return Records(pool.images.to(self.device), pool.labels.to(self.device))

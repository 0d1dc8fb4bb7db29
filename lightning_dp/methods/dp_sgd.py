"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133), with Poisson batches and a certified accountant.

Released at each step: the sum over the batch of clipped gradients plus Gaussian noise. One record moves the sum by at
most ``privacy.max_norm``.
"""

from collections.abc import Sequence
from typing import Any, final

from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.methods.base import Batch
from lightning_dp.methods.dp import GradientModule
from lightning_dp.methods.tasks import Tasks
from lightning_dp.privacy import Mechanism, PrivacyConfig, Release
from lightning_dp.privacy.clipping import Tensors


@final
class DPSGD(GradientModule):
    """Differentially private stochastic gradient descent, with any optimizer.

    Args:
        net: classifier without BatchNorm, (n, channels, height, width) -> logits (n, classes).
        optimizer: parameters -> optimizer; sees only released gradients.
        scheduler: optimizer -> learning rate schedule, stepped once per logical step.
        physical_batch_size: records per forward pass and device; performance only.
        privacy: linked from the ``privacy`` section; None for evaluation only.
        gradient_memory: MiB that gradients of single records may take; performance only.
        tasks: disjoint sets of classes, learnt one after the other (continual learning); None for all at once.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        physical_batch_size: int = 256,
        privacy: PrivacyConfig | None = None,
        gradient_memory: int = 64,
        tasks: Tasks | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler, physical_batch_size, privacy, gradient_memory)
        self.tasks = tasks

    def setup(self, stage: str) -> None:
        """Check the tasks, if there are any."""
        if self.tasks is not None:
            self.tasks.check(self.datamodule.num_classes, self.privacy)

    def new_mechanism(self, privacy: PrivacyConfig, previous: dict[str, Any] | None) -> Mechanism:
        """With tasks, sums in which a record can only be while its task is learnt."""
        if self.tasks is None:
            return super().new_mechanism(privacy, previous)
        return self.tasks.new_mechanism(privacy, previous)

    def takes_part(self, batch: Batch, step: int) -> tuple[Batch, Sequence[Release] | None]:
        """With tasks, only records of the present one."""
        return (batch, None) if self.tasks is None else self.tasks.takes_part(batch, step, self.mechanism)

    def record_loss(self, parameters: Tensors, image: Tensor, label: Tensor) -> Tensor:
        """Cross entropy of one record."""
        logits = functional_call(self.net, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

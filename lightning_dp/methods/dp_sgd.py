"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133), with Poisson batches and a certified accountant.

Released at each step: the sum over the batch of clipped gradients plus Gaussian noise. One record moves the sum by at
most ``privacy.max_norm``.
"""

from typing import final

from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.methods.dp import GradientModule
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
    """

    def record_loss(self, parameters: Tensors, image: Tensor, label: Tensor) -> Tensor:
        """Cross entropy of one record."""
        logits = functional_call(self.net, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

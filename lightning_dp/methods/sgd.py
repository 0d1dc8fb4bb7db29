"""The control of every table: the same batches, divisor, optimizer and evaluation, without the mechanism."""

from typing import final

import torch
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch, Classifier
from lightning_dp.methods.refusals import check_loader
from lightning_dp.privacy import Randomness
from lightning_dp.privacy.clipping import flatten, unflatten


@final
class SGD(Classifier):
    """Ordinary training on the private role. NO PRIVACY: nothing is clipped, no noise is added, epsilon is infinite.

    Batches are the Poisson draws of the private methods and the divisor is ``privacy.expected_batch_size``, so that a
    comparison shows the price of clipping and noise and of nothing else.

    Args:
        net: classifier, (n, channels, height, width) -> logits (n, classes).
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning rate schedule, stepped once per logical step.
        physical_batch_size: records per forward pass and device; performance only.
        privacy: linked from the ``privacy`` section; sizes, steps and seed are used, the budget is not.
    """

    def on_train_start(self) -> None:
        """Check that the batches are those of the private methods."""
        if self.privacy is None:
            raise ConfigError("no privacy section: SGD takes batch size and steps from it")
        check_loader(self.trainer.train_dataloader, self.privacy, self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step along the sum of the gradients over the expected batch size."""
        assert self.privacy is not None
        images, labels = batch
        parameters = self.trainable()
        total = torch.zeros(sum(value.numel() for value in parameters.values()), device=self.device)
        coins = Randomness.from_seed(self.privacy.seed).numpy("augment", self.trainer.global_step)
        records = (images, self.record_coins(len(labels), coins), labels)
        for part in zip(*(torch.split(tensor, self.physical_batch_size) for tensor in records), strict=True):
            inputs, targets = self.prepare(*part)
            loss = F.cross_entropy(self.net(inputs), targets, reduction="sum")
            # Not .backward(): DistributedDataParallel would average the chunks' gradients one by one.
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            total += flatten(dict(zip(parameters, gradients, strict=True))).to(total)
        mean = self.sum_over_ranks(total) / self.privacy.expected_batch_size
        self.step_optimizer(unflatten(mean, dict(parameters)))

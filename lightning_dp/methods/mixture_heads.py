"""Linear heads trained on a release. All of it is post-processing: no private record is read.

Heads are (classes, values + 1), the bias last.
"""

from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lightning_dp.errors import ConfigError

_ROWS = 4096  # of a release, in one product


class ReleaseHead(ABC):
    """Makes a head from released inputs and soft labels."""

    @abstractmethod
    def __call__(self, inputs: Tensor, targets: Tensor, noise_std: float) -> Tensor:
        """Head (classes, values + 1) from inputs (n, values) and targets (n, classes), which may be below 0.

        ``noise_std`` is the standard deviation of the noise in each value of the inputs, a public number.
        """


@final
class MixtureHead(ReleaseHead):
    """Softmax regression on mixtures, as in NeuroMixGDP (Li, Cao, Yao 2024, arXiv 2202.06467, and its code).

    The loss is the generalised Kullback-Leibler divergence from the labels, clamped at 0, to the prediction; up to a
    constant the cross entropy with labels that do not sum to 1. Adam, with the rate divided by 10 at 40, 60 and 80 % of
    the epochs.

    Args:
        epochs: passes over the release; 200 in the paper.
        lr: learning rate; 1e-3 in the paper.
        batch_size: rows per step.
        max_grad: bound on the length of the gradient of a single row, 0.1 in the released code; None for none.
        seed: of the order of the rows; public.
    """

    def __init__(
        self,
        epochs: int = 30,
        lr: float = 1e-3,
        batch_size: int = 256,
        max_grad: float | None = None,
        seed: int = 0,
    ) -> None:
        if epochs < 1 or batch_size < 1 or not lr > 0 or (max_grad is not None and not max_grad > 0):
            raise ConfigError("MixtureHead.epochs, batch_size, lr and max_grad must be above 0: correct them")
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.max_grad = max_grad
        self.seed = seed

    def __call__(self, inputs: Tensor, targets: Tensor, noise_std: float) -> Tensor:
        """Train it."""
        head = torch.zeros(targets.shape[1], inputs.shape[1] + 1, device=inputs.device)
        optimizer = torch.optim.Adam([head], lr=self.lr, fused=True)
        milestones = [int(self.epochs * share) for share in (0.4, 0.6, 0.8)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        for epoch in tqdm(range(self.epochs), desc="head", leave=False):
            order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(inputs)))
            for rows in torch.split(order.to(inputs.device), self.batch_size):
                head.grad = head_gradient(head, inputs[rows], targets[rows].clamp(min=0), self.max_grad)
                optimizer.step()
            scheduler.step()
        return head


def head_gradient(head: Tensor, inputs: Tensor, targets: Tensor, max_grad: float | None) -> Tensor:
    """Gradient (classes, values + 1) of the mean generalised KL divergence, each row's part bounded by ``max_grad``.

    Args:
        head: (classes, values + 1).
        inputs: (n, values).
        targets: (n, classes), at least 0.
        max_grad: L2 bound of one row, or None.
    """
    predicted = F.linear(inputs, head[:, :-1], head[:, -1]).softmax(1)
    residuals = predicted * targets.sum(1, keepdim=True) - targets
    if max_grad is not None:
        # the gradient of a row is the outer product of its residual and its input, with a 1 for the bias
        norms = residuals.norm(dim=1) * (inputs.square().sum(1) + 1).sqrt()
        residuals = residuals * (max_grad / norms.clamp(min=max_grad))[:, None]
    return torch.cat([residuals.T @ inputs, residuals.sum(0)[:, None]], dim=1) / len(inputs)


@final
class RidgeHead(ReleaseHead):
    """Least squares from inputs to labels, with the noise of the inputs taken out of their covariance.

    The inputs are features and noise of a known variance. What the noise adds to the covariance would keep the head
    from using directions in which records differ little, so it is subtracted (errors in variables; Fuller 1987,
    recalled), and a ridge stands for what cannot be known of the rest. For balanced classes it is linear discriminant
    analysis.

    Args:
        ridge: over the variance of the noise; chosen on held-out training records of MNIST, for 60,000 mixtures of
            3,969 values. Fewer mixtures say less of the covariance and need more.
    """

    def __init__(self, ridge: float = 0.05) -> None:
        if not ridge > 0:
            raise ConfigError("RidgeHead.ridge must be above 0: correct it")
        self.ridge = ridge

    def __call__(self, inputs: Tensor, targets: Tensor, noise_std: float) -> Tensor:
        """Solve it; the work is one product and one eigendecomposition."""
        centre, prior = inputs.mean(0), targets.mean(0)
        moments = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        for part in torch.split(inputs, _ROWS):
            moments.addmm_(part.T, part)
        covariance = (moments / len(inputs) - torch.outer(centre, centre)).double()
        shared = (targets.T @ inputs / len(inputs) - torch.outer(prior, centre)).double()
        values, axes = torch.linalg.eigh(covariance)
        # without noise, a millionth of the spread keeps directions without any from dividing by 0
        floor = max(self.ridge * noise_std**2, 1e-6 * float(values.sum()))
        weights = (shared @ axes / ((values - noise_std**2).clamp(min=0) + floor) @ axes.T).to(inputs.dtype)
        return torch.cat([weights, (prior - weights @ centre)[:, None]], dim=1)


@final
class NearestMean(ReleaseHead):
    """Nearest class mean: the means are the averages of the inputs, weighted by the targets."""

    def __call__(self, inputs: Tensor, targets: Tensor, noise_std: float) -> Tensor:
        """Means as a head: x is nearest to the mean c for which ``c.x - |c|^2 / 2`` is largest."""
        return means_as_head(targets.T @ inputs / targets.sum(0).clamp(min=1e-6)[:, None])


def means_as_head(means: Tensor, noise_variance: float = 0.0) -> Tensor:
    """Head (classes, values + 1) of the nearest of ``means`` (classes, values).

    Args:
        means: one a class.
        noise_variance: of each value of the means; it lengthens them, alike for all classes if their sizes are alike,
            and what it adds to their squared lengths in expectation is taken off.
    """
    squares = means.square().sum(1) - noise_variance * means.shape[1]
    return torch.cat([means, -squares[:, None] / 2], dim=1)

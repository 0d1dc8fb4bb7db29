"""Ordinary training of a fresh network on a release. No private record is read."""

import hashlib
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.data import Augmentation
from lightning_dp.errors import ConfigError

_Resettable = nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm


@final
@dataclass(frozen=True)
class ReleaseTraining:
    """SGD with momentum on the images and soft labels of a release, as in Private Set Generation's evaluation.

    Args:
        epochs: passes over the release.
        lr: learning rate, divided by ``1 / decay`` after half of the epochs.
        momentum: of SGD.
        weight_decay: of SGD.
        batch_size: images per step.
        decay: factor on the learning rate at half time.
        augment: random change of the images, each by its own coins.

    Raises:
        ConfigError: a number is out of range.
    """

    epochs: int = 300
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    decay: float = 0.1
    augment: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0 or not self.decay > 0:
            raise ConfigError("training.epochs must be 0 or more; batch_size, lr and decay above 0: correct them")

    def __call__(self, net: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> None:
        """Train ``net`` in place, from fresh weights.

        Args:
            net: inputs -> logits (n, classes).
            inputs: (n, ...).
            targets: (n, classes), soft labels.
            seed: of weights, order and augmentation; public.
        """
        reset(net, seed, -1)
        self.go_on(net, inputs, targets, (seed, -1))

    @torch.enable_grad()
    def go_on(self, net: nn.Module, inputs: Tensor, targets: Tensor, seeds: tuple[int, ...]) -> None:
        """Train ``net`` in place, from the weights that it has; arguments as above."""
        generator = torch.Generator().manual_seed(mixed_seed(*seeds))
        parameters = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
        optimizer = torch.optim.SGD(
            parameters.values(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.epochs // 2 + 1], self.decay)
        for _ in range(self.epochs):
            order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
            for rows in torch.split(order, self.batch_size):
                images = inputs[rows]
                if self.augment is not None:
                    coins = torch.rand(len(rows), self.augment.num_coins, generator=generator)
                    images = self.augment(images, coins.to(inputs.device))
                logits = torch.func.functional_call(net, parameters, (images,))
                loss = F.cross_entropy(logits, targets[rows].clamp(min=0))
                for parameter, gradient in zip(
                    parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
                ):
                    parameter.grad = gradient
                optimizer.step()
            scheduler.step()


def reset(net: nn.Module, *seeds: int) -> None:
    """Draw all weights of ``net`` anew, from ``seeds`` alone; the global generators are left as they were."""
    device = next(net.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(mixed_seed(*seeds))
        for module in net.modules():
            if isinstance(module, _Resettable):
                module.reset_parameters()


def check_resettable(net: nn.Module) -> None:
    """Refuse a network some of whose parameters `reset` would leave as they are.

    Raises:
        ConfigError: naming the module.
    """
    for name, module in net.named_modules():
        if not isinstance(module, _Resettable) and list(module.parameters(recurse=False)):
            raise ConfigError(
                f"model.net's {name or 'root'} ({type(module).__name__}) has parameters that cannot be drawn anew: use "
                "convolutions, linear layers, group and layer norms"
            )


def mixed_seed(*seeds: int) -> int:
    """One seed from several, the same in every process; PyTorch's CPU generator uses 32 bits of it."""
    return int.from_bytes(hashlib.blake2b(repr(seeds).encode(), digest_size=4).digest(), "little")

"""One training step by each engine: forward, backward, clip, noise, SGD."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from benchmarks.cases import Case
from lightning_dp.privacy.clipping import Tensors, clipped_sum
from lightning_dp.privacy.engines import OneBackward

Step = Callable[[], None]
Low = Callable[[], torch.autocast]
_PRIVATE: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}


def make_step(case: Case, engine: str, views: int, device: str = "cpu") -> Step:
    """The step of one engine, on data of its own seed; ``views`` images a record."""
    torch.manual_seed(0)
    net = case.make().to(device)
    images = torch.randn(case.batch, views, *case.shape).to(device)
    records = images, torch.randint(0, case.classes, (case.batch,)).to(device)
    low = partial(torch.autocast, device, torch.bfloat16, enabled=case.bf16)
    return ENGINES[engine](net, torch.optim.SGD(net.parameters(), lr=0.01), records, low)


def _plain(net: nn.Module, optimizer: torch.optim.Optimizer, records: tuple[Tensor, Tensor], low: Low) -> Step:
    images, labels = records[0].flatten(0, 1), records[1].repeat_interleave(records[0].shape[1])

    def step() -> None:
        optimizer.zero_grad()
        with low():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ours(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    records: tuple[Tensor, Tensor],
    low: Low,
    reference: bool = False,
) -> Step:
    def loss(parameters: Tensors, images: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (images,)), label.expand(len(images)))

    engine = OneBackward(loss)

    def step() -> None:
        parameters = {name: value.detach() for name, value in net.named_parameters()}
        with low():
            if reference:
                total = clipped_sum(
                    lambda *record: grad(loss)(parameters, *record),
                    records,
                    parameters,
                    max_norm=1.0,
                    chunk=len(records[1]),
                )
            else:
                total = engine.clipped_sum(records, parameters, max_norm=1.0, chunk=len(records[1]))
        for name, value in net.named_parameters():
            value.grad = total[name].add_(torch.randn_like(value)).div_(len(records[1]))
        optimizer.step()

    return step


def _opacus_hooks(net: nn.Module, optimizer: torch.optim.Optimizer, records: tuple[Tensor, Tensor], low: Low) -> Step:
    images, labels = records[0].flatten(0, 1), records[1]
    model = GradSampleModule(net)
    private = DPOptimizer(optimizer, expected_batch_size=len(labels), **_PRIVATE)

    def step() -> None:
        private.zero_grad()
        with low():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        private.step()

    return step


def _opacus_ghost(net: nn.Module, optimizer: torch.optim.Optimizer, records: tuple[Tensor, Tensor], low: Low) -> Step:
    images, labels = records[0].flatten(0, 1), records[1]
    model = GradSampleModuleFastGradientClipping(net, max_grad_norm=1.0, use_ghost_clipping=True)
    private = DPOptimizerFastGradientClipping(optimizer, expected_batch_size=len(labels), **_PRIVATE)
    criterion = DPLossFastGradientClipping(model, private, nn.CrossEntropyLoss())

    def step() -> None:
        private.zero_grad()
        with low():
            loss = criterion(model(images), labels)
        loss.backward()
        private.step()

    return step


ENGINES: dict[str, Callable[..., Step]] = {
    "plain": _plain,
    "ours": _ours,
    "reference": partial(_ours, reference=True),
    "opacus_hooks": _opacus_hooks,
    "opacus_ghost": _opacus_ghost,
}
# Opacus has no views: it would clip each image by itself.
WITH_VIEWS = ("plain", "ours", "reference")

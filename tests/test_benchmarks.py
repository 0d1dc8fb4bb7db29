"""The benchmark's engines do the same work: one step of each moves a network, in float32 and in bfloat16."""

import pytest
import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.engines import ENGINES, WITH_VIEWS, make_step


def _step(engine: str, views: int, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights before and after."""
    made = []

    def make() -> nn.Module:
        made.append(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)))
        return made[0]

    step = make_step(Case(make, (3, 2, 2), 6, bf16=bf16), engine, views)
    before = made[0][1].weight.detach().clone()
    step()
    return before, made[0][1].weight.detach()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_makes_a_step(engine: str, bf16: bool) -> None:
    before, after = _step(engine, 1, bf16)
    assert after.dtype == torch.float32
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("engine", WITH_VIEWS)
def test_engines_with_views_make_a_step(engine: str) -> None:
    before, after = _step(engine, 4, False)
    assert after.isfinite().all()
    assert not torch.equal(before, after)

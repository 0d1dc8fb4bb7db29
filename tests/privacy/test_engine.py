"""The engine: what must never go wrong."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.models import MNISTTanhCNN
from lightning_dp.privacy.clipping import flatten
from lightning_dp.privacy.engines import OneBackward, one_backward
from lightning_dp.privacy.engines.tape import Tape
from tests.privacy.gradients import (
    ALL_KEPT,
    NOTHING_KEPT,
    RECORDS,
    SLACK,
    check,
    fast,
    loss_of,
    slow,
    trained,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_chunk_and_clipping(chunk, clipping):
    net, x = MNISTTanhCNN().double(), torch.randn(RECORDS, 1, 28, 28, dtype=torch.float64)
    expected, _ = slow(net, x, clipping=clipping, max_norm=0.5)
    for budget in (NOTHING_KEPT, ALL_KEPT):
        total = fast(net, x, budget, chunk=chunk, clipping=clipping, max_norm=0.5 / (1 - SLACK))
        assert (total - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("frozen", ["layers.0.weight", "layers.0.bias", "layers.3", "layers.9"])
def test_frozen_parameters(frozen):
    net = MNISTTanhCNN()
    for name, value in net.named_parameters():
        value.requires_grad = not name.startswith(frozen)
    check(net, torch.randn(3, 1, 28, 28))


def test_a_frozen_encoder_does_no_backward_work():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).requires_grad_(False)
    net[2].requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda x: x):
        fast(net.double(), torch.randn(RECORDS, 6, dtype=torch.float64), chunk=RECORDS)
    assert torch.Size([6, 6]) not in saved


def test_the_network_is_left_as_it_was():
    net = MNISTTanhCNN().double()
    before, modules = copy.deepcopy(net.state_dict()), [vars(module).copy() for module in net.modules()]
    fast(net, torch.randn(RECORDS, 1, 28, 28, dtype=torch.float64))
    assert [vars(module) for module in net.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(value.grad is None for value in net.parameters())


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.hidden = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.linear(x)
        with torch._C.DisableTorchFunction():  # no mode sees what happens here
            return x * self.hidden


def test_what_cannot_be_followed_goes_to_the_reference_with_one_message(caplog):
    net, x = Hidden().double(), torch.randn(RECORDS, 6, dtype=torch.float64)
    expected, bound = slow(net, x)
    engine = OneBackward(loss_of(net))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            total = fast(net, x, max_norm=bound / (1 - SLACK), engine=engine)
            assert (total - expected).norm() <= 1e-12 * expected.norm()
    assert engine.uses_reference
    assert len(caplog.records) == 1
    assert "hidden" in caplog.text


def test_a_weight_drawn_at_random_goes_to_the_reference():
    class Drop(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.dropout(self.weight, 0.5), self.bias)

    engine = OneBackward(loss_of(Drop(6, 3).double()))
    total = fast(Drop(6, 3).double(), torch.randn(RECORDS, 6, dtype=torch.float64), engine=engine)
    assert engine.uses_reference
    assert total.isfinite().all()


@pytest.mark.parametrize("budget", [NOTHING_KEPT, ALL_KEPT])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_neighbouring_batches_differ_by_at_most_max_norm(budget, clipping):
    net, x = MNISTTanhCNN(), torch.randn(RECORDS, 1, 28, 28)

    def total(x):
        targets = torch.arange(len(x)).remainder(2).float()
        records = x, targets
        engine = OneBackward(loss_of(net), budget)
        return flatten(engine.clipped_sum(records, trained(net), max_norm=0.01, chunk=9, clipping=clipping)).double()

    whole = total(x)
    for left_out in range(RECORDS):
        keep = x.clone()
        keep[left_out] = float("nan")  # contributes zero, and the other targets stay
        assert 0.005 < (whole - total(keep)).norm() <= 0.01
        keep[left_out] = 100.0
        assert (whole - total(keep)).norm() <= 0.02


@pytest.mark.parametrize("budget", [NOTHING_KEPT, ALL_KEPT])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_record_that_is_not_finite_contributes_zero_and_spoils_no_other(budget, bad):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(RECORDS, 2, 4, 4)
    targets = torch.linspace(-1, 1, RECORDS)
    engine = OneBackward(loss_of(net), budget)
    keep = torch.arange(RECORDS) != 2
    settings = {"max_norm": 1.0, "chunk": 64}
    expected = engine.clipped_sum((x[keep], targets[keep]), trained(net), **settings)
    targets[2] = bad
    total = engine.clipped_sum((x, targets), trained(net), **settings)
    torch.testing.assert_close(flatten(total), flatten(expected))
    x[2] = bad
    total = engine.clipped_sum((x, targets), trained(net), **settings)
    torch.testing.assert_close(flatten(total), flatten(expected))


def test_no_records_give_zero():
    net = MNISTTanhCNN()
    total = OneBackward(loss_of(net)).clipped_sum(
        (torch.zeros(0, 1, 28, 28), torch.zeros(0)), trained(net), max_norm=1.0, chunk=4
    )
    assert {name: value.shape for name, value in total.items()} == {n: v.shape for n, v in trained(net).items()}
    assert flatten(total).abs().max() == 0


def test_a_loss_without_the_parameters_gives_zero():
    net = nn.Linear(6, 2)
    engine = OneBackward(lambda parameters, x: x.sum())
    assert flatten(engine.clipped_sum((torch.randn(3, 6),), trained(net), max_norm=1.0, chunk=4)).abs().max() == 0


def test_no_record_sees_another():
    """Even a loss that normalises over its batch: the batch is the one record."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            y = self.linear(x)
            return y - 0.5 * y.mean(0)

    check(Mixing(), torch.randn(RECORDS, 6))


def test_a_loss_that_is_no_scalar_is_refused():
    engine = OneBackward(lambda parameters, x: parameters["w"] * x)
    with pytest.raises(ConfigError, match="return a scalar"):
        engine.clipped_sum((torch.randn(3, 6),), {"w": torch.ones(6)}, max_norm=1.0, chunk=4)


def test_prepare_sees_chunks():
    net, x, seen = nn.Linear(6, 2).double(), torch.randn(RECORDS, 6, dtype=torch.float64), []

    def prepare(x, targets):
        seen.append(len(x))
        return 2 * x, targets

    targets = torch.linspace(-1, 1, RECORDS, dtype=torch.float64)
    engine = OneBackward(loss_of(net))
    total = engine.clipped_sum((x, targets), trained(net), max_norm=0.5, chunk=2, prepare=prepare)
    assert seen == [1, 2, 2, 1]  # first, how much one record takes
    assert torch.equal(flatten(total), fast(net, 2 * x, chunk=2, max_norm=0.5))


@pytest.mark.parametrize("budget", [NOTHING_KEPT, ALL_KEPT])
def test_bfloat16_forward_pass_is_near_and_summed_in_float32(budget):
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 2)
    )
    x, targets = torch.randn(RECORDS, 2, 4, 4), torch.linspace(-1, 1, RECORDS)
    engine = OneBackward(loss_of(net), budget)
    exact = flatten(engine.clipped_sum((x, targets), trained(net), max_norm=1.0, chunk=64))
    with torch.autocast("cpu", torch.bfloat16):
        total = flatten(engine.clipped_sum((x, targets), trained(net), max_norm=1.0, chunk=64))
    assert not engine.uses_reference
    assert total.dtype == torch.float32
    assert 1e-6 < (total - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("budget", [0, 64 << 20])
def test_gradients_that_nearly_cancel_stay_inside_the_ball(budget):
    """A Gram norm is a difference of large numbers: in float32 little may be left of a small true norm."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 1, 32, generator=generator) * 100
    signs = torch.tensor([1.0, -1.0]).repeat(8)[None, :, None]
    records = base * signs + 1e-3 * torch.randn(50, 16, 32, generator=generator)
    weight = torch.randn(24, 32, generator=generator)

    def loss(parameters, rows):
        return torch.nn.functional.linear(rows, parameters["w"]).sum() * 0.5

    for record in records:
        engine = OneBackward(loss, budget)
        total = engine.clipped_sum((record[None],), {"w": weight}, max_norm=0.01, chunk=8)["w"]
        assert not engine.uses_reference
        assert total.norm() <= 0.01 * (1 + 1e-3)


def test_equal_records_under_autocast_differ_by_at_most_max_norm():
    torch.manual_seed(0)
    rows = torch.randn(1, 40).repeat(1001, 1)
    weight = torch.randn(10, 40)

    def total(part):
        engine = OneBackward(lambda p, row: torch.nn.functional.linear(row, p["w"]).logsumexp(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return engine.clipped_sum((part,), {"w": weight}, max_norm=1.0, chunk=2000)["w"]

    assert 0.99 < (total(rows) - total(rows[1:])).norm() <= 1.0 + 1e-3


def test_passes_are_no_larger_than_pays_and_change_nothing(monkeypatch):
    net, x = MNISTTanhCNN().double(), torch.randn(RECORDS, 1, 28, 28, dtype=torch.float64)
    expected, sizes = fast(net, x, chunk=RECORDS), []
    monkeypatch.setattr(one_backward, "_BYTES_PER_USE", 1 << 15)  # four layers: about two records
    plan = Tape.plan

    def watched(tape, *settings):
        sizes.append(tape.uses[0].a[0])
        plan(tape, *settings)

    monkeypatch.setattr(Tape, "plan", watched)
    fast(net, x, chunk=RECORDS, engine=OneBackward(loss_of(net)))
    assert sizes == [RECORDS]  # a whole pass has its own price: so little is not cut
    sizes.clear()
    monkeypatch.setattr(one_backward, "_BYTES_PER_PASS", 0)
    total = fast(net, x, chunk=RECORDS, engine=OneBackward(loss_of(net)))
    assert 1 < len(sizes) <= RECORDS
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == RECORDS
    assert (total - expected).norm() <= 1e-12 * expected.norm()


def test_the_first_look_at_a_record_draws_nothing():
    """A resumed run takes it in another step than an uninterrupted one."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, engine = torch.randn(RECORDS, 6, dtype=torch.float64), OneBackward(loss_of(net))
    totals = []
    for _ in range(2):
        torch.manual_seed(3)
        totals.append(fast(net, x, engine=engine))
    assert torch.equal(totals[0], totals[1])

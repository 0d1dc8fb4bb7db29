import pytest
import torch
from torch.nn import functional as F

from lightning_dp.data import Records, Shift, ViewPlan, make_views
from lightning_dp.data.views import distinct


def made(plan, records=6, augment=None):
    """Views of records of class 0 to 5 with constant pixels 0 to 5; synthetic ones of class 9, pixels 100 and up."""
    images = torch.arange(records, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    pool = torch.arange(100, 108, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    coins = torch.rand(records, sum(plan.widths(0)), generator=torch.Generator().manual_seed(0))
    synthetic = Records(pool, torch.full((8,), 9))
    views, targets = make_views(
        images, torch.arange(records), coins, synthetic, plan, augment, torch.Tensor.float, num_classes=10
    )
    return views[..., 0, 0, 0], targets, coins[:, -plan.k_self :]


def test_order_is_own_synthetic_mixed():
    plan = ViewPlan(k_base=2, k_self=3, k_diff=2)
    views, targets, _ = made(plan)
    assert views.shape == (6, plan.views) == (6, 7)
    assert torch.equal(views[:, :2], torch.arange(6.0)[:, None].expand(-1, 2))
    assert (views[:, 2:4] >= 100).all()
    assert (views[:, 2] != views[:, 3]).all()
    assert torch.equal(targets[:, :4].argmax(2), torch.tensor([[i, i, 9, 9] for i in range(6)]))
    torch.testing.assert_close(targets.sum(2), torch.ones(6, 7))


def test_real_x_synthetic_mixes_an_own_view_with_a_synthetic_one():
    plan = ViewPlan(k_base=2, k_self=50, k_diff=3, pairing="real_x_synthetic", include_unmixed_views=False)
    views, targets, weight = made(plan)
    assert views.shape == (6, plan.views) == (6, 50)
    own = F.one_hot(torch.arange(6), 10)[:, None]
    torch.testing.assert_close(targets, weight[..., None] * own + (1 - weight[..., None]) * F.one_hot(torch.tensor(9)))
    partner = (views - weight * torch.arange(6.0)[:, None]) / (1 - weight)
    assert (partner.round() >= 100).all()
    assert all(len(set(row)) == 3 for row in partner.round().tolist())


def test_without_label_mixing_the_heavier_partner_gives_its_label():
    views, targets, _ = made(ViewPlan(k_base=1, k_self=50, k_diff=1, mix_labels=False))
    own, synthetic, mixed = views[:, :1], views[:, 1:2], views[:, 2:]
    assert (targets.sum(2) == 1).all()
    assert (targets.max(2).values == 1).all()
    assert torch.equal(targets[:, 2:].argmax(2) == 9, (mixed - synthetic).abs() < (mixed - own).abs())


def test_pairing_of_the_pool_has_all_kinds_of_pairs():
    _, targets, _ = made(ViewPlan(k_base=2, k_self=200, k_diff=2, include_unmixed_views=False), records=5)
    kinds = {tuple(sorted(row.nonzero().flatten().tolist())) for row in targets[1]}
    assert kinds == {(1,), (9,), (1, 9)}


def test_views_are_augmented_each_with_its_own_coins():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    plan = ViewPlan(k_base=9, k_self=0, k_diff=3)
    coins = torch.rand(1, sum(plan.widths(2)), generator=torch.Generator().manual_seed(0))
    synthetic = Records(images.expand(4, -1, -1, -1) + 100, torch.zeros(4, dtype=torch.int64))
    views, _ = make_views(
        images, torch.zeros(1).long(), coins, synthetic, plan, Shift(2), torch.Tensor.float, num_classes=2
    )
    assert len({tuple(view.flatten().tolist()) for view in views[0, :9]}) > 5
    for k in range(12):
        before = images.float() + (100 if k >= 9 else 0)
        assert torch.equal(views[:, k], Shift(2)(before, coins[:, 2 * k : 2 * k + 2]))


def test_no_records_give_no_views():
    views, targets, _ = made(ViewPlan(k_base=2, k_self=3, k_diff=2), records=0)
    assert views.shape == (0, 7)
    assert targets.shape == (0, 7, 10)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 5), (3, 3), (4, 5)])
def test_draws_are_distinct_and_every_set_is_as_likely(count, size):
    rows = distinct(torch.rand(20_000, count, generator=torch.Generator().manual_seed(1)), size)
    assert all(len(set(row)) == count for row in rows[:500].tolist())
    assert rows.min() >= 0
    assert rows.max() < size
    sets, counts = torch.unique(rows.sort(1).values, dim=0, return_counts=True)
    expected = 20_000 / len(sets)
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert len(sets) == len(torch.combinations(torch.arange(size), count))


def test_a_coin_just_below_one_stays_inside():
    almost = torch.tensor([[1 - 2.0**-24]], dtype=torch.float32)
    for size in (1, 2, 3, 5, 1000, 2**16 + 1, 10_000_000):
        assert distinct(almost, size).item() == size - 1

import pytest
import torch
from torch.func import functional_call, grad
from torch.nn import functional as F

from lightning_dp.models import MNISTTanhCNN
from lightning_dp.privacy.clipping import clip_factors, clipped_sum, flatten, record_norms, unflatten
from tests import reference

MAX_NORM = 0.5


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return MNISTTanhCNN().double()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(13, 1, 28, 28, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 10, (13,), generator=generator)


def gradient_sum(net, batch, chunk=5, clipping="flat", max_norm=MAX_NORM):
    template = {name: value.detach() for name, value in net.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(net, parameters, (image[None],)), label[None])

    def contribution(image, label):
        return grad(loss)(template, image, label)

    return flatten(clipped_sum(contribution, batch, template, max_norm=max_norm, chunk=chunk, clipping=clipping))


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_equals_the_loop_over_records(net, batch, clipping, chunk):
    rows = reference.record_gradients(net, F.cross_entropy, *batch)
    expected = reference.clipped_sum(rows, MAX_NORM, clipping)
    torch.testing.assert_close(gradient_sum(net, batch, chunk, clipping), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_neighbouring_batches_differ_by_at_most_max_norm(net, batch, clipping):
    images, labels = batch
    whole = gradient_sum(net, batch, clipping=clipping)
    for left_out in range(len(labels)):
        keep = torch.arange(len(labels)) != left_out
        fewer = gradient_sum(net, (images[keep], labels[keep]), clipping=clipping)
        difference = (whole - fewer).norm()
        assert 0 < difference <= MAX_NORM
        replaced = images.clone()
        replaced[left_out] = 100.0
        assert (whole - gradient_sum(net, (replaced, labels), clipping=clipping)).norm() <= 2 * MAX_NORM


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_neighbours_differ_by_at_most_max_norm_under_autocast(clipping):
    """A sum in bfloat16 would round each record to 8 bits, and to nothing beside a large sum."""
    rows = torch.full((1001, 50), 3.7)

    def total(part):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return clipped_sum(
                lambda row: {"w": row}, (part,), {"w": rows[0]}, max_norm=1.0, chunk=2000, clipping=clipping
            )["w"]

    difference = (total(rows) - total(rows[1:])).norm()
    assert 0.99 < difference <= 1.0 + 1e-4


def test_a_long_float32_record_stays_inside_the_ball():
    """A plain float32 norm of one long row comes out too small, and the clipped row too long."""
    row = torch.randn(1, 3_000_000, generator=torch.Generator().manual_seed(0))
    total = clipped_sum(lambda value: {"w": value}, (row,), {"w": row[0]}, max_norm=1.0, chunk=1)["w"]
    assert 1 - 5e-6 < total.double().norm() <= 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_record_that_is_not_finite_contributes_zero(bad):
    rows = torch.tensor([[0.1, 0.2], [bad, 0.0], [0.3, -0.1]])
    total = clipped_sum(lambda row: {"w": row}, (rows,), {"w": rows[0]}, max_norm=1.0, chunk=3)["w"]
    torch.testing.assert_close(total, torch.tensor([0.4, 0.1]))


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_zero_and_empty(clipping):
    def total(rows):
        return clipped_sum(
            lambda row: {"w": row}, (rows,), {"w": torch.zeros(3)}, max_norm=1.0, chunk=2, clipping=clipping
        )["w"]

    assert torch.equal(total(torch.zeros(4, 3)), torch.zeros(3))
    assert torch.equal(total(torch.zeros(0, 3)), torch.zeros(3))


def test_infinite_bound_is_the_plain_sum(net, batch):
    rows = reference.record_gradients(net, F.cross_entropy, *batch)
    torch.testing.assert_close(gradient_sum(net, batch, max_norm=float("inf")), torch.stack(rows).sum(0))


def test_prepare_sees_chunks_and_changes_what_is_summed():
    rows = torch.ones(5, 2)
    seen = []

    def prepare(part):
        seen.append(len(part))
        return (part * 0.1,)

    total = clipped_sum(lambda row: {"w": row}, (rows,), {"w": rows[0]}, max_norm=1.0, chunk=2, prepare=prepare)
    assert seen == [2, 2, 1]
    torch.testing.assert_close(total["w"], torch.full((2,), 0.5))


def test_norm_is_over_all_tensors_together():
    row = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    total = clipped_sum(lambda _: row, (torch.zeros(1),), row, max_norm=1.0, chunk=1)
    torch.testing.assert_close(flatten(total), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_factors_never_lengthen_under_flat_clipping():
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, float("nan"), float("inf")])
    assert (clip_factors(norms, 1.0, "flat") <= 1).all()
    assert clip_factors(norms, 1.0, "flat")[-2:].tolist() == [0.0, 0.0]
    assert (clip_factors(norms[:4], 1.0, "automatic") * norms[:4] < 1).all()


def test_norms_and_layout_round_trip():
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    back = unflatten(flatten(tensors), tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    flat = torch.randn(3, 5000, dtype=torch.float64)
    torch.testing.assert_close(record_norms(flat), flat.norm(dim=1))

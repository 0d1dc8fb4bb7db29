"""The fixer and the check: what they find, what they keep, what they refuse."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from lightning_dp.errors import ConfigError
from lightning_dp.models import RecordDropPath, make_private_ready, validate


def _trained_batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def _net_with_everything() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 48, 3),
        _trained_batch_norm(48),
        nn.ReLU6(inplace=True),
        nn.InstanceNorm2d(48, affine=True, track_running_stats=True),
        StochasticDepth(0.5, mode="batch"),
        BatchNormAct2d(48, act_layer=nn.SiLU),
        nn.Flatten(),
        nn.Linear(48 * 4, 16),
        nn.BatchNorm1d(16),
        nn.Dropout(0.5, inplace=True),
    )


def _per_record_gradients(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(net, parameters, (image[None],)).square().sum()

    return vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, images)


def test_every_change_is_reported_and_nothing_else():
    _, changes = make_private_ready(_net_with_everything())
    assert changes == [
        "1: BatchNorm2d(48) -> GroupNorm(24, 48), affine weight and bias kept",
        "3: InstanceNorm2d no longer keeps running statistics",
        "4: StochasticDepth(mode='batch') -> RecordDropPath(p=0.5), one draw per record",
        "5: BatchNormAct2d(48) -> GroupNorm(24, 48), affine weight and bias kept",
        "8: BatchNorm1d(16) -> GroupNorm(1, 16), affine weight and bias kept",
        "2: ReLU6 no longer works in place",
        "5.act: SiLU no longer works in place",
        "9: Dropout no longer works in place",
    ]


def test_validate_names_each_problem_before_and_none_after():
    net = _net_with_everything()
    problems = validate(net)
    assert [line.split(":")[0] for line in problems] == ["1", "2", "3", "4", "5", "5.act", "8", "9"]
    assert all("make_private_ready" in line and "\n" not in line for line in problems)
    assert validate(make_private_ready(net)[0]) == []


def test_repaired_network_has_per_record_gradients_and_leaves_the_original_alone():
    net = _net_with_everything()
    before = copy.deepcopy(net.state_dict())
    fixed, _ = make_private_ready(net)
    gradients = _per_record_gradients(fixed, torch.randn(4, 3, 4, 4))
    assert all(g.shape[0] == 4 and g.isfinite().all() for g in gradients.values())
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[2].inplace
    assert isinstance(net[4], StochasticDepth)


def test_original_gives_no_per_record_gradients():
    with pytest.raises(RuntimeError):
        _per_record_gradients(_net_with_everything(), torch.randn(4, 3, 4, 4))


def test_affine_map_mode_and_frozen_state_are_kept():
    norm = _trained_batch_norm(64).eval()
    norm.weight.requires_grad_(False)
    fixed = make_private_ready(norm)[0]
    assert isinstance(fixed, nn.GroupNorm)
    assert (fixed.num_groups, fixed.eps, fixed.training) == (32, 1e-3, False)
    assert torch.equal(fixed.weight, norm.weight)
    assert torch.equal(fixed.bias, norm.bias)
    assert fixed.weight is not norm.weight
    assert (fixed.weight.requires_grad, fixed.bias.requires_grad) == (False, True)


def test_repaired_norm_computes_group_norm_with_the_old_affine_map():
    norm, images = _trained_batch_norm(6), torch.randn(2, 6, 5, 5)
    expected = nn.functional.group_norm(images, 3, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(make_private_ready(norm, groups=3)[0](images), expected)


def test_norm_without_affine_map_stays_without():
    fixed, changes = make_private_ready(nn.BatchNorm3d(8, affine=False))
    assert fixed.weight is None
    assert changes == ["the network itself: BatchNorm3d(8) -> GroupNorm(4, 8), no affine map, as before"]


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (16, 8), (37, 1), (33, 11), (1, 1)])
def test_group_count_is_the_largest_divisor(channels, groups):
    assert make_private_ready(nn.SyncBatchNorm(channels))[0].num_groups == groups


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d(16), (3, 16)), (nn.BatchNorm2d(16), (3, 16, 1, 1))])
def test_norm_over_one_position_does_not_become_a_constant(norm, shape):
    features = torch.randn(shape)
    out = make_private_ready(norm)[0](features)
    assert (out - out[0]).abs().max() > 0.1


def test_timm_norm_keeps_its_activation():
    norm = BatchNormAct2d(8, act_layer=nn.ReLU)
    nn.init.constant_(norm.bias, -1.0)
    out = make_private_ready(norm)[0](torch.randn(2, 8, 5, 5))
    assert out.min() == 0
    assert out.max() > 0


def test_module_used_twice_is_replaced_twice_by_the_same():
    shared = nn.BatchNorm2d(4)
    fixed, changes = make_private_ready(nn.Sequential(shared, nn.Identity(), shared))
    assert isinstance(fixed[0], nn.GroupNorm)
    assert fixed[0] is fixed[2]
    assert len(changes) == 1


def _batch_norm(*, frozen: bool, train: bool, tracked: bool = True) -> nn.Module:
    return nn.BatchNorm2d(4, track_running_stats=tracked).requires_grad_(not frozen).train(train)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (_batch_norm(frozen=False, train=True), "mixes the records"),
        (_batch_norm(frozen=True, train=True), "frozen but in train mode"),
        (_batch_norm(frozen=False, train=False), "eval mode but not frozen"),
        (_batch_norm(frozen=True, train=False, tracked=False), "has no statistics"),
    ],
)
def test_batch_norm_that_mixes_records_is_found_and_repaired(norm, words):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    (problem,) = validate(net)
    assert problem.startswith("1: BatchNorm2d")
    assert words in problem
    assert isinstance(make_private_ready(net)[0][1], nn.GroupNorm)


def test_batch_norm_frozen_and_in_eval_mode_is_allowed_and_kept():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), _batch_norm(frozen=True, train=False), FrozenBatchNorm2d(4))
    assert validate(net) == []
    fixed, changes = make_private_ready(net)
    assert isinstance(fixed[1], nn.BatchNorm2d)
    assert changes == []
    assert _per_record_gradients(net, torch.randn(2, 3, 5, 5))["0.weight"].isfinite().all()


def test_attention_and_lstm_are_no_problem():
    net = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(4, 4), nn.Embedding(3, 4), nn.LayerNorm(4)])
    assert validate(net) == []
    assert validate(net.eval()) == []


class _OwnBatchNorm(nn.BatchNorm2d):
    pass


class _OwnStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(4))


@pytest.mark.parametrize("module", [_OwnBatchNorm(4), _OwnStatistics(), nn.GRU(4, 4), nn.RReLU()])
def test_what_cannot_be_repaired_is_refused_by_name(module):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(module))
    assert validate(net)[0].startswith(f"1.0: {type(module).__name__}")
    with pytest.raises(ConfigError, match=rf"cannot repair 1\.0: {type(module).__name__}") as caught:
        make_private_ready(net)
    assert "\n" not in str(caught.value)


def test_group_count_below_one_is_refused():
    with pytest.raises(ConfigError, match="groups=0"):
        make_private_ready(nn.Identity(), groups=0)


def test_drop_path_draws_for_each_record_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = RecordDropPath(0.25), torch.ones(4000, 2, 3)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))  # a record is dropped whole
    assert abs(out.mean().item() - 1) < 4 * (0.25 / 0.75 / 4000) ** 0.5
    under_vmap = vmap(lambda row: drop(row[None]), randomness="different")(x)
    assert 0.2 < (under_vmap == 0).double().mean() < 0.3
    assert not RecordDropPath(1.0)(x).any()
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_refuses_what_is_no_probability():
    with pytest.raises(ConfigError, match=r"p=1\.5"):
        RecordDropPath(1.5)

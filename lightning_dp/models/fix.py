"""Repair a network so that per-record gradients exist, and say what was changed."""

import copy

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lightning_dp.errors import ConfigError

from .check import BATCH_NORMS, INSTANCE_NORMS, BatchNorm, is_fixed_map, validate


class RecordDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382) that draws for each record by itself, also under vmap.

    Args:
        p: probability that a record's residual branch is dropped in training, 0 to 1.

    Raises:
        ConfigError: p is not a probability.

    Example:
        >>> RecordDropPath(0.5).eval()(torch.ones(2, 3)).sum().item()
        6.0
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ConfigError(f"RecordDropPath p={p} is not a probability: use a number from 0 to 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x (n, ...) with dropped records set to 0 and the others divided by 1 - p."""
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < keep
        return x * kept.to(x.dtype) / max(keep, torch.finfo(x.dtype).tiny)


def make_private_ready(net: nn.Module, groups: int = 32) -> tuple[nn.Module, list[str]]:
    """Return a copy of a network in which no module mixes records, overwrites its input or keeps statistics.

    Every BatchNorm becomes a GroupNorm (Wu and He 2018, arXiv 1803.08494) that keeps the affine weight and bias, which
    matters for pretrained networks; running statistics are lost. One that is frozen and in eval mode stays. In-place
    modules get ``inplace=False``, InstanceNorm loses its running statistics, torchvision's StochasticDepth becomes
    ``RecordDropPath``. Dropout and timm's DropPath act on each record and stay. In-place sums in forward functions
    (``out += identity``) stay too: they are exact under ``vmap(grad)``.

    Args:
        net: any network; it is not changed.
        groups: the most groups a GroupNorm gets; the largest divisor of its channels up to this is used that leaves two
            channels or more to a group. BatchNorm1d becomes one group, for it sees no positions to average over.

    Returns:
        The repaired copy, and one line per change.

    Raises:
        ConfigError: a module can't be repaired; the message names it.

    Example:
        >>> make_private_ready(nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48)))[1]
        ['1: BatchNorm2d(48) -> GroupNorm(24, 48), affine weight and bias kept']
    """
    if groups < 1:
        raise ConfigError(f"make_private_ready groups={groups} is below 1: use 1 or more")
    root = nn.Sequential(copy.deepcopy(net))  # a root of its own, so that net itself can be replaced
    done: dict[nn.Module, nn.Module] = {}
    changes = []
    # all paths: a module that is used twice has two, and both must lead to the same replacement
    for path, module in list(root.named_modules(remove_duplicate=False)):
        name = path.partition(".")[2] or "the network itself"
        if module not in done:
            done[module], change = _repair(module, name, groups)
            changes += [f"{name}: {change}"] if change else []
        if done[module] is not module:
            root.set_submodule(path, done[module], strict=True)
    changes += _disable_in_place(root[0])  # last, for a replacement has brought its children along
    if problems := validate(root[0]):
        raise ConfigError(f"make_private_ready cannot repair {problems[0]}")
    return root[0], changes


def _repair(module: nn.Module, name: str, groups: int) -> tuple[nn.Module, str]:
    """Return what takes the place of one module, and the change in words (empty: none)."""
    kind = type(module).__name__
    if isinstance(module, BATCH_NORMS) and not is_fixed_map(module):
        norm = _group_norm(module, name, groups)
        affine = "affine weight and bias kept" if module.affine else "no affine map, as before"
        return norm, f"{kind}({module.num_features}) -> GroupNorm({norm.num_groups}, {norm.num_channels}), {affine}"
    if isinstance(module, INSTANCE_NORMS) and module.track_running_stats:
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
        return module, f"{kind} no longer keeps running statistics"
    if isinstance(module, StochasticDepth) and module.p > 0:
        drop = RecordDropPath(module.p).train(module.training)
        return drop, f"StochasticDepth(mode='{module.mode}') -> RecordDropPath(p={module.p:g}), one draw per record"
    return module, ""


def _group_norm(norm: BatchNorm, name: str, groups: int) -> nn.GroupNorm:
    """Return the GroupNorm of a BatchNorm, with its affine map, device, mode and frozen state."""
    channels = norm.num_features
    # one channel at one position (after a global pool) normalises to 0: no group of a single channel
    most = 1 if isinstance(norm, nn.BatchNorm1d) else max(1, min(groups, channels // 2))
    count = next(divisor for divisor in range(most, 0, -1) if channels % divisor == 0)
    if type(norm) in BATCH_NORMS:
        new = nn.GroupNorm(count, channels, eps=norm.eps, affine=False)
    elif type(norm).__module__ == "timm.layers.norm_act":
        from timm.layers import GroupNormAct  # the norm came from timm, so timm is installed

        new = GroupNormAct(channels, count, eps=norm.eps, affine=False, apply_act=False)
        new.drop, new.act = norm.drop, norm.act
    else:
        raise ConfigError(
            f"make_private_ready cannot repair {name}: {type(norm).__name__} is a BatchNorm of unknown kind, "
            "replace it by hand"
        )
    new.affine, new.weight, new.bias = norm.affine, norm.weight, norm.bias
    return new.train(norm.training)


def _disable_in_place(net: nn.Module) -> list[str]:
    """Turn off every module's ``inplace`` and say where."""
    changes = []
    for name, module in net.named_modules():
        if vars(module).get("inplace") is True:
            module.inplace = False
            changes.append(f"{name or 'the network itself'}: {type(module).__name__} no longer works in place")
    return changes

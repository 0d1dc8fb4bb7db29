"""Find what in a network breaks per-record gradients."""

from collections.abc import Iterator

from opacus.validators import ModuleValidator
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# no batching rule in torch.func
_NOT_UNDER_VMAP = (nn.GRU, nn.RNN, nn.RReLU)
_FIX = "repair it with make_private_ready(net)"


def validate(net: nn.Module) -> list[str]:
    """List the problems that keep ``vmap(grad)`` from giving the gradient of each record by itself.

    Normalisation over the batch makes one record's loss depend on the others, and running statistics are a release of
    private data without noise. A BatchNorm that is frozen *and* in eval mode is a fixed affine map, and allowed. What
    Opacus' ModuleValidator finds is included, except what only its hooks cannot do (attention, LSTM). The check is by
    module: what a forward function does with its tensors is not seen.

    Args:
        net: any network; it is not changed.

    Returns:
        One line per problem, with the path of the module and the way out; empty when there is none.

    Example:
        >>> validate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)))
        ['1: ReLU(inplace=True) overwrites a tensor that may be needed: repair it with make_private_ready(net)']
        >>> validate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        []
    """
    lines = []
    for path, module in net.named_modules():
        lines += [f"{path or 'the network itself'}: {problem}" for problem in _problems(module)]
    return lines


def is_fixed_map(norm: nn.Module) -> bool:
    """Tell whether a BatchNorm is frozen, in eval mode and has statistics to use, so that it mixes no records."""
    frozen = not any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
    return frozen and not norm.training and any(True for _ in norm.buffers(recurse=False))


def _problems(module: nn.Module) -> Iterator[str]:
    """Yield what is wrong with one module, its children left aside."""
    kind = type(module).__name__
    if isinstance(module, BATCH_NORMS):
        if not is_fixed_map(module):
            yield _batch_norm_problem(module)
    elif isinstance(module, INSTANCE_NORMS):
        if module.track_running_stats:
            yield f"{kind} keeps running statistics of private records: {_FIX}"
    elif isinstance(module, StochasticDepth):
        if module.p > 0:
            yield f"torchvision's {kind} has no per-record form (mode '{module.mode}'): {_FIX}"
    elif isinstance(module, _NOT_UNDER_VMAP):
        yield f"{kind} does not run under vmap(grad), and nothing replaces it exactly: use another layer"
    elif _keeps_statistics(module):
        yield f"{kind} keeps running statistics, and no replacement is known: use another layer"
    else:
        yield from _opacus_problems(module)
    if vars(module).get("inplace") is True:
        yield f"{kind}(inplace=True) overwrites a tensor that may be needed: {_FIX}"


def _batch_norm_problem(norm: BatchNorm) -> str:
    """Say why this BatchNorm is refused."""
    kind = type(norm).__name__
    frozen = not any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
    if frozen and norm.training:
        return f"{kind} is frozen but in train mode, so it mixes the records of a batch: call its eval(), or {_FIX}"
    if not norm.training:
        return f"{kind} is in eval mode but not frozen, or has no statistics: freeze it, or {_FIX}"
    return f"{kind} mixes the records of a batch: {_FIX}"


def _keeps_statistics(module: nn.Module) -> bool:
    """Tell whether a module of unknown kind has running statistics that training would change."""
    if isinstance(module, FrozenBatchNorm2d) or is_fixed_map(module):
        return False
    return any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


def _opacus_problems(module: nn.Module) -> Iterator[str]:
    """Yield what Opacus says about one leaf module, in one line."""
    # Opacus refuses LSTM and attention (which is no leaf) for the sake of its hooks; vmap(grad) takes them exactly
    if isinstance(module, nn.LSTM) or any(True for _ in module.children()):
        return
    for error in ModuleValidator.validate(module, strict=False):
        message = " ".join(str(error).split())
        # eval mode is no obstacle here
        if "training mode" not in message:
            yield f"{type(module).__name__}: {message}"

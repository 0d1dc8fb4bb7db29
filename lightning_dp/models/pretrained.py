"""Networks of torchvision and timm by name, repaired for per-record gradients."""

import difflib
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from lightning_dp.errors import ConfigError

from .fix import make_private_ready

_LOG = logging.getLogger(__name__)
# in training these return the logits of auxiliary classifiers too
_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


class TorchvisionNet(nn.Module):
    """A torchvision classifier after ``make_private_ready``.

    Args:
        name: a name of ``torchvision.models.list_models()``, for example ``resnet18``.
        num_classes: number of logits. Pretrained weights for another number of classes lose their head.
        weights: pretrained weights to download, for example ``DEFAULT`` or ``IMAGENET1K_V1``. Their training data
            must be public.
        weights_file: state dict of the original torchvision network on disk, in the place of ``weights``.

    Attributes:
        changes: one line for each thing that differs from the network of that name.

    Raises:
        ConfigError: the name or the weights are unknown, or the weights do not fit.

    Example:
        >>> TorchvisionNet("resnet18", num_classes=10).changes[0]
        'bn1: BatchNorm2d(64) -> GroupNorm(32, 64), affine weight and bias kept'
    """

    def __init__(
        self, name: str, num_classes: int, weights: str | None = None, weights_file: Path | None = None
    ) -> None:
        super().__init__()
        _check_settings("TorchvisionNet", num_classes, weights is not None, weights_file)
        if name in _SEVERAL_OUTPUTS:
            raise ConfigError(f"TorchvisionNet name={name} returns more than logits in training: use another network")
        names = models.list_models(module=models)
        if name not in names:
            raise ConfigError(unknown_name("TorchvisionNet", name, names, "torchvision.models.list_models()"))
        net = models.get_model(name, weights=None, num_classes=num_classes)
        notes: list[str] = []
        if weights is not None:
            notes = _load(net, torchvision_weights(name, weights), f"weights={weights}")
        if weights_file is not None:
            notes = _load(net, read_weights(weights_file), f"weights_file={weights_file}")
        self.net, self.changes = _repair_and_log(name, net, notes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of normalised images (n, 3, H, W)."""
        logits: Tensor = self.net(images)
        return logits


class TimmNet(nn.Module):
    """A timm classifier after ``make_private_ready``.

    Args:
        name: a name of ``timm.list_models()``, for example ``vit_tiny_patch16_224``.
        num_classes: number of logits. Pretrained weights for another number of classes lose their head.
        pretrained: download the weights that timm has for this name. Their training data must be public.
        weights_file: state dict of the original timm network on disk, in the place of ``pretrained``.

    Attributes:
        changes: one line for each thing that differs from the network of that name.

    Raises:
        ConfigError: timm is not installed, the name is unknown, or the weights do not fit.

    Example:
        >>> TimmNet("resnet10t", num_classes=10).changes[-1]
        'layer4.0.act2: ReLU no longer works in place'
    """

    def __init__(self, name: str, num_classes: int, pretrained: bool = False, weights_file: Path | None = None) -> None:
        super().__init__()
        _check_settings("TimmNet", num_classes, pretrained, weights_file)
        try:
            import timm
        except ImportError as error:
            raise ConfigError("TimmNet needs timm: pip install 'lightning_dp[timm]'") from error
        if not timm.is_model(name):
            raise ConfigError(unknown_name("TimmNet", name, timm.list_models(), "timm.list_models()"))
        net: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
        notes = [] if weights_file is None else _load(net, read_weights(weights_file), f"weights_file={weights_file}")
        self.net, self.changes = _repair_and_log(name, net, notes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of normalised images (n, 3, H, W)."""
        if images.shape[0] == 0:  # Swin and some others cannot reshape an empty batch
            return self(images.new_zeros(1, *images.shape[1:]))[:0]  # type: ignore[no-any-return]
        logits: Tensor = self.net(images)
        return logits


def _check_settings(owner: str, num_classes: int, downloads: bool, weights_file: Path | None) -> None:
    """Refuse settings that contradict one another."""
    if num_classes < 1:
        raise ConfigError(f"{owner} num_classes={num_classes} is below 1: use 1 or more")
    if downloads and weights_file is not None:
        raise ConfigError(f"{owner} has weights to download and weights_file={weights_file}: give one of them")


def unknown_name(owner: str, name: str, known: Sequence[str], listing: str) -> str:
    """Return the message for a name that is not known, with the nearest that are."""
    near = difflib.get_close_matches(name, known, n=3)
    nearest = f"did you mean {', '.join(near)}? " if near else ""
    return f"{owner} name={name} is unknown: {nearest}{listing} has all names"


def torchvision_weights(name: str, weights: str) -> dict[str, Tensor]:
    """Download (or take from torch's cache) the pretrained state dict of a torchvision network."""
    known = models.get_model_weights(name).__members__
    if weights not in known:
        raise ConfigError(f"TorchvisionNet weights={weights} is unknown for {name}: use {', '.join(known)}")
    # through a network of its own: torchvision renames the keys of some files while it loads them
    state: dict[str, Tensor] = models.get_model(name, weights=known[weights], progress=False).state_dict()
    return state


def read_weights(weights_file: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file."""
    if not weights_file.is_file():
        raise ConfigError(f"weights_file={weights_file} is not a file: give the path of a state dict")
    try:
        state = torch.load(weights_file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"weights_file={weights_file} is not a file of tensors that torch.load reads") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"weights_file={weights_file} is not a plain state dict: save net.state_dict() alone")
    return state


def _load(net: nn.Module, state: dict[str, Tensor], setting: str) -> list[str]:
    """Load a state dict into a network; leave out a head for other classes and say so."""
    own = net.state_dict()
    head = next(reversed(own)).rpartition(".")[0]
    of_head = {key for key in own if key.rpartition(".")[0] == head}
    notes = []
    if any(key in state and state[key].shape != own[key].shape for key in of_head):
        notes = [f"{head}: weights for other classes left out, the new head starts at its initialisation"]
        state = {key: value for key, value in state.items() if key not in of_head}
        own = {key: value for key, value in own.items() if key not in of_head}
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # absent from the oldest files, and not used
    wrong = sorted((own.keys() ^ state.keys()) - counters)
    wrong = wrong or [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        raise ConfigError(f"{setting} does not fit the network: {wrong[0]} is missing, unexpected or of another shape")
    net.load_state_dict(state, strict=False)
    return notes


def _repair_and_log(name: str, net: nn.Module, notes: list[str]) -> tuple[nn.Module, list[str]]:
    """Make a network ready for per-record gradients and log every change in one record."""
    ready, changes = make_private_ready(net)
    changes = notes + changes
    _LOG.info("%s: %d changes for per-record gradients: %s", name, len(changes), "; ".join(changes))
    return ready, changes

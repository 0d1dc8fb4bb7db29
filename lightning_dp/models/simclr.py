"""SimCLR's ResNets, read from the checkpoint files of other projects without importing those."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any, final

import torch
from lightning_fabric.utilities.data import AttributeDict
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torchvision import models

from lightning_dp.errors import ConfigError

from .encoder import Constants, Encoder, FeatureNorm
from .encoders import load_exactly

# What old Lightning checkpoints hold beside tensors: holders of settings, and the classes of callbacks as keys. Naming
# them runs no code of the file.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    AttributeDict,
    (AttributeDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (EarlyStopping, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
]
# SimCLRv2's place of a module in a bottleneck block -> torchvision's
_V2_BLOCK = {
    "projection.shortcut": "downsample.0",
    "projection.bn.0": "downsample.1",
    "net.0": "conv1",
    "net.1.0": "bn1",
    "net.2": "conv2",
    "net.3.0": "bn2",
    "net.4": "conv3",
    "net.5.0": "bn3",
}
_V2_STEM = {"net.0.0": "conv1", "net.0.1.0": "bn1"}


@final
class SimCLREncoder(Encoder):
    """Globally pooled features of a ResNet trained by SimCLR (Chen et al. 2020, arXiv 2002.05709 and 2006.10029).

    Two layouts are read. lightning-bolts: a Lightning checkpoint whose ``state_dict`` holds a ResNet with torchvision's
    names below ``encoder.``; its projection head is left out. SimCLRv2 as converted from TensorFlow: ``{"resnet": ...,
    "head": ...}`` with the blocks below ``net.1`` to ``net.4``, without selective kernels and of width 1
    (``r50_1x_sk0``); the mapping is by name, and every tensor must be there and fit.

    Args:
        weights_file: the checkpoint.
        name: the network, as torchvision calls it, for example ``resnet50``.
        image_size: pixels it was trained with.
        mean: of the images it was trained with; 0 for SimCLRv2, which takes images in [0, 1].
        std: likewise; 1 for SimCLRv2.
        maxpool: whether pooling follows the first convolution. None: with a first kernel of 7 x 7 yes, with the 3 x 3
            one that lightning-bolts has for small images no.
        feature_norm: see `Encoder`.

    Raises:
        ConfigError: the file is not such a checkpoint, or does not fit the network.
    """

    def __init__(
        self,
        weights_file: Path,
        name: str = "resnet50",
        image_size: int = 224,
        mean: Constants = (0.0, 0.0, 0.0),
        std: Constants = (1.0, 1.0, 1.0),
        maxpool: bool | None = None,
        feature_norm: FeatureNorm = "none",
    ) -> None:
        if not re.fullmatch(r"(resnet|resnext|wide_resnet)\d+\w*", name) or name not in models.list_models():
            raise ConfigError(f"SimCLREncoder name={name} is not a ResNet of torchvision: use resnet50, say")
        state = _resnet_state(_read_checkpoint(weights_file), weights_file)
        net = models.get_model(name, weights=None)
        net.fc = nn.Identity()
        kernel = state["conv1.weight"].shape[-1]
        if kernel == 3:
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        if not (kernel != 3 if maxpool is None else maxpool):
            net.maxpool = nn.Identity()
        load_exactly(net, state, f"weights_file={weights_file}")
        title = f"SimCLREncoder {name}, weights of {weights_file.name}"
        super().__init__(net, title, image_size, mean, std, feature_norm)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it."""
    if not path.is_file():
        raise ConfigError(f"SimCLREncoder weights_file={path} is not a file: give the path of a checkpoint")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"SimCLREncoder weights_file={path} holds more than tensors and settings: load it where you trust it, and "
            'torch.save({"state_dict": checkpoint["state_dict"]}, ...)'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"SimCLREncoder weights_file={path} is not a checkpoint of a known layout")
    return checkpoint


def _resnet_state(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The ResNet of a checkpoint under torchvision's names, without its last linear layer."""
    state = checkpoint.get("resnet", checkpoint.get("state_dict", checkpoint))
    if "net.0.0.weight" in state:
        if any(".mixing_conv." in key for key in state):
            raise ConfigError(f"SimCLREncoder weights_file={path} has selective kernels (sk1): use an sk0 file")
        if state["net.0.0.weight"].shape[0] != 64:
            raise ConfigError(f"SimCLREncoder weights_file={path} is a wider ResNet (2x, 3x): use a 1x file")
        state = {_v2_name(key): value for key, value in state.items()}
    else:
        prefix = "" if "conv1.weight" in state else "encoder."
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "conv1.weight" not in state:
        raise ConfigError(
            f"SimCLREncoder weights_file={path} has neither encoder.conv1.weight (lightning-bolts) nor net.0.0.weight "
            "(SimCLRv2): use a file of one of these layouts"
        )
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _v2_name(key: str) -> str:
    """A SimCLRv2 name as torchvision's; an unknown one stays, and is then refused.

    Example:
        >>> _v2_name("net.0.1.0.bias"), _v2_name("net.2.blocks.3.net.4.weight")
        ('bn1.bias', 'layer2.3.conv3.weight')
    """
    module, _, tensor = key.rpartition(".")
    if module in _V2_STEM:
        return f"{_V2_STEM[module]}.{tensor}"
    block = re.fullmatch(r"net\.(\d)\.blocks\.(\d+)\.(.+)", module)
    if block is None or block[3] not in _V2_BLOCK:
        return key
    return f"layer{block[1]}.{block[2]}.{_V2_BLOCK[block[3]]}.{tensor}"

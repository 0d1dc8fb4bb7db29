"""Frozen encoders of timm, torchvision and open_clip, by name or from a file of weights."""

import logging
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from torchvision import models

from lightning_dp.errors import ConfigError

from .encoder import Constants, Encoder, FeatureNorm
from .pretrained import read_weights, torchvision_weights, unknown_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@final
class TimmEncoder(Encoder):
    """Globally pooled features of a timm network; needs the extra ``timm``.

    Args:
        name: a name of ``timm.list_models(pretrained=True)``, for example ``vit_base_patch16_clip_224.laion2b``.
        pretrained: download the weights that timm has for this name; false leaves random ones (for tests).
        weights_file: state dict on disk (.safetensors, .pt), in the place of a download; it has to fit exactly.
        image_size: pixels; None for the size that timm states for these weights.
        mean: of the images the weights were trained with; None for what timm states.
        std: likewise.
        arguments: more arguments of ``timm.create_model``, for example ``{pad_type: same}``.
        feature_norm: see `Encoder`.

    Raises:
        ConfigError: timm is not installed, the name is unknown, or the weights do not fit.

    Example:
        >>> TimmEncoder("test_vit", pretrained=False).num_features
        64
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        weights_file: Path | None = None,
        image_size: int | None = None,
        mean: Constants | None = None,
        std: Constants | None = None,
        arguments: dict[str, Any] | None = None,
        feature_norm: FeatureNorm = "none",
    ) -> None:
        try:
            import timm
        except ImportError as error:
            raise ConfigError("TimmEncoder needs timm: pip install 'lightning_dp[timm]'") from error
        if not timm.is_model(name.partition(".")[0]):
            raise ConfigError(unknown_name("TimmEncoder", name, timm.list_models(), "timm.list_models()"))
        if weights_file is not None and not weights_file.is_file():
            raise ConfigError(f"TimmEncoder weights_file={weights_file} is not a file: give the path of a state dict")
        overlay = None if weights_file is None else _timm_overlay(timm, name, weights_file)
        try:
            net = timm.create_model(
                name,
                pretrained=pretrained or overlay is not None,
                num_classes=0,
                pretrained_cfg_overlay=overlay,
                **(arguments or {}),
            )
        except Exception as error:  # timm and the hub raise many kinds
            raise ConfigError(_cannot_build(f"TimmEncoder {name}", error)) from error
        config = timm.data.resolve_model_data_config(net)
        # where weights came from is not what they are: cached features are recognised by the weights themselves
        net.pretrained_cfg = net.default_cfg = {}
        title = f"TimmEncoder {name}, {_origin(pretrained, weights_file)}"
        size = config["input_size"][-1] if image_size is None else image_size
        super().__init__(net, title, size, mean or config["mean"], std or config["std"], feature_norm)


@final
class TorchvisionEncoder(Encoder):
    """Features of a torchvision classifier before its last linear layer.

    Args:
        name: a name of ``torchvision.models.list_models(torchvision.models)``, for example ``resnet50``.
        weights: weights to download, for example ``IMAGENET1K_V2``; None leaves random ones (for tests).
        weights_file: state dict of the torchvision network on disk, in the place of ``weights``.
        image_size: pixels.
        mean: of the images the weights were trained with; ImageNet's unless stated.
        std: likewise.
        feature_norm: see `Encoder`.

    Raises:
        ConfigError: the name or the weights are unknown, or the weights do not fit.

    Example:
        >>> TorchvisionEncoder("resnet18", weights=None).num_features
        512
    """

    def __init__(
        self,
        name: str,
        weights: str | None = "DEFAULT",
        weights_file: Path | None = None,
        image_size: int = 224,
        mean: Constants = IMAGENET_MEAN,
        std: Constants = IMAGENET_STD,
        feature_norm: FeatureNorm = "none",
    ) -> None:
        names = models.list_models(module=models)
        if name not in names:
            raise ConfigError(unknown_name("TorchvisionEncoder", name, names, "torchvision.models.list_models()"))
        net = models.get_model(name, weights=None)
        head = next(reversed(net.state_dict())).rpartition(".")[0]
        net.set_submodule(head, nn.Identity())
        if weights_file is not None:
            load_exactly(net, _without(read_weights(weights_file), (head,)), f"weights_file={weights_file}")
        elif weights is not None:
            load_exactly(net, _without(torchvision_weights(name, weights), (head,)), f"weights={weights}")
        title = f"TorchvisionEncoder {name}, {_origin(weights, weights_file)}"
        super().__init__(net, title, image_size, mean, std, feature_norm)


@final
class OpenClipEncoder(Encoder):
    """Image embeddings of a CLIP model of open_clip; needs the extra ``clip``.

    Args:
        name: a name of ``open_clip.list_models()``, for example ``ViT-B-16``.
        pretrained: tag of the weights to download, for example ``laion2b_s34b_b88k``; None leaves random ones (for
            tests).
        weights_file: checkpoint of the whole CLIP model on disk, in the place of ``pretrained``.
        image_size: pixels; None for the model's own.
        feature_norm: see `Encoder`; text embeddings are compared with ``l2`` features.

    Raises:
        ConfigError: open_clip is not installed, the name is unknown, or the weights do not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        weights_file: Path | None = None,
        image_size: int | None = None,
        feature_norm: FeatureNorm = "none",
    ) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError("OpenClipEncoder needs open_clip: pip install 'lightning_dp[clip]'") from error
        if name not in open_clip.list_models():
            raise ConfigError(unknown_name("OpenClipEncoder", name, open_clip.list_models(), "open_clip.list_models()"))
        source = pretrained if weights_file is None else str(weights_file)
        try:
            clip = open_clip.create_model(name, source, pretrained_text=False, force_image_size=image_size)
        except Exception as error:  # open_clip and the hub raise many kinds
            raise ConfigError(_cannot_build(f"OpenClipEncoder {name}", error)) from error
        size = clip.visual.image_size
        mean, std = clip.visual.image_mean, clip.visual.image_std
        title = f"OpenClipEncoder {name}, {_origin(pretrained, weights_file)}"
        size = size if isinstance(size, int) else size[0]
        super().__init__(clip.visual, title, size, tuple(mean), tuple(std), feature_norm)


def load_exactly(net: nn.Module, state: dict[str, Tensor], setting: str) -> None:
    """Load a state dict of which no tensor may be missing, left over or of another shape.

    Raises:
        ConfigError: naming the first tensor that does not fit.
    """
    own = net.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # absent from the oldest files, and not used
    wrong = sorted((own.keys() ^ state.keys()) - counters)
    wrong = wrong or [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        raise ConfigError(f"{setting} does not fit the network: {wrong[0]} is missing, unexpected or of another shape")
    net.load_state_dict(state, strict=False)


def _timm_overlay(timm: Any, name: str, weights_file: Path) -> dict[str, Any]:
    """What makes timm load a file, less its classifier: without one on either side, timm checks every tensor."""
    try:
        state = timm.models.load_state_dict(str(weights_file))
    except Exception as error:  # safetensors and pickle raise many kinds
        raise ConfigError(_cannot_build(f"TimmEncoder weights_file={weights_file}", error)) from error
    heads = timm.get_pretrained_cfg(name).classifier or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    return {"state_dict": _without(state, heads), "num_classes": 0, "label_offset": 0}


def _without(state: dict[str, Tensor], heads: tuple[str, ...]) -> dict[str, Tensor]:
    """A state dict less the tensors of some modules."""
    return {key: value for key, value in state.items() if key.rpartition(".")[0] not in heads}


def _origin(weights: str | bool | None, weights_file: Path | None) -> str:
    """Whose weights, for the privacy card; of a file its name only."""
    if weights_file is not None:
        return f"weights of {weights_file.name}"
    if isinstance(weights, str):
        return f"weights {weights}"
    return "pretrained" if weights else "random weights"


def _cannot_build(what: str, error: Exception) -> str:
    """One line about a network that another library could not make."""
    reason = " ".join(str(error).split())
    logging.getLogger(__name__).debug("%s: %s", what, reason)
    return f"{what} cannot be built ({reason[:300]}): check its settings, or the network for a download"

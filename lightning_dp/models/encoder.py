"""Frozen encoders: what they all share, and the classifier that trains a head on one."""

from abc import ABC
from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from lightning_dp.errors import ConfigError

from .check import validate
from .probe import mixes_records, unlike_images

FeatureNorm = Literal["none", "l2", "layer_norm"]
Constants = tuple[float, float, float]


class Encoder(nn.Module, ABC):
    """A frozen map of images with values in [0, 1] to feature vectors; no weight of it is ever trained.

    Guarantee: the features of a record are a function of that record alone. The network stays in evaluation mode under
    ``train()`` too, statistics of BatchNorm are those of its weights, and `feature_norm` acts within a record. A
    network in which `validate` finds a problem is refused, and so is one whose answer for an image changes with the
    rest of a batch of made, very unlike images. That is a look at one batch: what a forward function of your own does
    on other batches only is up to you. The encoder's own training data are outside every guarantee: they have to be
    public.

    Images are taken as they are, [0, 1], and are brought to the size, mean and standard deviation that the network was
    trained with in here: a subclass knows them. Grey images are repeated into three channels. They are resized as
    squares, not cropped. Under ``vmap`` the network is called once, on all records together, for many networks have
    slow rules there; so it is not ``vmap`` that keeps records apart in here.

    Args:
        net: (n, 3, image_size, image_size) -> (n, num_features); it is frozen.
        title: what it is and whose weights, for the privacy card.
        image_size: height and width the network takes, in pixels (bicubic, with antialiasing).
        mean: per channel, of the images the network was trained with, in units of [0, 1] intensity.
        std: per channel, likewise.
        feature_norm: ``l2`` scales each feature vector to length 1, ``layer_norm`` to mean 0 and variance 1 over its
            own entries.

    Raises:
        ConfigError: the network does not give one vector per image, mixes the images of a batch, or has a module that
            `validate` refuses.
    """

    num_features: int
    """Length of a feature vector."""
    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, title: str, image_size: int, mean: Constants, std: Constants, feature_norm: FeatureNorm
    ) -> None:
        super().__init__()
        self.net = _frozen(net)
        self.title = title
        self.image_size = image_size
        self.feature_norm = feature_norm
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()
        if problems := validate(self.net):
            raise ConfigError(f"{title} cannot encode record by record: {problems[0]}")
        self.num_features = self._probe()

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, whatever ``mode`` is."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, num_features) of images (n, 1 or 3, height, width) in [0, 1]; no gradient passes."""
        features: Tensor = _Together.apply(self._features, images)
        return features

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        if len(images) == 0:  # not every network takes an empty batch
            return images.new_zeros(0, self.num_features)
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            # bicubic interpolation overshoots; image libraries clip too
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        features: Tensor = self.net((images.expand(-1, 3, -1, -1) - self.mean) / self.std)
        if self.feature_norm == "l2":
            return F.normalize(features, dim=1)
        if self.feature_norm == "layer_norm":
            return F.layer_norm(features, features.shape[1:])
        return features

    @torch.no_grad()
    def _probe(self) -> int:
        """Length of a feature vector, after a look at made images together and alone."""
        images = unlike_images((3, self.image_size, self.image_size))
        try:
            one = self._features(images[:1])
            mixes = mixes_records(self._features, images)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            size = f"{self.image_size} x {self.image_size}"
            raise ConfigError(f"{self.title} does not run on {size} pixels ({reason}): change image_size") from error
        if one.ndim != 2:
            shape = tuple(one.shape[1:])
            raise ConfigError(f"{self.title} gives {shape} per image, not a vector: use another network")
        if mixes:
            raise ConfigError(f"{self.title} mixes the images of a batch: use an encoder with fixed statistics")
        return one.shape[1]


@final
class EncoderClassifier(nn.Module):
    """A frozen encoder under a trained head, for methods that change images before they are encoded.

    DP-Mix, say, mixes in pixels, encodes, and takes gradients of the head alone (Bao et al. 2023, arXiv 2311.01295).
    Where images are not changed, ``data.encoder`` is far cheaper: it encodes each record once.

    Args:
        encoder: frozen map of images to features; the whole of it is frozen here.
        head: features -> logits, for example ``LinearHead(num_features, 1, num_classes)``; trained.
        mean: for an `Encoder`, which takes images in [0, 1]: the ``mean`` of data.source, by which the images were
            normalised. None: the encoder takes normalised images (``ScatterNet``).
        std: the ``std`` of data.source, likewise.

    Raises:
        ConfigError: the constants are missing for an `Encoder`, or given for another module.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        if isinstance(encoder, Encoder) != (mean is not None) or (mean is None) != (std is None):
            raise ConfigError(
                f"EncoderClassifier with {type(encoder).__name__}: set mean and std to those of data.source if the "
                "encoder is one of lightning_dp.models' Encoder classes, and leave both out if not"
            )
        self.encoder = encoder.requires_grad_(False).eval()
        self.head = head
        self.constants = None if mean is None or std is None else (tuple(mean), tuple(std))
        for name, values in (("mean", mean or (0.0,)), ("std", std or (1.0,))):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "EncoderClassifier":
        """Set the head's mode; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width) as the data module hands them over."""
        with torch.no_grad():
            features = self.encoder(images if self.constants is None else images * self.std + self.mean)
        logits: Tensor = self.head(features)
        return logits


@final
class _Together(torch.autograd.Function):
    """Calls a map without gradient once on all records, though it stands under ``vmap``.

    The map must treat every record by itself: ``vmap`` no longer sees to that.
    """

    @staticmethod
    def forward(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Call ``run`` on (n, ...)."""
        return run(images)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """No gradient passes."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """No gradient passes."""
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, int]:
        """Put the axis of the records and that of a record's images into one."""
        images = images.movedim(in_dims[1], 0)
        features: Tensor = _Together.apply(run, images.flatten(0, 1))
        return features.view(*images.shape[:2], *features.shape[1:]), 0


def _frozen(net: nn.Module) -> nn.Module:
    """The network without gradients, in evaluation mode, and without what only matters in training."""
    for module in net.modules():
        if vars(module).get("inplace") is True:
            setattr(module, "inplace", False)  # noqa: B010
        if isinstance(module, StochasticDepth):
            module.p = 0.0  # the identity in evaluation mode anyway
    # channels last: about twice as fast on CPUs, and the same numbers up to rounding
    return net.requires_grad_(False).eval().to(memory_format=torch.channels_last)

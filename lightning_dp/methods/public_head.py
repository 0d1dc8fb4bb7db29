"""Linear heads from public information alone: few labelled public records, or the names of the classes.

The start of AdaMix, and by itself the baseline that every private method has to beat. No private record is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch, Classifier
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig


class Start(ABC):
    """Makes a head from public information."""

    @abstractmethod
    def __call__(self, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Head (classes, values) from public features (M, values), whose last value is the constant 1, and labels."""


@final
class ZeroHead(Start):
    """All zero: nothing public is used."""

    def __call__(self, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Zeros (classes, values)."""
        return torch.zeros(num_classes, features.shape[1], dtype=features.dtype, device=features.device)


@final
class FewShot(Start):
    """Multinomial logistic regression on the public records, with an L2 penalty, to its minimum.

    Args:
        weight_decay: lambda of ``mean cross entropy + lambda / 2 s |head|^2``, above 0; s is the mean squared length
            of the public features, so that lambda has no unit. Without it the public records are fitted perfectly,
            and their gradients, which set the clip norm, vanish.
        iterations: of L-BFGS, at most.
    """

    def __init__(self, weight_decay: float = 0.01, iterations: int = 200) -> None:
        if not weight_decay > 0 or iterations < 1:
            raise ConfigError("FewShot.weight_decay must be above 0 and FewShot.iterations at least 1: correct them")
        self.weight_decay = weight_decay
        self.iterations = iterations

    def __call__(self, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """The minimiser (classes, values); the problem is strictly convex, so no seed matters."""
        x = features.detach().double()
        penalty = self.weight_decay / 2 * float(x.square().sum(1).mean())
        head = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([head], max_iter=self.iterations, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ head.T, labels) + penalty * head.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        return head.detach().to(features.dtype)


@final
class ZeroShot(Start):
    """Text embeddings of the classes' names, by an open_clip model (Radford et al. 2021, arXiv 2103.00020).

    The features must come from the image tower of the same model, each of length 1, with no norm in the head.

    Args:
        model: open_clip's name of the architecture, e.g. ``ViT-B-32``.
        classes: names of the classes, in the order of the labels.
        pretrained: open_clip's name of the weights, or a local file; None for random weights (tests).
        template: prompt with one ``{}`` for the name.
        scale: of the cosines, the inverse temperature; 100 is CLIP's.
    """

    def __init__(
        self,
        model: str,
        classes: list[str],
        pretrained: str | None,
        template: str = "a photo of a {}.",
        scale: float = 100.0,
    ) -> None:
        if "{}" not in template:
            raise ConfigError(f"ZeroShot.template {template!r} has no {{}} for the class name: add it")
        self.model = model
        self.classes = classes
        self.pretrained = pretrained
        self.template = template
        self.scale = scale

    def __call__(self, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Scaled embeddings (classes, values) with a bias of 0; features and labels only give the sizes."""
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError("ZeroShot needs open_clip: pip install 'lightning_dp[clip]'") from error
        if len(self.classes) != num_classes:
            raise ConfigError(f"ZeroShot.classes has {len(self.classes)} names for {num_classes} classes: correct it")
        tower = open_clip.create_model(self.model, pretrained=self.pretrained).to(features.device).eval()
        prompts = [self.template.format(name) for name in self.classes]
        return text_head(tower, open_clip.get_tokenizer(self.model), prompts, self.scale, features)


@torch.no_grad()
def text_head(
    tower: Any, tokenizer: Callable[[Sequence[str]], Tensor], prompts: Sequence[str], scale: float, features: Tensor
) -> Tensor:
    """Head (prompts, values): ``scale`` times the embedding of each prompt, of length 1, and a bias of 0.

    Args:
        tower: has ``encode_text``, tokens (n, length) -> embeddings (n, values - 1).
        tokenizer: prompts -> tokens.
        prompts: one per class.
        scale: length of each row.
        features: (M, values), for size, type and device.

    Raises:
        ConfigError: the embeddings are not of the features' length.
    """
    embeddings = F.normalize(tower.encode_text(tokenizer(prompts).to(features.device)).to(features.dtype), dim=1)
    if embeddings.shape[1] + 1 != features.shape[1]:
        raise ConfigError(
            f"ZeroShot's text embeddings have {embeddings.shape[1]} values but the features {features.shape[1] - 1}: "
            "set data.encoder to the image tower of the same model, and model.net.groups to none"
        )
    return F.pad(scale * embeddings, (0, 1))


def with_bias(net: LinearHead, inputs: Tensor) -> Tensor:
    """Features (n, values) as the head's linear map sees them, with a constant 1 for its bias as the last value."""
    return F.pad(net.features(inputs.float()), (0, 1), value=1.0)


def linear_head(net: nn.Module, name: str) -> LinearHead:
    """``net`` if it is a `LinearHead`.

    Raises:
        ConfigError: it is another network.
    """
    if not isinstance(net, LinearHead):
        raise ConfigError(f"{name} trains a linear head, not {type(net).__name__}: set model.net to LinearHead")
    return net


def write_head(net: LinearHead, head: Tensor) -> None:
    """Set weights and bias to ``head`` (classes, values), the bias last."""
    with torch.no_grad():
        net.linear.weight.copy_(head[:, :-1])
        net.linear.bias.copy_(head[:, -1])


@final
class PublicHead(Classifier):
    """The baseline Only-Public: the head that ``start`` makes, and nothing else. Private records are not used.

    Args:
        net: a `LinearHead`.
        start: makes the head from the public role, or from the classes' names.
        privacy: linked from the ``privacy`` section. One step is enough; the batch it draws is not looked at.
    """

    def __init__(self, net: nn.Module, start: Start, privacy: PrivacyConfig | None = None) -> None:
        super().__init__(linear_head(net, "PublicHead"), partial(torch.optim.SGD, lr=0.0), privacy=privacy)
        self.start = start

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Write the head; the optimizer's step, at learning rate 0, moves the trainer's counter."""
        assert isinstance(self.net, LinearHead)
        public = self.datamodule.role("public")
        features = with_bias(self.net, self.datamodule.normalize(public.images.to(self.device)))
        write_head(self.net, self.start(features, public.labels.to(self.device), self.net.linear.out_features))
        self.step_optimizer({name: torch.zeros_like(value) for name, value in self.trainable().items()})

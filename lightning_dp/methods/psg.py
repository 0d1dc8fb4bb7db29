"""Private Set Generation: a small synthetic training set from noisy gradients (Chen, Kerkouche, Fritz, NeurIPS 2022).

A network with fresh random weights is shown a Poisson batch of private records; the clipped, noisy sum of their
gradients is released, and the synthetic images move so that their own gradient points the same way. Only that sum
touches private records: the images, the networks trained on them and everything learnt from the result are
post-processing. Labels of synthetic images are fixed, equally many of each class, and public.

The weights that are matched are the only ones that are bounded and noised. Matching the last layer alone compares, at
fresh weights, the class means of random features (as in distribution matching; Zhao and Bilen 2023, arXiv 2110.04181,
recalled), in a vector that is short, so the noise is small beside it. One noisy gradient may move the images several
times, which is free.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.data import Augmentation, Published
from lightning_dp.errors import ConfigError
from lightning_dp.methods.base import Batch
from lightning_dp.methods.dp import DPModule
from lightning_dp.methods.release_training import ReleaseTraining, check_resettable, mixed_seed, reset
from lightning_dp.methods.tasks import Tasks
from lightning_dp.models import ImageGenerator
from lightning_dp.privacy import Mechanism, PrivacyConfig, Release
from lightning_dp.privacy.clipping import Tensors
from lightning_dp.privacy.engines import OneBackward

Distance = Literal["rows", "cosine", "mse"]

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10), 100: (50, 10)}
_SMALL = 1e-6  # added to products of lengths, as in the authors' code


@final
class PSG(DPModule):
    """Publishes ``images_per_class`` synthetic images of each class, and trains ``net`` on them.

    The log directory gets ``release/release.safetensors``; any classifier may be trained on it later, for nothing
    (`ReleaseDataModule`). Accuracy on validation records before the last step is that of a random network.

    Args:
        net: classifier (n, channels, height, width) -> logits (n, classes), of convolutions, linear layers and
            group or layer norms. Its weights are drawn anew all along; in the end it is trained on the release.
        optimizer: parameters -> optimizer of the synthetic images, or of the ``prior``.
        scheduler: optimizer -> learning rate schedule, stepped once per release.
        images_per_class: synthetic images of each class.
        distance: between two gradients. "rows": 1 minus the cosine, summed over the output rows of every layer (the
            paper's); "cosine": 1 minus the cosine of the whole; "mse": squared difference of the whole.
        matched: beginnings of the names of the weights that are matched, e.g. ``head.``; None for all of them. Only
            tensors of two axes or more count: never biases and norms.
        releases_per_point: releases at the same weights.
        outer_loops: points on the way of one network; None for the authors' number for ``images_per_class``.
        inner_epochs: epochs on the synthetic images between two points; None as above.
        inner_lr: learning rate of these.
        updates_per_release: moves of the images by one noisy gradient.
        prior: generator of images, whose weights are learnt instead of pixels; it starts at random.
        siamese: one random change a step, the same for all private and synthetic images.
        training: how ``net`` is trained on the release in the end.
        tasks: disjoint sets of classes, learnt one after the other; None for all at once.
        network_seed: of initial images and of the weights of networks; public.
        physical_batch_size: records per forward pass and device; performance only.
        gradient_memory: MiB that gradients of single records may take; performance only.
        privacy: linked from the ``privacy`` section.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        images_per_class: int = 10,
        distance: Distance = "rows",
        matched: list[str] | None = None,
        releases_per_point: int = 10,
        outer_loops: int | None = None,
        inner_epochs: int | None = None,
        inner_lr: float = 0.01,
        updates_per_release: int = 1,
        prior: ImageGenerator | None = None,
        siamese: Augmentation | None = None,
        training: ReleaseTraining | None = None,
        tasks: Tasks | None = None,
        network_seed: int = 0,
        physical_batch_size: int = 256,
        gradient_memory: int = 64,
        privacy: PrivacyConfig | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler, physical_batch_size, privacy)
        if min(images_per_class, releases_per_point, updates_per_release) < 1 or not inner_lr > 0:
            raise ConfigError(
                "model.images_per_class, releases_per_point, updates_per_release and inner_lr must be above 0"
            )
        if (outer_loops is None or inner_epochs is None) and images_per_class not in _LOOPS:
            raise ConfigError(
                f"model.images_per_class {images_per_class} has no published loops (those of "
                f"{', '.join(map(str, _LOOPS))} have): set model.outer_loops and model.inner_epochs"
            )
        self.images_per_class = images_per_class
        self.distance: Distance = distance
        self.releases_per_point = releases_per_point
        loops = _LOOPS.get(images_per_class, (0, 0))
        self.outer_loops = loops[0] if outer_loops is None else outer_loops
        self.inner_epochs = loops[1] if inner_epochs is None else inner_epochs
        if self.outer_loops < 1 or self.inner_epochs < 0:
            raise ConfigError("model.outer_loops must be at least 1 and model.inner_epochs at least 0")
        self.inner_lr = inner_lr
        self.updates_per_release = updates_per_release
        self.prior = prior
        self.siamese = siamese
        self.training_on_release = ReleaseTraining() if training is None else training
        self.tasks = tasks
        self.network_seed = network_seed
        check_resettable(net)
        net.requires_grad_(False)  # the weights are not what is learnt
        self.matched = _matched_names(net, matched)
        self.images: nn.Parameter | None = None
        self.latents: Tensor | None
        self.register_buffer("latents", None)
        self.engine = OneBackward(self.record_loss, gradient_memory << 20)

    def setup(self, stage: str) -> None:
        """Make room for the images, at random from the public seed, or the fixed latent vectors of the prior."""
        if self.images is not None or self.latents is not None:
            return
        source = self.datamodule.source
        if self.datamodule.encoder is not None:
            raise ConfigError("PSG makes images, but data.encoder has replaced them by features: leave it out")
        if self.tasks is not None:
            self.tasks.check(source.num_classes, self.privacy)
        count = self.images_per_class * source.num_classes
        generator = torch.Generator().manual_seed(self.network_seed)
        if self.prior is None:
            shape = (count, source.channels, source.image_size, source.image_size)
            self.images = nn.Parameter(torch.randn(shape, generator=generator).to(self.device))
            return
        self.latents = torch.randn(count, self.prior.latent_dim, generator=generator).to(self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The synthetic images, or the weights of the prior."""
        if self.prior is not None:
            return {f"prior.{name}": value for name, value in self.prior.named_parameters()}
        assert self.images is not None, "setup() comes first"
        return {"images": self.images}

    def new_mechanism(self, privacy: PrivacyConfig, previous: dict[str, Any] | None) -> Mechanism:
        """With tasks, sums in which a record can only be while its task is learnt."""
        if self.tasks is None:
            return super().new_mechanism(privacy, previous)
        return self.tasks.new_mechanism(privacy, previous)

    def takes_part(self, batch: Batch, step: int) -> tuple[Batch, Sequence[Release] | None]:
        """With tasks, only records of the present one."""
        return (batch, None) if self.tasks is None else self.tasks.takes_part(batch, step, self.mechanism)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One release at the network's present weights; after the last one the file and the classifier."""
        self._move_network(self.trainer.global_step)
        super().training_step(batch, batch_idx)
        if self.trainer.global_step >= self.mechanism.config.steps or self.mechanism.releases_left < 1:
            self.publish()

    def record_loss(self, parameters: Tensors, image: Tensor, label: Tensor) -> Tensor:
        """Cross entropy of one record at the weights ``parameters``."""
        logits = functional_call(self.net, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    def contribution(self, image: Tensor, label: Tensor) -> Tensors:
        """Gradient of `record_loss` for the matched weights."""
        gradients: Tensors = torch.func.grad(self.record_loss)(self.template(), image, label)
        return gradients

    def template(self) -> Tensors:
        """The matched weights, detached."""
        return {name: self.net.get_parameter(name).detach() for name in self.matched}

    def clipped_sum(self, records: tuple[Tensor, ...]) -> Tensors:
        """The same sum as `DPModule.clipped_sum`, by the fast engine."""
        config = self.mechanism.config
        return self.engine.clipped_sum(
            records, self.template(), max_norm=config.max_norm, clipping=config.clipping,
            chunk=self.physical_batch_size, prepare=self.prepare,
        )  # fmt: skip

    def prepare(self, images: Tensor, coins: Tensor, labels: Tensor) -> Batch:
        """Normalise, augment each record by its own coins, and then all alike where ``siamese`` is set."""
        inputs, labels = super().prepare(images, coins, labels)
        return self._changed(inputs), labels

    @torch.enable_grad()
    def update(self, mean: Tensors) -> None:
        """Move the synthetic images towards the released gradient, ``updates_per_release`` times."""
        optimizer = self.trainer.optimizers[0]
        for left in reversed(range(self.updates_per_release)):
            difference = gradient_distance(mean, self._synthetic_gradient(), self.distance)
            learnt = self.trainable()
            gradients = dict(zip(learnt, torch.autograd.grad(difference, list(learnt.values())), strict=True))
            if left == 0:
                self.step_optimizer(gradients)  # counts as the step of this release
                continue
            for name, parameter in learnt.items():
                parameter.grad = gradients[name]
            optimizer.step()
            optimizer.zero_grad()

    def synthetic(self) -> tuple[Tensor, Tensor]:
        """The synthetic set: images (n, channels, height, width) as networks take them, and labels (n,)."""
        if self.prior is None:
            assert self.images is not None, "setup() comes first"
            images: Tensor = self.images
        else:
            assert self.latents is not None, "setup() comes first"
            images = self.prior(self.latents)
        return images, torch.arange(len(images), device=images.device) // self.images_per_class

    def current(self) -> tuple[Tensor, Tensor]:
        """The part of the synthetic set that is learnt at this step: all of it, or the classes of the task."""
        images, labels = self.synthetic()
        if self.tasks is None:
            return images, labels
        rows = self.tasks.members(labels, self.tasks.at(self.trainer.global_step, self.mechanism.config.steps))
        return images[rows], labels[rows]

    @torch.no_grad()
    def publish(self) -> Path:
        """Write the release, train ``net`` on it, and return the file."""
        images, labels = self.synthetic()
        targets = F.one_hot(labels, self.datamodule.num_classes).float()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "release"
        path = folder
        if self.trainer.is_global_zero:
            path = Published(images.cpu(), targets.cpu(), self._about()).save(folder)
        self.training_on_release(self.net, images, targets, self.network_seed)
        return path

    def _about(self) -> dict[str, Any]:
        """Public facts of the release, for its file."""
        source = self.datamodule.source
        return {
            "kind": "images",
            "shape": None,
            "method": "PSG",
            "source": source.name,
            "encoder": None,
            "mean": list(source.mean),
            "std": list(source.std),
            "images_per_class": self.images_per_class,
            "guarantee": self.mechanism.summary(),
        }

    def _move_network(self, step: int) -> None:
        """Bring the network to the point of this step: fresh weights, or further along on the synthetic images."""
        place, within = divmod(step, self.releases_per_point)
        if within:
            return
        index, point = divmod(place, self.outer_loops)
        if point == 0:
            reset(self.net, self.network_seed, index)
        elif self.inner_epochs:
            images, labels = (part.detach() for part in self.current())
            plain = ReleaseTraining(self.inner_epochs, self.inner_lr, momentum=0.0, weight_decay=0.0, decay=1.0)
            plain.go_on(self.net, images, F.one_hot(labels, self.datamodule.num_classes).float(), (index, point))

    def _synthetic_gradient(self) -> Tensors:
        """Gradient of the mean cross entropy of the synthetic images, differentiable in them."""
        images, labels = self.current()
        weights = {name: value.requires_grad_() for name, value in self.template().items()}
        loss = F.cross_entropy(functional_call(self.net, weights, (self._changed(images),)), labels)
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), create_graph=True), strict=True))

    def _changed(self, images: Tensor) -> Tensor:
        """``images`` after the change that all of this step have in common; a function of public coins."""
        if self.siamese is None:
            return images
        generator = torch.Generator().manual_seed(mixed_seed(self.network_seed, self.trainer.global_step))
        coins = torch.rand(1, self.siamese.num_coins, generator=generator).to(images.device)
        return self.siamese(images, coins.expand(len(images), -1))


def gradient_distance(released: Tensors, synthetic: Tensors, distance: Distance) -> Tensor:
    """How far two gradients are apart, a scalar; differentiable in ``synthetic``.

    Args:
        released: by name, at least two axes each, the first the output rows of a layer.
        synthetic: the same shapes.
        distance: as in `PSG`.

    Example:
        >>> a, b = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, {"w": torch.tensor([[3.0, 0.0], [0.0, -1.0]])}
        >>> [round(float(gradient_distance(a, b, kind)), 3) for kind in ("rows", "cosine", "mse")]
        [2.0, 0.859, 13.0]
    """
    pairs = [(released[name].flatten(1), value.flatten(1)) for name, value in synthetic.items()]
    if distance == "rows":
        per_layer = [
            (1 - (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1) + _SMALL)).sum()
            for theirs, ours in pairs
        ]
        return torch.stack(per_layer).sum()
    theirs, ours = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    if distance == "mse":
        return (theirs - ours).square().sum()
    cosine: Tensor = (theirs * ours).sum() / (theirs.norm() * ours.norm() + _SMALL)
    return 1 - cosine


def _matched_names(net: nn.Module, beginnings: list[str] | None) -> list[str]:
    weights = [name for name, value in net.named_parameters() if value.ndim >= 2]
    names = [name for name in weights if beginnings is None or name.startswith(tuple(beginnings))]
    if not names:
        raise ConfigError(f"model.matched {beginnings} names no weight; there are {', '.join(weights)}")
    return names

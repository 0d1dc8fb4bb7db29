"""Published data: what a private method released once, and a data module that serves it as public data.

A release is post-processing of noisy sums: training on it costs no privacy, and reads nothing private.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from pytorch_lightning import LightningDataModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dp.data.features import FeatureCache
from lightning_dp.data.loaders import EvalBatchSampler, record_loader
from lightning_dp.data.public import ShuffledBatches
from lightning_dp.data.records import RecordDataset, Records
from lightning_dp.data.sources import Source
from lightning_dp.data.transforms import Normalize
from lightning_dp.errors import ConfigError
from lightning_dp.models.encoder import Encoder
from lightning_dp.models.linear import feature_vectors

FILE = "release.safetensors"
_FORMAT = "lightning_dp release 1"


@dataclass(frozen=True)
class Published:
    """A release in memory.

    Args:
        inputs: float32 (n, ...): mixtures of feature vectors, or images as a network takes them.
        targets: float32 (n, classes): soft labels; noisy ones may be below 0.
        about: public facts in plain JSON types: ``method``, the guarantee, and how a record becomes an input.
    """

    inputs: Tensor
    targets: Tensor
    about: dict[str, Any]

    def save(self, folder: Path) -> Path:
        """Write ``release.safetensors`` below ``folder``, whole or not at all, and return its path.

        Raises:
            ConfigError: the file cannot be written.
        """
        path = folder / FILE
        draft = folder / f".{FILE}.draft"
        tensors = {"inputs": self.inputs.float().contiguous(), "targets": self.targets.float().contiguous()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata={"format": _FORMAT, "about": json.dumps(self.about)})
            os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be written ({error}): set another log directory") from error
        return path


def load_release(path: Path) -> Published:
    """Read a release: the file, or the folder that holds it.

    Raises:
        ConfigError: it is not there, damaged, or no release.
    """
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ConfigError(f"{file} is no release of {_FORMAT!r}: set data.path to a {FILE} of this package")
            inputs, targets = opened.get_tensor("inputs"), opened.get_tensor("targets")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): set data.path to a {FILE}, or make it again") from error
    if targets.ndim != 2 or len(inputs) != len(targets):
        raise ConfigError(f"{file} has {len(inputs)} inputs and targets of shape {tuple(targets.shape)}: make it again")
    return Published(inputs, targets, json.loads(metadata["about"]))


@final
class ReleaseDataModule(LightningDataModule):
    """A release as training data, and the test side of an ordinary source to look at the result.

    The training side of ``source`` is never opened. Images of the test side are encoded, normalised and scaled as the
    release says its records were.

    Args:
        path: ``release.safetensors``, or its folder.
        source: whose test side is the test role; None for no test.
        root: folder that holds all data sets; the environment variable LIGHTNING_DP_DATA, if set, replaces it.
        encoder: the frozen encoder that the release was made with, if any.
        batch_size: rows per step, over all devices; all of them where a release has fewer.
        eval_batch_size: test records per batch and device; performance only.
        num_workers: loader processes; performance only.
        seed: of the order of the rows; public.
        cache: folder of encoded test images, as in `DPDataModule`.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        path: Path,
        source: Source | None = None,
        root: Path = Path("data"),
        encoder: nn.Module | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1 or num_workers < 0:
            raise ConfigError("data.batch_size and eval_batch_size must be at least 1, num_workers at least 0")
        self.path = path
        self.source = source
        self.root = Path(os.environ.get("LIGHTNING_DP_DATA", root))
        self.encoder = encoder
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache = FeatureCache(self.root / ".cache" / "features" if cache is None else cache)
        self._train: RecordDataset | None = None
        self._test: RecordDataset | None = None

    def setup(self, stage: str = "fit") -> None:
        """Read the release, and encode the test side.

        Raises:
            ConfigError: there is no release, or the encoder is another one than the release was made with.
        """
        if self._train is not None:
            return
        published = load_release(self.path)
        name = encoder_name(self.encoder)
        if self.source is not None and name != published.about.get("encoder"):
            raise ConfigError(
                f"the release was made with the encoder {published.about.get('encoder')}, but data.encoder is {name}: "
                "set the same, or its test images would be other features"
            )
        if self.source is not None:
            self._test = RecordDataset(self._test_side(self.source, published.about))
        shape = published.about["shape"] or published.inputs.shape[1:]
        self._train = RecordDataset(Records(published.inputs.view(-1, *shape), published.targets))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches: inputs (n, ...) and soft labels (n, classes)."""
        assert self._train is not None, "setup() comes first"
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        epoch = (lambda: 0) if trainer is None else (lambda: trainer.current_epoch)
        size = min(self.batch_size, len(self._train))
        batches = ShuffledBatches(len(self._train), size, self.seed, epoch, rank, world_size)
        return record_loader(self._train, batches, self.num_workers)

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, Tensor]]]:
        """Test records as inputs (n, ...) and labels (n,); none without a source."""
        if self._test is None:
            return []
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        batches = EvalBatchSampler(len(self._test), self.eval_batch_size, rank, world_size)
        return [record_loader(self._test, batches, self.num_workers)]

    def _test_side(self, source: Source, about: dict[str, Any]) -> Records:
        test = source.load(self.root, train=False, download=False)
        if self.encoder is None:
            images = Normalize(source.mean, source.std)(test.images)
        else:
            pixels = Normalize((0.0,) * source.channels, (1.0,) * source.channels)
            normalize = pixels if isinstance(self.encoder, Encoder) else Normalize(source.mean, source.std)
            device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
            images = self.cache.features(test.images, self.encoder, normalize, self.eval_batch_size, device).float()
        if about["kind"] == "features":
            images = images if about["groups"] is None else F.group_norm(images, about["groups"])
            images = feature_vectors(images, about["max_length"])
        return Records(images if about["shape"] is None else images.view(len(images), *about["shape"]), test.labels)


def encoder_name(encoder: nn.Module | None) -> str | None:
    """What releases and cards call an encoder."""
    if isinstance(encoder, Encoder):
        return encoder.title
    return None if encoder is None else type(encoder).__name__

"""The data of a run: who is private, public, held out; and every loader."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp.data.features import FeatureCache, FeatureDtype
from lightning_dp.data.loaders import EvalBatchSampler, record_loader
from lightning_dp.data.pool import check_origin, describe_pool
from lightning_dp.data.records import RecordDataset, Records
from lightning_dp.data.release import encoder_name
from lightning_dp.data.roles import Roles, assign_roles, check_num_examples
from lightning_dp.data.sources import Source, check_compatible
from lightning_dp.data.splits import SplitSettings
from lightning_dp.data.transforms import Augmentation, Normalize
from lightning_dp.errors import ConfigError
from lightning_dp.models.encoder import Encoder
from lightning_dp.privacy.mechanism import PrivacyConfig
from lightning_dp.privacy.randomness import Randomness
from lightning_dp.privacy.sampling import PoissonBatchSampler

Batch = tuple[Tensor, Tensor]
ROLES = ("private", "public", "synthetic", "validation", "test", "audit")


class DPDataModule(LightningDataModule):
    """Typed roles over one source, and their loaders.

    ``private``: protected, seen by Poisson batches only. ``public``: free to use. ``synthetic``: generated, public.
    ``validation``: looked at between steps. ``test``: looked at for the report. ``audit``: never trained on, twins in
    law of the private records, for attacks.

    Guarantee: by content, no private record plays another role of the training set and none is in the public or
    synthetic data; no audit record is trained on. Nothing here touches PyTorch's or NumPy's global generators.

    Args:
        source: data set whose training side holds the private records, and whose test side is the test role.
        root: folder that holds all data sets; the environment variable LIGHTNING_DP_DATA, if set, replaces it.
        download: fetch what is missing.
        split_seed: seed of the split; public.
        audit: records held out of private for attacks.
        public_per_class: records of every class taken out of private and declared public.
        public: other data set whose training side is the public role (instead of ``public_per_class``).
        synthetic: data set whose training side is the synthetic role.
        validation: "public": the records of the public role; "private": records carved out of private, which is
            outside the guarantee: no decision may depend on them, and the card says that they were looked at.
        validation_private: records of the validation role if it is carved out of private, else 0.
        splits: split saved by an earlier run (``splits.json``), to be reused exactly.
        encoder: frozen map of images to features, (n, channels, height, width) -> (n, ...), each record by itself;
            applied once, after which all roles serve features. An `Encoder` gets images in [0, 1], any other module
            images normalised by the source's constants.
        cache: folder in which features are kept for later runs; private data. None: ``.cache/features`` below root.
        feature_dtype: in which features are kept; they are served as float32.
        augment: random change of training images; applied by the method, inside its chunks.
        eval_batch_size: records per evaluation or encoder batch and device; performance only.
        num_workers: loader processes; performance only.
        privacy: linked from the ``privacy`` section; None when only evaluating.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def __init__(
        self,
        source: Source,
        root: Path = Path("data"),
        download: bool = False,
        split_seed: int = 0,
        audit: int = 0,
        public_per_class: int = 0,
        public: Source | None = None,
        synthetic: Source | None = None,
        validation: Literal["none", "public", "private"] = "none",
        validation_private: int = 0,
        splits: Path | None = None,
        encoder: nn.Module | None = None,
        augment: Augmentation | None = None,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        privacy: PrivacyConfig | None = None,
        cache: Path | None = None,
        feature_dtype: FeatureDtype = "float32",
    ) -> None:
        super().__init__()
        self.source = source
        self.root = Path(os.environ.get("LIGHTNING_DP_DATA", root))
        self.download = download
        self.split_settings = SplitSettings(split_seed, audit, public_per_class, validation_private)
        self.public = public
        self.synthetic = synthetic
        self.validation = validation
        self.splits = splits
        self.encoder = encoder
        self.cache = FeatureCache(self.root / ".cache" / "features" if cache is None else cache, feature_dtype)
        self.augment = augment
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.privacy = privacy
        self._normalize = Normalize(source.mean, source.std)
        self._roles: Roles | None = None
        self._pool: dict[str, Any] | None = None
        self._datasets: dict[str, RecordDataset] = {}
        self._check_settings()

    @property
    def num_classes(self) -> int:
        """Classes of the source."""
        return self.source.num_classes

    @property
    def validation_is_private(self) -> bool:
        """The validation role was carved out of private records: looking at it is outside the guarantee."""
        return self.validation == "private"

    def prepare_data(self) -> None:
        """Fetch and decode what is missing, in one process."""
        for source in (self.source, self.public, self.synthetic):
            if source is not None:
                source.load(self.root, train=True, download=self.download)
        self.source.load(self.root, train=False, download=self.download)

    def setup(self, stage: str = "fit") -> None:
        """Read the data, assign and check the roles; for ``fit`` check N and save the split with the logs.

        Raises:
            ConfigError: files are missing, roles overlap, or ``privacy.num_examples`` does not fit.
        """
        if self._roles is None:
            self._roles = self._load()
        if stage == "fit":
            if self.privacy is not None:
                check_num_examples(len(self._datasets["private"]), self.privacy.num_examples)
            self._save(self._roles)

    def role(self, name: str) -> Records:
        """Records of one role, gathered into tensors: uint8 images (n, channels, height, width), or float32 features.

        Raises:
            ConfigError: there is no such role, or it is empty.
        """
        if not self.roles().get(name):
            has = ", ".join(role for role, size in self.roles().items() if size) or "none before setup()"
            raise ConfigError(f"the data has no {name!r} records; roles with records: {has}")
        return self._datasets[name].gather()

    def roles(self) -> dict[str, int]:
        """Records by role, 0 if empty. The exact size of ``private`` is itself private: not for logs."""
        return {name: len(self._datasets.get(name, ())) for name in ROLES}

    def normalize(self, images: Tensor) -> Tensor:
        """Images of a role, uint8 (n, channels, height, width), as the network takes them; features as they are."""
        return self._normalize(images) if self.encoder is None else images

    def describe(self) -> dict[str, Any]:
        """The data's part of the privacy card, in plain JSON types.

        Only public facts: the private size is the declared ``privacy.num_examples``; the digest and the overlaps are
        those of the other roles. Exact figures stand in ``splits.json``, which stays with the data.
        """
        sizes: dict[str, int | None] = dict(self.roles())
        sizes["private"] = None if self.privacy is None else self.privacy.num_examples
        return {
            "source": self.source.name,
            "sizes": sizes,
            "split_seed": self.split_settings.split_seed,
            "split_digest": None if self._roles is None else self._roles.public_digest(),
            "public": self._public_provenance(),
            "synthetic": None if self.synthetic is None else self.synthetic.name,
            "synthetic_pool": self._pool,
            "overlaps": {} if self._roles is None else self._roles.public_overlaps(),
            "validation": self.validation,
            "validation_is_private": self.validation_is_private,
            "encoder": encoder_name(self.encoder),
        }

    def ledger_file(self) -> Path:
        """Where the runs on these private records are written down, whatever their split and name; beside the data.

        The environment variable LIGHTNING_DP_LEDGER, if set, names another folder.
        """
        assert self._roles is not None, "setup() comes first"
        folder = Path(os.environ.get("LIGHTNING_DP_LEDGER", self.root / ".ledger"))
        digest = self._roles.split.training_digest[:16]
        known = sorted(folder.glob(f"*-{digest}.jsonl"))
        return known[0] if known else folder / f"{self.source.name}-{digest}.jsonl"

    def state_dict(self) -> dict[str, Any]:
        """Which split the run was trained on, for its checkpoints; no figure of the private role."""
        digest = None if self._roles is None else self._roles.public_digest()
        return {"source": self.source.name, "split_settings": asdict(self.split_settings), "split_digest": digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training on another split: records could change sides.

        Raises:
            ConfigError: the checkpoint was trained on another split.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit" and state_dict != self.state_dict():
            raise ConfigError(
                "the checkpoint was trained on another split, so private records could now be public or audited: use "
                "its data.source, split_seed, audit, public_per_class, public and validation_private"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Poisson batches of the private role, uint8 (or features), possibly empty; one per optimizer step.

        Raises:
            ConfigError: there is no ``privacy`` section.
        """
        if self.privacy is None:
            raise ConfigError("training needs the privacy section (num_examples, expected_batch_size, steps): add it")
        dataset, trainer = self._datasets["private"], self.trainer
        randomness = Randomness.from_seed(self.privacy.seed, self.privacy.secure)
        if trainer is not None:
            randomness = trainer.strategy.broadcast(randomness)  # every rank must make the same global draw
        batches = PoissonBatchSampler(
            num_records=len(dataset),
            sample_rate=self.privacy.sample_rate,
            steps_per_epoch=self.privacy.steps_per_epoch,
            generator=lambda step: randomness.numpy("sampling", step),
            first_step=lambda: 0 if trainer is None else trainer.global_step,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )
        return record_loader(dataset, batches, self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the validation role; none if there is no such role."""
        return self._eval_loaders("validation")

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the test role."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the test role."""
        return self._eval_loaders("test")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise evaluation batches on the device; training batches stay uint8 until the method's own chunks."""
        if self.trainer is not None and self.trainer.training:
            return batch
        images, labels = batch
        return self.normalize(images), labels

    def _eval_loaders(self, name: str) -> list[DataLoader[Batch]]:
        dataset = self._datasets.get(name)
        if not dataset:
            return []
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        batches = EvalBatchSampler(len(dataset), self.eval_batch_size, rank, world_size)
        return [record_loader(dataset, batches, self.num_workers)]

    def _check_settings(self) -> None:
        shots, carved = self.split_settings.public_per_class, self.split_settings.validation_private
        if self.public is not None and shots:
            raise ConfigError("data.public and data.public_per_class exclude each other: set one of them")
        if self.validation == "public" and self.public is None and not shots:
            raise ConfigError("data.validation public needs public records: set data.public_per_class or data.public")
        if self.validation_is_private != (carved > 0):
            raise ConfigError(
                f"data.validation {self.validation} does not go with data.validation_private {carved}: "
                "set both (private, and a number of records) or neither"
            )
        if self.encoder is not None and self.augment is not None:
            raise ConfigError("data.augment has no effect on the fixed features of data.encoder: leave one of them out")
        if self.eval_batch_size < 1 or self.num_workers < 0:
            raise ConfigError("data.eval_batch_size must be at least 1 and data.num_workers at least 0: correct them")
        for role, other in (("public", self.public), ("synthetic", self.synthetic)):
            if other is not None:
                check_compatible(role, other, self.source)

    def _load(self) -> Roles:
        """Load every side, assign and check the roles on raw images, and only then encode."""
        sides = {"train": self.source.load(self.root, True, False), "test": self.source.load(self.root, False, False)}
        for name, other in (("public", self.public), ("synthetic", self.synthetic)):
            if other is not None:
                sides[name] = other.load(self.root, True, False)
        roles = assign_roles(self.source.name, sides, self.split_settings, self.splits)
        for name, other in (("public", self.public), ("synthetic", self.synthetic)):
            if other is not None:
                check_origin(name, other, self.source, self.root, roles.split.training_digest)
        if self.synthetic is not None:
            pool = roles.hashes["synthetic"], sides["synthetic"].labels
            self._pool = describe_pool(self.synthetic, self.root, *pool)
        if self.encoder is not None:
            sides = {name: self._encode(side, self.encoder) for name, side in sides.items()}
        self._datasets = roles.datasets(sides)
        if self.validation == "public":
            self._datasets["validation"] = self._datasets["public"]
        return roles

    def _encode(self, side: Records, encoder: nn.Module) -> Records:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        pixels = Normalize((0.0,) * self.source.channels, (1.0,) * self.source.channels)
        normalize = pixels if isinstance(encoder, Encoder) else self._normalize
        features = self.cache.features(side.images, encoder, normalize, self.eval_batch_size, device)
        return Records(features, side.labels)

    def _save(self, roles: Roles) -> None:
        if self.trainer is None:
            return
        folder = self.trainer.log_dir  # on every rank: Lightning broadcasts it
        if folder is not None and self.trainer.is_global_zero:
            roles.save(Path(folder) / "splits.json")

    def _public_provenance(self) -> str | None:
        if self.public is not None:
            return self.public.name
        if self.split_settings.public_per_class:
            return f"{self.split_settings.public_per_class} per class of {self.source.name}, taken out of private"
        return None

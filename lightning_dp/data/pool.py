"""Pools: labelled images in one flat folder, with a manifest that says where they come from.

A pool is public, so nothing in it may depend on private records, not even on how many there are of a class. Its files
are named ``<name>_<label>.<ext>``; its ``manifest.json`` is written by ``lightning-dp generate`` before any image.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_dp.data.cache import decode_cached
from lightning_dp.data.folders import ImageFolder
from lightning_dp.data.records import Records
from lightning_dp.data.sources import Source
from lightning_dp.errors import ConfigError

MANIFEST = "manifest.json"
"""Name of the manifest inside its pool."""

NO_MANIFEST = "no manifest"
"""Stands on the card in the place of a manifest's digest."""


@final
class FlatFolder(Source):
    """Images of one folder, the label in the file name: ``<name>_<label>.<ext>``. Sub-folders are not read.

    Args:
        folder: the pool; relative paths start at ``data.root``.
        num_classes: labels are 0 to num_classes - 1; a public number.
        image_size: the short side is resized to this many pixels, then the centre square is kept.
        channels: 3 for colour, 1 for grey.
    """

    name = "FlatFolder"

    def __init__(self, folder: Path, num_classes: int, image_size: int, channels: Literal[1, 3] = 3) -> None:
        if num_classes < 1 or image_size < 1:
            raise ConfigError("FlatFolder.num_classes and FlatFolder.image_size must be at least 1: correct them")
        self.folder = folder
        self.num_classes = num_classes
        self.image_size = image_size
        self.channels = channels
        # in a role beside another source, that source's numbers are used
        self.mean = self.std = (0.5,) * channels

    def load(self, root: Path, train: bool, download: bool) -> Records:
        """Read the pool, which is the training side; there is no test side, and nothing is ever downloaded."""
        samples = self._samples(root / self.folder) if train else []
        files = [path for path, _ in samples]
        images = decode_cached(files, self.image_size, root / ".cache", self.name, self.channels)
        return Records(images, torch.tensor([label for _, label in samples], dtype=torch.int64))

    def _samples(self, folder: Path) -> list[tuple[Path, int]]:
        """Files in the order of their names, with their labels."""
        try:
            files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        except OSError as error:
            raise ConfigError(
                f"FlatFolder.folder: {folder} is no folder: make it with `lightning-dp generate`, or correct the path"
            ) from error
        samples = [(path, self._label(path)) for path in files if not path.name.startswith(".")]
        manifest = read_manifest(folder)
        expected = None if manifest is None else len(manifest["classes"]) * manifest["per_class"]
        if not samples or expected not in (None, len(samples)):
            raise ConfigError(
                f"FlatFolder.folder: {folder} has {len(samples)} images of {expected or 'at least 1'}: let "
                "`lightning-dp generate` finish it"
            )
        return samples

    def _label(self, path: Path) -> int:
        found = re.fullmatch(r".*_(\d+)", path.stem)
        if found is None or int(found[1]) >= self.num_classes:
            raise ConfigError(
                f"FlatFolder: {path} does not end in _<label> with a label below num_classes {self.num_classes}: "
                "rename or remove it, or correct num_classes"
            )
        return int(found[1])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a pool; None if it has none.

    Raises:
        ConfigError: the file is no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"format", "classes", "per_class", "seed", "generator"} <= manifest.keys():
            raise KeyError("format, classes, per_class, seed or generator")
        if not isinstance(manifest["generator"].get("trained_on", {}), dict):
            raise ValueError("trained_on")
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest ({error!r}): remove it, or generate the pool anew") from error
    return manifest


def folder_of(source: Source) -> Path | None:
    """Folder of a source's training side, if the user named it: where a manifest lies; relative to the root."""
    if isinstance(source, FlatFolder):
        return Path(source.folder)
    return Path(source.train) if isinstance(source, ImageFolder) else None


def check_origin(role: str, other: Source, private: Source, root: Path, digest: str) -> None:
    """Refuse records that were generated by a model which learned from the private source.

    Args:
        role: of the records: "public" or "synthetic".
        other: their source; its manifest says what the model was trained on.
        private: the private source.
        root: folder that holds all data sets.
        digest: of the contents of the private source's training side.

    Raises:
        ConfigError: same contents; or, for two sources that are folders, one holds the other; or, for all others, the
            same family, which is the name up to a "-": the collections of EMNIST share records.
    """
    folder = folder_of(other)
    manifest = None if folder is None else read_manifest(root / folder)
    origin = {} if manifest is None else manifest["generator"].get("trained_on", {})
    if origin and (origin.get("digest") == digest or _same_source(origin, private, root)):
        raise ConfigError(
            f"data.{role} {folder} was generated by a model trained on {origin.get('source')}, the private source: its "
            "images are functions of private records; use a pool made from other data"
        )


def _same_source(origin: dict[str, Any], private: Source, root: Path) -> bool:
    mine, theirs = folder_of(private), origin.get("folder")
    if mine is None or theirs is None:
        return str(origin.get("source")).split("-")[0] == private.name.split("-")[0]
    mine, theirs = (root / mine).resolve(), (root / theirs).resolve()
    return bool(mine.is_relative_to(theirs) or theirs.is_relative_to(mine))


def describe_pool(source: Source, root: Path, hashes: np.ndarray, labels: Tensor) -> dict[str, Any]:
    """What the privacy card says of the synthetic role; all of it public.

    Args:
        source: source of the synthetic role.
        root: folder that holds all data sets.
        hashes: `content_hashes` of the role, shape (n,).
        labels: shape (n,).

    Returns:
        "source"; "manifest", its BLAKE2b digest or "no manifest"; "contents", a digest of pixels and labels in order.
    """
    contents = hashlib.blake2b(hashes.tobytes() + labels.numpy().tobytes(), digest_size=16).hexdigest()
    facts = {"source": source.name, "manifest": NO_MANIFEST, "contents": contents}
    folder = folder_of(source)
    if folder is None or read_manifest(root / folder) is None:
        return facts
    return facts | {"manifest": hashlib.blake2b((root / folder / MANIFEST).read_bytes(), digest_size=16).hexdigest()}

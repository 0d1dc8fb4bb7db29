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
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest ({error!r}): remove it, or generate the pool anew") from error
    return manifest


def describe_pool(source: Source, root: Path, private: str, hashes: np.ndarray, labels: Tensor) -> dict[str, Any]:
    """What the privacy card says of the synthetic role; all of it public.

    Args:
        source: source of the synthetic role.
        root: folder that holds all data sets.
        private: name of the private source.
        hashes: `content_hashes` of the role, shape (n,).
        labels: shape (n,).

    Returns:
        "source"; "manifest", its BLAKE2b digest or "no manifest"; "contents", a digest of pixels and labels in order.

    Raises:
        ConfigError: the manifest says that the pool's generator learned from the private source.
    """
    contents = hashlib.blake2b(hashes.tobytes() + labels.numpy().tobytes(), digest_size=16).hexdigest()
    facts = {"source": source.name, "manifest": NO_MANIFEST, "contents": contents}
    folder = root / source.folder if isinstance(source, FlatFolder) else None
    manifest = None if folder is None else read_manifest(folder)
    if folder is None or manifest is None:
        return facts
    if manifest["generator"].get("trained_on", {}).get("source") == private:
        raise ConfigError(
            f"data.synthetic {folder} was generated by a model trained on {private}, the private source: its images "
            "are functions of private records; use a pool made from other data"
        )
    digest = hashlib.blake2b((folder / MANIFEST).read_bytes(), digest_size=16).hexdigest()
    return facts | {"manifest": digest}

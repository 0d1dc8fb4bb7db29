"""Assigns the roles of a run and checks them by content."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_dp.data.records import RecordDataset, Records, content_hashes
from lightning_dp.data.splits import (
    CARVED,
    Split,
    SplitSettings,
    assert_disjoint,
    digest,
    load_splits,
    save_splits,
    split_indices,
)
from lightning_dp.errors import ConfigError

_N_TOLERANCE = 0.01  # of privacy.num_examples, which is rounded because the exact count is itself private


@dataclass(frozen=True)
class Roles:
    """Who plays which role; made of raw images, before any encoder.

    Args:
        split: how the training side was split.
        hashes: `content_hashes` of every role.
        overlaps: what `assert_disjoint` returned.
    """

    split: Split
    hashes: Mapping[str, np.ndarray]
    overlaps: Mapping[str, int]

    def datasets(self, sides: Mapping[str, Records]) -> dict[str, RecordDataset]:
        """The roles' records, cut out of the sides (raw, or encoded in the same order)."""
        roles = {role: RecordDataset(sides["train"], self.split.indices[role]) for role in CARVED}
        return roles | {side: RecordDataset(records) for side, records in sides.items() if side != "train"}

    def save(self, path: Path) -> None:
        """Write the split as JSON; it identifies the members, so it stays with the data."""
        save_splits(path, self.split, self.hashes, self.overlaps)

    def public_digest(self) -> str:
        """Digest of all roles but private (a digest of private records would confirm guesses about them)."""
        total = hashlib.blake2b(digest_size=16)
        for role, hashes in sorted(self.hashes.items()):
            if role != "private":
                total.update(f"{role} {digest(hashes)}".encode())
        return total.hexdigest()

    def public_overlaps(self) -> dict[str, int]:
        """Overlap counts that may be published: all but private with test, which depends on private records."""
        return {pair: count for pair, count in self.overlaps.items() if pair != "private/test"}


def assign_roles(source: str, sides: Mapping[str, Records], settings: SplitSettings, saved: Path | None) -> Roles:
    """Split the training side, and check all roles by content.

    Args:
        source: name of the source.
        sides: raw records: "train" (to be split), "test", and optionally "public" and "synthetic".
        settings: seed and sizes of the split.
        saved: split of an earlier run, to be reused exactly.

    Raises:
        ConfigError: the split is impossible or of other data, or two roles share records that must not.
    """
    hashes = {name: content_hashes(side.images) for name, side in sides.items()}
    training = hashes.pop("train")
    if saved is None:
        indices = split_indices(sides["train"].labels.numpy(), training, hashes["test"], settings)
        split = Split(source, settings, digest(training), indices)
    else:
        split = load_splits(saved, settings, training)
    hashes = {role: training[split.indices[role]] for role in CARVED} | hashes
    overlaps = assert_disjoint(hashes)
    if overlaps["private/test"]:
        warnings.warn(
            f"{overlaps['private/test']} private records are in the test role too: the test accuracy is partly that of "
            "seen records (the privacy guarantee is not affected)",
            stacklevel=2,
        )
    return Roles(split, hashes, overlaps)


def check_num_examples(actual: int, declared: int) -> None:
    """Refuse a declared size of the private role that is not about the true one.

    Raises:
        ConfigError: they differ by more than one percent.
    """
    if abs(actual - declared) > _N_TOLERANCE * declared:
        about = float(f"{actual:.3g}")
        raise ConfigError(
            f"privacy.num_examples is {declared} but the private role holds about {about:.0f} records: "
            f"set it to a rounded public figure near {about:.0f}"
        )

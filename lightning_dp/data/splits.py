"""Which record plays which role: a public choice, made once, saved by index and checked by content."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lightning_dp.errors import ConfigError

CARVED = ("private", "audit", "validation", "public")
"""Roles that are cut out of the training set of one source."""

_FORBIDDEN = (
    ("private", "public"),
    ("private", "synthetic"),
    ("private", "audit"),
    ("private", "validation"),
    # a non-member that was trained on is no non-member
    ("audit", "public"),
    ("audit", "synthetic"),
)
_COUNTED = (("private", "test"), ("public", "test"), ("synthetic", "test"))
_NOTE = "Lists which records are private: keep it with the data, do not publish it."


@dataclass(frozen=True)
class SplitSettings:
    """The public numbers that decide a split, named as in the ``data`` section.

    Args:
        split_seed: seed of the permutation.
        audit: records held out for attacks, never trained on.
        public_per_class: records of every class that are declared public.
        validation_private: records held out for validation; looked at, hence outside the guarantee.

    Raises:
        ConfigError: a number is negative.
    """

    split_seed: int = 0
    audit: int = 0
    public_per_class: int = 0
    validation_private: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise ConfigError(f"data.{name} is {value}: it must not be negative")


def fixed_split(num_records: int, num_test: int, train: bool) -> np.ndarray:
    """Rows of one side of a public split for data sets that come without an official one, ascending, shape (n,)."""
    # NumPy froze the stream of RandomState (NEP 19), so the split is the same under every release.
    order = np.random.RandomState(0).permutation(num_records)
    return np.sort(order[num_test:] if train else order[:num_test])


def split_indices(
    labels: np.ndarray, hashes: np.ndarray, test_hashes: np.ndarray, settings: SplitSettings
) -> dict[str, np.ndarray]:
    """Deal the records of a training set out to the roles private, audit, validation and public.

    Guarantee: every record has exactly one role, and no copy of a private record has another one: a record that occurs
    twice in the training set, or again in the test set, stays private. All but these are exchangeable under the
    public permutation, so audit records are twins in law of the private ones. A larger ``public_per_class`` leaves the
    audit and validation roles as they are.

    Args:
        labels: classes, shape (n,).
        hashes: `content_hashes` of the training set, shape (n,).
        test_hashes: `content_hashes` of the test set.
        settings: seed and sizes.

    Returns:
        Ascending row indices by role, each of shape (n_role,); together a partition of range(n).

    Raises:
        ConfigError: more records are asked for than there are, or none is left private.
    """
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    may_leave = (counts[group] == 1) & ~np.isin(hashes, test_hashes)
    order = np.random.RandomState(settings.split_seed).permutation(len(labels))
    free = order[may_leave[order]]
    held_out = settings.audit + settings.validation_private
    if held_out > len(free):
        raise ConfigError(
            f"data.audit {settings.audit} and data.validation_private {settings.validation_private} ask for more "
            "than the training set has: lower them"
        )
    audit_rows, validation_rows, rest = np.split(free, [settings.audit, held_out])
    public_rows = _shots(labels, rest, settings.public_per_class)
    taken = np.concatenate([audit_rows, validation_rows, public_rows])
    private_rows = np.setdiff1d(np.arange(len(labels)), taken)
    if len(private_rows) == 0:
        raise ConfigError("no record is left private: lower data.audit, data.public_per_class or validation_private")
    return {
        "private": private_rows,
        "audit": np.sort(audit_rows),
        "validation": np.sort(validation_rows),
        "public": np.sort(public_rows),
    }


def _shots(labels: np.ndarray, candidates: np.ndarray, per_class: int) -> np.ndarray:
    """The first ``per_class`` candidates of every class."""
    chosen = [candidates[:0]]
    for label in np.unique(labels) if per_class else ():
        rows = candidates[labels[candidates] == label][:per_class]
        if len(rows) < per_class:
            raise ConfigError(
                f"data.public_per_class {per_class} asks for more records than class {label} has left: lower it"
            )
        chosen.append(rows)
    return np.concatenate(chosen)


def assert_disjoint(hashes: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Check by content that no private record plays a second role, and no audit record is trained on.

    Args:
        hashes: `content_hashes` of every role.

    Returns:
        Records of the first role found in the second, by "first/second". Overlaps with the test role are only counted:
        they spoil the accuracy, not the guarantee.

    Raises:
        ConfigError: two roles share records that must not.
    """
    overlaps = {}
    for first, second in _FORBIDDEN + _COUNTED:
        if first not in hashes or second not in hashes:
            continue
        count = int(np.isin(hashes[first], hashes[second]).sum())
        if count and (first, second) in _FORBIDDEN:
            raise ConfigError(
                f"roles {first} and {second} share {count} record(s): remove them from data.{second}, "
                "or choose other data for it"
            )
        overlaps[f"{first}/{second}"] = count
    return overlaps


def digest(hashes: np.ndarray) -> str:
    """Digest of a role: BLAKE2b of its content hashes in order, 32 hexadecimal digits."""
    return hashlib.blake2b(hashes.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Split:
    """A split of one source's training set, with what is needed to recognise the data again.

    Args:
        source: name of the source.
        settings: the numbers that decided the split.
        training_digest: `digest` of the whole training set.
        indices: ascending row indices of the roles in `CARVED`.
    """

    source: str
    settings: SplitSettings
    training_digest: str
    indices: Mapping[str, np.ndarray]


def save_splits(path: Path, split: Split, role_hashes: Mapping[str, np.ndarray], overlaps: Mapping[str, int]) -> None:
    """Write a split as JSON, for reuse and for attacks on the trained model; it identifies the members.

    Args:
        path: file to write; its folder is made.
        split: the split.
        role_hashes: `content_hashes` of every role.
        overlaps: what `assert_disjoint` returned.
    """
    document = {
        "note": _NOTE,
        "source": split.source,
        "settings": asdict(split.settings),
        "sizes": {role: len(hashes) for role, hashes in role_hashes.items()},
        "overlaps": dict(overlaps),
        "training_digest": split.training_digest,
        "digests": {role: digest(hashes) for role, hashes in role_hashes.items()},
        "indices": {role: rows.tolist() for role, rows in split.indices.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def load_splits(path: Path, settings: SplitSettings, training_hashes: np.ndarray) -> Split:
    """Read a saved split, exactly as it was.

    Args:
        path: what `save_splits` wrote.
        settings: the numbers asked for now.
        training_hashes: `content_hashes` of the training set at hand.

    Raises:
        ConfigError: no such file or not a split; or it was made of other data or with other numbers.
    """
    try:
        document = json.loads(path.read_text())
        indices = {role: np.array(document["indices"][role], dtype=np.int64) for role in CARVED}
        made = SplitSettings(**document["settings"])
        split = Split(document["source"], made, document["training_digest"], indices)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"data.splits: {path} is not a saved split ({error!r}): leave the setting out") from error
    for name, value in asdict(settings).items():
        before = asdict(made)[name]
        if before != value:
            raise ConfigError(
                f"data.splits: {path} was made with {name} {before}, not {value}: set data.{name} {before}"
            )
    if split.training_digest != digest(training_hashes):
        raise ConfigError(
            f"data.splits: {path} was made of other records ({split.source}) than those at hand: "
            "point data.root to the same data, or leave the setting out"
        )
    if not np.array_equal(np.sort(np.concatenate(list(indices.values()))), np.arange(len(training_hashes))):
        raise ConfigError(f"data.splits: {path} does not give every record exactly one role: it was changed by hand")
    return split

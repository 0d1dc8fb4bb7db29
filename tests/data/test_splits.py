import json
from dataclasses import replace

import numpy as np
import pytest

from lightning_dp.data.splits import (
    Split,
    SplitSettings,
    assert_disjoint,
    digest,
    fixed_split,
    load_splits,
    save_splits,
    split_indices,
)
from lightning_dp.errors import ConfigError

LABELS = np.arange(200) % 4
HASHES = np.array([f"{i:016d}" for i in range(200)], dtype="S16")
NONE = HASHES[:0]
SETTINGS = SplitSettings(split_seed=3, audit=20, public_per_class=2, validation_private=7)


def test_roles_partition_the_training_set():
    roles = split_indices(LABELS, HASHES, NONE, SETTINGS)
    assert {role: len(rows) for role, rows in roles.items()} == {
        "private": 165,
        "audit": 20,
        "validation": 7,
        "public": 8,
    }
    assert sorted(np.concatenate(list(roles.values()))) == list(range(200))
    assert np.bincount(LABELS[roles["public"]]).tolist() == [2, 2, 2, 2]


def test_split_depends_on_its_seed_only():
    first, again = (split_indices(LABELS, HASHES, NONE, SETTINGS) for _ in range(2))
    other = split_indices(LABELS, HASHES, NONE, replace(SETTINGS, split_seed=4))
    assert all(np.array_equal(first[role], again[role]) for role in first)
    assert not np.array_equal(first["audit"], other["audit"])


def test_more_public_records_leave_the_audit_role_as_it_is():
    first = split_indices(LABELS, HASHES, NONE, SETTINGS)
    more = split_indices(LABELS, HASHES, NONE, replace(SETTINGS, public_per_class=9))
    assert np.array_equal(first["audit"], more["audit"])
    assert np.array_equal(first["validation"], more["validation"])
    assert set(first["public"]) < set(more["public"])


def test_copies_stay_private():
    hashes = HASHES.copy()
    hashes[100:150] = hashes[:50]
    roles = split_indices(LABELS, hashes, HASHES[50:70], SETTINGS)
    assert set(range(70)) | set(range(100, 150)) <= set(roles["private"])
    assert_disjoint({role: hashes[rows] for role, rows in roles.items()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SplitSettings(audit=201), "more than the training set has"),
        (SplitSettings(public_per_class=51), "than class 0 has left"),
        (SplitSettings(public_per_class=50), "no record is left private"),
    ],
)
def test_impossible_split_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        split_indices(LABELS, HASHES, NONE, settings)


def test_negative_number_is_refused():
    with pytest.raises(ConfigError, match=r"data\.audit is -1"):
        SplitSettings(audit=-1)


@pytest.mark.parametrize(
    ("first", "second"),
    [("private", role) for role in ("public", "synthetic", "audit", "validation")]
    + [("audit", "public"), ("audit", "synthetic")],
)
def test_overlap_names_both_roles_and_the_count(first, second):
    with pytest.raises(ConfigError, match=f"{first} and {second} share 3 record"):
        assert_disjoint({first: HASHES[:10], second: HASHES[7:20]})


def test_overlap_with_test_is_counted_only():
    overlaps = assert_disjoint({"private": HASHES[:10], "public": HASHES[10:20], "test": HASHES[8:30]})
    assert overlaps == {"private/public": 0, "private/test": 2, "public/test": 10}


def test_fixed_split_is_a_partition_and_never_changes():
    train, test = fixed_split(1797, 360, True), fixed_split(1797, 360, False)
    assert sorted([*train, *test]) == list(range(1797))
    assert test[:4].tolist() == [4, 5, 6, 9]


def saved(path, settings=SETTINGS):
    indices = split_indices(LABELS, HASHES, NONE, settings)
    split = Split("Made", settings, digest(HASHES), indices)
    hashes = {role: HASHES[rows] for role, rows in indices.items()}
    save_splits(path, split, hashes, assert_disjoint(hashes))
    return split


def test_saved_split_reloads_identically(tmp_path):
    split = saved(tmp_path / "new" / "splits.json")
    again = load_splits(tmp_path / "new" / "splits.json", SETTINGS, HASHES)
    assert (again.source, again.settings, again.training_digest) == ("Made", SETTINGS, digest(HASHES))
    assert all(np.array_equal(split.indices[role], again.indices[role]) for role in split.indices)


def test_saved_split_says_what_it_holds(tmp_path):
    split = saved(tmp_path / "splits.json")
    document = json.loads((tmp_path / "splits.json").read_text())
    assert document["sizes"] == {role: len(rows) for role, rows in split.indices.items()}
    assert document["settings"]["split_seed"] == 3
    assert document["digests"]["audit"] == digest(HASHES[split.indices["audit"]])
    assert document["overlaps"]["private/audit"] == 0


def test_saved_split_is_refused_for_other_data_or_numbers(tmp_path):
    path = tmp_path / "splits.json"
    saved(path)
    with pytest.raises(ConfigError, match="other records"):
        load_splits(path, SETTINGS, HASHES[::-1])
    with pytest.raises(ConfigError, match="audit 20, not 21"):
        load_splits(path, replace(SETTINGS, audit=21), HASHES)
    document = json.loads(path.read_text())
    document["indices"]["public"].append(document["indices"]["private"][0])
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="exactly one role"):
        load_splits(path, SETTINGS, HASHES)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"size": 1}, "training_digest": "", "indices": {}}'])
def test_file_that_is_no_split_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(ConfigError, match="not a saved split") as caught:
        load_splits(tmp_path / "splits.json", SETTINGS, HASHES)
    assert "\n" not in str(caught.value)

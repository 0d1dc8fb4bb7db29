import copy
import json
import os

import pytest

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.accounting import Release
from lightning_dp.privacy.ledger import Ledger, read

ONE = Release(1.5, 0.1)


@pytest.fixture
def ledger(tmp_path):
    made = Ledger()
    made.open(tmp_path)
    yield made
    made.close()


def test_every_release_is_on_disk_before_record_returns(ledger):
    for count in range(1, 4):
        ledger.record(ONE)
        assert read(ledger.path) == (ledger.run, (Release(1.5, 0.1, count),))
    assert len(ledger) == 3


def test_a_torn_line_counts_and_does_not_swallow_the_next(ledger):
    ledger.record(ONE)
    ledger.close()
    ledger.path.write_bytes(ledger.path.read_bytes() + b'{"noise_mult')
    resumed = Ledger.from_state_dict(ledger.state_dict())
    resumed.open(ledger.path.parent)
    assert len(resumed) == 2
    resumed.record(ONE)
    resumed.close()
    assert read(ledger.path)[1] == (Release(1.5, 0.1, 3),)


def test_the_file_overrules_an_older_checkpoint(ledger):
    ledger.record(ONE)
    checkpoint = ledger.state_dict()
    ledger.record(ONE)
    ledger.record(Release(2.0, 0.1))
    ledger.close()
    resumed = Ledger.from_state_dict(checkpoint)
    assert len(resumed) == 1
    resumed.open(ledger.path.parent)
    assert resumed.releases == (Release(1.5, 0.1, 2), Release(2.0, 0.1))
    resumed.close()


def test_a_shortened_file_never_lowers_the_total(ledger):
    ledger.record(ONE)
    ledger.record(ONE)
    ledger.close()
    ledger.path.write_text(json.dumps({"ledger": 1, "run": ledger.run}) + "\n")
    resumed = Ledger.from_state_dict(ledger.state_dict())
    resumed.open(ledger.path.parent)
    assert len(resumed) == 2
    resumed.close()
    # The file is brought up to date, or the next resume from the same checkpoint would count too little.
    assert read(ledger.path)[1] == (Release(1.5, 0.1, 2),)


def test_a_missing_file_is_refused(ledger):
    ledger.record(ONE)
    ledger.close()
    ledger.path.unlink()
    with pytest.raises(ConfigError, match="is missing"):
        Ledger.from_state_dict(ledger.state_dict()).open(ledger.path.parent)


def test_another_runs_file_is_refused(ledger, tmp_path):
    ledger.close()
    other = Ledger(path=ledger.path)
    with pytest.raises(ConfigError, match="belongs to run"):
        other.open(tmp_path)


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(ConfigError, match="not a privacy ledger"):
        read(tmp_path / "notes.txt")


def test_two_processes_cannot_spend_from_one_ledger(ledger):
    second = Ledger.from_state_dict(ledger.state_dict())
    second.open(ledger.path.parent)
    ledger.record(ONE)
    with pytest.raises(ConfigError, match="another process is spending"):
        second.record(ONE)
    assert len(second) == 0
    second.close()
    assert read(ledger.path)[1] == (ONE,)


def test_a_line_is_synced_to_the_disk(ledger, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    ledger.record(ONE)
    assert len(synced) == 1


def test_a_line_that_is_written_in_pieces_is_whole(ledger, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    ledger.record(ONE)
    ledger.record(ONE)
    assert read(ledger.path)[1] == (Release(1.5, 0.1, 2),)


def test_a_full_disk_stops_before_anything_is_recorded(ledger, monkeypatch):
    def full(file, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="no space"):
        ledger.record(ONE)
    assert len(ledger) == 0


def test_runs_in_one_folder_have_files_of_their_own(ledger, tmp_path):
    second = Ledger()
    second.open(tmp_path)
    assert second.path != ledger.path
    second.close()


def test_state_is_plain_and_the_ledger_can_be_copied(ledger):
    ledger.record(ONE)
    state = ledger.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert copy.deepcopy(ledger).releases == ledger.releases


def test_groups_are_kept_on_disk_and_in_checkpoints(ledger):
    rows = (Release(1.5, 0.1, 2, "class 0"), Release(1.5, 0.2, 3, "class 1"))
    ledger.record(*rows)
    assert read(ledger.path)[1] == ledger.releases == rows
    assert Ledger.from_state_dict(ledger.state_dict()).releases == rows
    old = {**ledger.state_dict(), "releases": [[1.5, 0.1, 7]]}
    assert Ledger.from_state_dict(old).releases == (Release(1.5, 0.1, 7),)


def test_a_torn_line_of_a_block_counts_as_the_block_before_it(ledger):
    ledger.record(Release(1.5, 0.1, 50))
    with ledger.path.open("a") as file:
        file.write('{"noise_mul')
    assert read(ledger.path)[1] == (Release(1.5, 0.1, 100),)


def test_a_torn_line_counts_for_every_group(ledger):
    ledger.record(Release(1.5, 0.1, 50, "class 0"))
    with ledger.path.open("a") as file:
        file.write('{"noise_mul')
    assert read(ledger.path)[1] == (Release(1.5, 0.1, 50, "class 0"), Release(1.5, 0.1, 50))

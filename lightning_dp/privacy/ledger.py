"""The record of every release: in memory, in the checkpoint, and ahead of each release in an append-only file."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.accounting import Release, merge


class Ledger:
    """Releases in the order in which they were made; they are only ever added.

    Guarantee: with a file attached, `record` returns only after its line has reached the disk, so what was released
    is never more than what the file says, whenever the process is killed. A line torn by a crash counts as a release.

    Args:
        releases: what was released before.
        run: identity of the run, shared by its checkpoints and its file.
        path: the run's file, where one was attached.
    """

    def __init__(self, releases: Iterable[Release] = (), run: str | None = None, path: Path | None = None) -> None:
        self.releases = merge(releases)
        self.run = run or uuid.uuid4().hex
        self.path = path
        # A bare descriptor, so that a module that owns the ledger can still be deep-copied (weight averaging does).
        self._file: int | None = None
        self._size = 0

    def __len__(self) -> int:
        return sum(release.count for release in self.releases)

    def record(self, *releases: Release) -> None:
        """Add what leaves together, to the file first.

        Raises:
            ConfigError: another process has written to the file since; nothing was recorded.
            OSError: the disk is full; a torn line may be left behind, which counts.
        """
        if self._file is not None:
            self._append(releases)
        self.releases = merge([*self.releases, *releases])

    def open(self, folder: Path) -> None:
        """Attach the run's file, new below ``folder`` if it has none yet.

        Raises:
            ConfigError: the file of an earlier run is missing or belongs to another run.
        """
        if self._file is not None:
            return
        if self.path is None:
            self.path = _create(folder, self.run, self.releases)
        elif not self.path.is_file():
            raise ConfigError(
                f"the ledger {self.path} of this checkpoint is missing, so what was released after it is unknown: "
                "put the file back (or beside the checkpoint's folder), or train anew"
            )
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        run, written = read(self.path)
        if run != self.run:
            self.close()
            raise ConfigError(f"the ledger {self.path} belongs to run {run}, the checkpoint to {self.run}: use its own")
        self._size = self.path.stat().st_size
        if not self.path.read_bytes().endswith(b"\n"):
            self._write(b"\n")  # or the next release would be glued to a torn line and lost with it
        # File and checkpoint can each be the older one; the longer record is the truth, and both get it.
        missing = len(self) - sum(release.count for release in written)
        if missing > 0:
            self._append([replace(self.releases[-1], count=missing)])
        else:
            self.releases = merge(written)

    def _append(self, releases: Sequence[Release]) -> None:
        self._write("".join(json.dumps(_row(release)) + "\n" for release in releases).encode())

    def _write(self, data: bytes) -> None:
        """Append ``data`` and wait for the disk, unless somebody else has written since our last line."""
        assert self._file is not None
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if os.fstat(self._file).st_size != self._size:
                raise ConfigError(
                    f"another process is spending from the ledger {self.path}: stop one of them and resume the other"
                )
            self._size += len(data)
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, so that a checkpoint loads with ``weights_only=True``."""
        rows = [[value for value in astuple(release) if value != ""] for release in self.releases]
        return {"run": self.run, "path": None if self.path is None else str(self.path), "releases": rows}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Ledger":
        """The ledger of a checkpoint; its file is attached by `open`."""
        rows = state["releases"]
        releases = [Release(float(sigma), float(rate), int(count), *group) for sigma, rate, count, *group in rows]
        return cls(releases, state["run"], None if state["path"] is None else Path(state["path"]))


def read(path: Path) -> tuple[str, tuple[Release, ...]]:
    """Run and releases of a ledger file; an unreadable line counts as a release like the one before it.

    Raises:
        ConfigError: the file does not begin with a ledger's header.
    """
    head, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    try:
        run = str(json.loads(head)["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a privacy ledger: its first line names no run") from error
    rows = [_parse(line) for line in lines if line.strip()]
    # A torn line was followed by no release, since `record` had not returned; it is counted all the same, with the
    # numbers of its neighbour, because a line can also be damaged later.
    whole = [row for row in rows if row is not None]
    known = whole[0] if whole else None
    releases = []
    for row in rows:
        known = row or known
        if known is not None:
            releases.append(row or replace(known, group=""))  # whose group it was cannot be read: it counts for all
    return run, merge(releases)


def _parse(line: str) -> Release | None:
    """The release of one line; None if the line is torn."""
    try:
        row = json.loads(line)
        numbers = float(row["noise_multiplier"]), float(row["sample_rate"]), int(row["count"])
        return Release(*numbers, str(row.get("group", "")))
    except (ValueError, KeyError, TypeError):
        return None


def _row(release: Release) -> dict[str, Any]:
    return {key: value for key, value in asdict(release).items() if value != ""}


def _sync_folder(folder: Path) -> None:
    """Wait until the name of a new file is on the disk, not only its bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _create(folder: Path, run: str, releases: Sequence[Release]) -> Path:
    """A new file named after nothing that exists, with its header and what was released before."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in [{"ledger": 1, "run": run}, *map(_row, releases)])
    for number in range(10_000):
        path = folder / ("ledger.jsonl" if number == 0 else f"ledger-{number}.jsonl")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            continue
        _sync_folder(folder)
        return path.resolve()
    raise ConfigError(f"{folder} holds 10,000 ledgers: choose another --trainer.logger.init_args.save_dir")

"""What all runs on one private data set have cost together: an append-only file beside the data.

A run is written down with all that it may release before it releases anything, and again when it has ended. The file is
named after the data and stays with them.
"""

import datetime
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_dp.errors import ConfigError
from lightning_dp.privacy import accounting
from lightning_dp.privacy.accounting import SMALLEST_FFT_DELTA, Adjacency, Release
from lightning_dp.privacy.ledger import read


@dataclass(frozen=True)
class Run:
    """One run of a dataset ledger.

    Args:
        run: identity of its ledger.
        method: class of the method.
        began: time of its last start, ISO 8601.
        ended: whether it went to its end; else all that it planned counts.
        path: its own ledger.
        planned: everything it may release.
    """

    run: str
    method: str
    began: str
    ended: bool
    path: Path | None
    planned: tuple[Release, ...]

    def releases(self) -> tuple[Release, ...]:
        """What it released, by its own ledger if it has ended and the file is there; else what it planned."""
        if self.ended and self.path is not None and self.path.is_file():
            identity, made = read(self.path)
            if identity == self.run:
                return made
        return self.planned


class DatasetLedger:
    """Runs on one data set, in the order in which they began.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def runs(self) -> list[Run]:
        """All runs, each as its last lines say; one that went on from a copy at another place is there twice.

        Raises:
            ConfigError: a line cannot be read, so it is not known what it stands for.
        """
        if not self.path.is_file():
            return []
        # By place too: of two copies of one run, each may go on by itself.
        found: dict[tuple[str, str | None], Run] = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                key = str(row["run"]), row["ledger"]
                if row["event"] == "end":
                    found[key] = replace(found[key], ended=True)
                    continue
                planned = tuple(Release(float(s), float(q), int(n), *group) for s, q, n, *group in row["planned"])
                path = None if row["ledger"] is None else Path(row["ledger"])
                found[key] = Run(key[0], row["method"], row["when"], False, path, planned)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"line {number} of the dataset ledger {self.path} cannot be read ({error!r}), so what it stands "
                    "for is unknown: mend it by hand"
                ) from error
        return list(found.values())

    def begin(
        self,
        run: str,
        method: str,
        ledger: Path | None,
        planned: Sequence[Release],
        delta: float,
        adjacency: Adjacency = "add_remove",
        limit: float | None = None,
    ) -> None:
        """Write down a run before its first release.

        Args:
            run: identity of its ledger.
            method: class of the method.
            ledger: its own ledger.
            planned: everything it may release, with what it has released before.
            delta: of the total.
            adjacency: of the total.
            limit: epsilon that the total may not exceed; None for no limit.

        Raises:
            ConfigError: it would be exceeded; nothing was written down.
        """
        rows = [[part for part in asdict(release).values() if part != ""] for release in planned]
        row = {
            "event": "begin", "run": run, "method": method, "when": _now(),
            "ledger": None if ledger is None else str(ledger), "planned": rows,
        }  # fmt: skip

        def check() -> None:
            if limit is None:
                return
            before = self.epsilon(delta, adjacency, without=(run, ledger))
            after = self.epsilon(delta, adjacency, without=(run, ledger), also=planned)
            if after > limit:
                raise ConfigError(
                    f"this run would bring all runs on these private records from epsilon {before:.4g} to {after:.4g} "
                    f"at delta {delta:g} ({adjacency}), above privacy.dataset_epsilon {limit:g}: lower its budget, or "
                    f"see {self.path} (lightning-dp ledger)"
                )

        self._append(row, check)

    def end(self, run: str, ledger: Path | None) -> None:
        """Write down that a run has ended; from now on its own ledger counts."""
        self._append({"event": "end", "run": run, "when": _now(), "ledger": None if ledger is None else str(ledger)})

    def epsilon(
        self,
        delta: float,
        adjacency: Adjacency = "add_remove",
        without: tuple[str, Path | None] | None = None,
        also: Sequence[Release] = (),
    ) -> float:
        """Certified epsilon of all runs together, for a record in every one: by PLD, or RDP if delta is below 1e-9.

        Args:
            delta: of the total.
            adjacency: of the total.
            without: identity and ledger of a run that is left out.
            also: further releases, e.g. those of a run that is about to begin.

        Raises:
            ConfigError: a line cannot be read, or delta is below 1e-9 under "replace_one".
        """
        parts = [run.releases() for run in self.runs() if (run.run, run.path) != without] + [tuple(also)]
        releases = [release for part in parts for release in whole(part)]
        return accounting.epsilon(releases, delta, adjacency, "rdp" if delta < SMALLEST_FFT_DELTA else "pld")

    def _append(self, row: dict[str, Any], check: Callable[[], None] = lambda: None) -> None:
        """One line, after a check that no other process can come between."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            check()
            os.write(descriptor, (json.dumps(row) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def whole(releases: Sequence[Release]) -> list[Release]:
    """Releases of a run as if no part of them were by group: an upper bound for a record of any group.

    Groups of different runs need not be the same partition, so a record may be in the worst group of each.

    Example:
        >>> whole([Release(2.0, 0.5, 3, "class 0"), Release(2.0, 0.1, 5, "class 1")])
        [Release(noise_multiplier=2.0, sample_rate=0.5, count=5, group='')]
    """
    free = [release for release in releases if not release.group]
    grouped = [release for release in releases if release.group]
    if not grouped:
        return free
    counts = {name: sum(r.count for r in grouped if r.group == name) for name in {r.group for r in grouped}}
    sigma, rate = min(r.noise_multiplier for r in grouped), max(r.sample_rate for r in grouped)
    return [*free, Release(sigma, rate, max(counts.values()))]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

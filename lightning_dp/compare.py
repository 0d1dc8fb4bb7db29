"""``lightning-dp compare``: a set of configurations over seeds and epsilons, one process each, and one table.

Every run is an ordinary ``lightning-dp fit`` in a process of its own. What it left behind (privacy card, metrics) is
read and appended to ``results.jsonl``; nothing else is kept between calls, so a comparison that was stopped goes on
where it was, and a run that was killed is made again. `report.py` makes the table and the plot.
"""

import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_dp.errors import ConfigError
from lightning_dp.report import Result, write_report

_FIT = (sys.executable, "-m", "lightning_dp", "fit")
_CARD = ("method", "epsilon", "delta", "adjacency", "unit", "accountant", "noise_multiplier", "rng", "data")


@dataclass(frozen=True)
class Part:
    """What some runs of a comparison have in common.

    Args:
        files: configuration files, in order; a later one wins.
        settings: settings by their dotted names, as after ``--`` on the command line; they win over files.
    """

    files: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One method of a comparison.

    Args:
        files: configuration files, after those that all rows share.
        settings: settings of this row.
        private: runs once per seed and epsilon; false: once per seed, whatever epsilon.
    """

    files: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    private: bool = True


@dataclass(frozen=True)
class Run:
    """One ``fit``: a row at one seed, one epsilon and one place of every axis."""

    row: str
    axes: dict[str, str]
    epsilon: float | None
    seed: int
    arguments: tuple[str, ...]
    files: tuple[str, ...]
    digest: str
    """Of the arguments and of what the files held when the run was planned."""

    @property
    def name(self) -> str:
        """Readable and unique."""
        budget = [] if self.epsilon is None else [f"eps{self.epsilon:g}"]
        words = [self.row, *self.axes.values(), *budget, f"seed{self.seed}", self.digest]
        return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)


def compare(
    rows: dict[str, Row],
    output: Path,
    seeds: list[int],
    epsilons: list[float],
    common: Part | None = None,
    axes: dict[str, dict[str, Part]] | None = None,
    seed_settings: list[str] | None = None,
    metric: str = "test/accuracy",
    paragon: str | None = None,
    only_public: str | None = None,
    jobs: int = 1,
    threads: int = 1,
) -> None:
    """Run what is missing of a comparison, then write ``table.md``, ``table.csv`` and ``plot.png`` into ``output``.

    Args:
        rows: the methods by name, in the order of the table.
        output: folder of the comparison; `results.jsonl` in it says what is done.
        seeds: every row runs at each of them.
        epsilons: targets, given to private rows as ``privacy.epsilon``.
        common: what all rows share; given before everything else.
        axes: further axes, crossed: axis -> place on it -> what that place adds to the common part.
        seed_settings: settings that get the seed; by default ``seed_everything`` (initial weights). Batches and noise
            are fresh in every run unless ``privacy.seed`` is among them, which is not for release.
        metric: share of right answers in [0, 1] that is compared, by its logged name.
        paragon: row without privacy to which relative error increases refer.
        only_public: row without private data, always shown in the plot.
        jobs: runs at a time; performance only.
        threads: threads of each run; performance only.

    Raises:
        ConfigError: the settings contradict each other, or runs failed.
    """
    _check(rows, seeds, epsilons, [name for name in (paragon, only_public) if name is not None])
    if jobs < 1 or threads < 1:
        raise ConfigError(f"--jobs {jobs} and --threads {threads} must be at least 1")
    planned = list(plan_runs(rows, seeds, epsilons, common or Part(), axes or {}, seed_settings or ["seed_everything"]))
    output.mkdir(parents=True, exist_ok=True)
    with _sole_writer(output / "results.jsonl"):
        done = read_results(output / "results.jsonl", metric)
        failed = _run_all([run for run in planned if run.name not in done], output, metric, jobs, threads)
        done = read_results(output / "results.jsonl", metric)
        results = [done[run.name] for run in planned if run.name in done]
        if results:
            write_report(output, results, list(rows), metric, paragon, only_public)
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(planned)} runs failed, to be made again by the same command: {failed[0]}"
        )
    print(f"{len(results)} runs: {output / 'table.md'}, table.csv, plot.png")


def plan_runs(
    rows: Mapping[str, Row],
    seeds: Sequence[int],
    epsilons: Sequence[float],
    common: Part,
    axes: Mapping[str, Mapping[str, Part]],
    seed_settings: Sequence[str],
) -> Iterator[Run]:
    """Every run of a comparison; seeds vary slowest, so that a stopped comparison has whole rounds.

    Raises:
        ConfigError: a file cannot be read.
    """
    places = itertools.product(*([(axis, *place) for place in places.items()] for axis, places in axes.items()))
    for seed, place, (name, row) in itertools.product(seeds, list(places), rows.items()):
        parts: list[Part | Row] = [common, *(part for _, _, part in place), row]
        files = [file for part in parts for file in part.files]
        settings = {key: value for part in parts for key, value in part.settings.items()}
        for epsilon in epsilons if row.private else [None]:
            budget = {} if epsilon is None else {"privacy.epsilon": epsilon}
            words = [word for file in files for word in ("-c", file)]
            every = {**settings, **budget, **dict.fromkeys(seed_settings, seed)}
            words += [
                f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in every.items()
            ]
            labels = {axis: label for axis, label, _ in place}
            yield Run(name, labels, epsilon, seed, tuple(words), tuple(files), _digest(words, files))


def read_results(path: Path, metric: str) -> dict[str, Result]:
    """Finished runs that have the metric, by name; a line that a crash cut off is not one."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if metric in result["metrics"]:
            results[result["name"]] = result
    return results


def _check(rows: Mapping[str, Row], seeds: Sequence[int], epsilons: Sequence[float], named: Sequence[str]) -> None:
    if not rows or not seeds or (not epsilons and any(row.private for row in rows.values())):
        raise ConfigError("a comparison needs rows, seeds and (for private rows) epsilons: set them")
    for key, values in (("seeds", seeds), ("epsilons", epsilons)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{key} {list(values)} has a value twice, which would count one run as two: remove it")
    if unknown := [name for name in named if name not in rows]:
        raise ConfigError(f"paragon or only_public {unknown[0]} is not among the rows {', '.join(rows)}: correct it")
    if private := [name for name in named if rows[name].private]:
        raise ConfigError(f"row {private[0]} is paragon or only_public, so it takes no epsilon: set its private: false")


def _run_all(runs: Sequence[Run], output: Path, metric: str, jobs: int, threads: int) -> list[str]:
    """Make the runs, appending each result as it comes; returns one line per failed run."""
    failed = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc="runs", unit="run", disable=not runs) as bar:
        running = {pool.submit(_run, run, output / "runs" / run.name, metric, threads): run for run in runs}
        try:
            for future in as_completed(running):
                bar.set_postfix_str(running[future].name)
                bar.update()
                try:
                    _append(output / "results.jsonl", future.result())
                except ConfigError as error:
                    failed.append(str(error))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _run(run: Run, folder: Path, metric: str, threads: int) -> Result:
    """One process from start to end, and what it left.

    A killed attempt keeps its folder: its ledger says what was released.

    Raises:
        ConfigError: it failed, or its files are no longer those of its name, so that nobody knows what it read.
    """
    _check_unchanged(run)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = next(name for i in itertools.count() if not (folder / (name := f"attempt_{i}")).exists())
    (folder / attempt).mkdir()
    logger = {"": "TensorBoardLogger", ".save_dir": str(folder), ".name": "null", ".version": attempt}
    where = [f"--trainer.logger{key}={value}" for key, value in logger.items()]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    command = [*_FIT, *run.arguments, *where, *quiet]
    slots = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    started = time.perf_counter()
    with (folder / attempt / "log.txt").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **slots}).returncode
    if status:
        raise ConfigError(f"{run.name} ended with status {status}: see {log.name}")
    _check_unchanged(run)
    return _result(run, folder / attempt, metric, time.perf_counter() - started)


def _result(run: Run, folder: Path, metric: str, seconds: float) -> Result:
    """What a finished run left in its log directory."""
    card, metrics = (_json(folder / f"{name}.json") for name in ("privacy_card", "metrics"))
    metrics = {**metrics, **card.get("metrics", {})}
    if metric not in metrics:
        raise ConfigError(f"{run.name} left no {metric}: add the callbacks of configs/base.yaml, or correct metric")
    return {
        "name": run.name,
        "row": run.row,
        "axes": run.axes,
        "epsilon_target": run.epsilon,
        "seed": run.seed,
        "metrics": metrics,
        "card": {key: card[key] for key in _CARD} if card else None,
        "version": version("lightning_dp"),
        "seconds": round(seconds, 2),
        "folder": str(folder),
        "arguments": list(run.arguments),
    }


def _digest(arguments: Sequence[str], files: Sequence[str]) -> str:
    digest = hashlib.blake2b("\0".join(arguments).encode(), digest_size=5)
    for file in files:
        try:
            digest.update(Path(file).read_bytes())
        except OSError as error:
            raise ConfigError(f"{file} cannot be read ({error.strerror}): correct files, or put it there") from error
    return digest.hexdigest()


def _check_unchanged(run: Run) -> None:
    if _digest(run.arguments, run.files) != run.digest:
        raise ConfigError(f"{run.name}: one of {', '.join(run.files)} changed during the comparison: start again")


def _append(path: Path, result: Result) -> None:
    """One line on the disk; a line that a crash cut off before stays alone on its own."""
    with path.open("a+b") as file:
        file.seek(0)
        torn = file.read()[-1:] not in (b"", b"\n")
        file.write((b"\n" if torn else b"") + json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


@contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Hold the results; a second comparison in the same folder would make every run twice."""
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another comparison is writing into {path.parent}: wait, or set output") from error
        yield

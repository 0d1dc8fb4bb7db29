"""Time and peak memory of one training step, over those of plain training on the same images.

    python -m benchmarks.step_time [--json] [--cases wrn cnn] [--views 1 8] [--engines ours opacus_hooks] [--repeats 5]

Times: all engines of a case in one process, interleaved; medians of process CPU time, which stands load better, and of
wall time. Both settings of the C allocator: as it comes (``time_ratio``), and with freed buffers kept in the process
(``time_ratio_kept``), which helps the engines that instantiate gradients. Memory: growth of the peak resident set over
steps, one process for each engine, with an allocator that returns freed buffers at once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.engines import ENGINES, WITH_VIEWS, make_step

_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    """Measure and print."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    if arguments.measure:
        found = _times(arguments) if arguments.measure == "time" else _memory(arguments)
        print(json.dumps(found))
        return
    if not arguments.json:
        print(
            f"{'case':8}{'views':>6}  {'engine':14}{'cpu':>7}{'wall':>7}{'cpu kept':>10}{'wall kept':>11}{'memory':>8}"
        )
    for case in arguments.cases:
        for views in arguments.views:
            for row in _rows(arguments, case, views):
                _print(row, arguments.json)


def _rows(arguments: argparse.Namespace, case: str, views: int) -> list[dict[str, Any]]:
    engines = [name for name in ENGINES if name in ("plain", *arguments.engines)]
    engines = [name for name in engines if views == 1 or name in WITH_VIEWS]
    if views > 1 and case == "probe":
        return []
    default = _child(arguments, "time", case, views, engines, {})
    kept = _child(arguments, "time", case, views, engines, _KEPT)
    memory = {name: _child(arguments, "memory", case, views, [name], _RETURNED)[name] for name in engines}
    rows = []
    for name in engines:
        (cpu, wall), (cpu_kept, wall_kept) = (
            [times[name][clock] / times["plain"][clock] for clock in (0, 1)] for times in (default, kept)
        )
        row = {"case": case, "engine": name, "views": views, "time_ratio": wall, "cpu_ratio": cpu}
        row |= {"time_ratio_kept": wall_kept, "cpu_ratio_kept": cpu_kept}
        rows.append(row | {"memory_ratio": memory[name] / memory["plain"], "memory_mb": memory[name]})
    return rows


def _print(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(rounded), flush=True)
        return
    print(
        f"{row['case']:8}{row['views']:6}  {row['engine']:14}{row['cpu_ratio']:7.2f}{row['time_ratio']:7.2f}"
        f"{row['cpu_ratio_kept']:10.2f}{row['time_ratio_kept']:11.2f}{row['memory_ratio']:8.2f}",
        flush=True,
    )


def _child(
    arguments: argparse.Namespace, measure: str, case: str, views: int, engines: list[str], settings: dict[str, str]
) -> Any:
    """One measurement in a process of its own."""
    command = [
        sys.executable, "-W", "ignore", "-m", "benchmarks.step_time", "--measure", measure, "--cases", case, "--views",
        str(views), "--repeats", str(arguments.repeats), "--threads", str(arguments.threads), "--engines", *engines,
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _times(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Medians of (CPU seconds, wall seconds) by engine."""
    case, views = CASES[arguments.cases[0]], arguments.views[0]
    steps = {name: make_step(case, name, views) for name in arguments.engines}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: [median(clock) for clock in zip(*times, strict=True)] for name, times in found.items()}


def _memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Growth of the peak resident set over three steps, MiB."""
    name = arguments.engines[0]
    step = make_step(CASES[arguments.cases[0]], name, arguments.views[0])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return {name: max(1.0, (_status("VmHWM") - before) / 1024)}


def _status(field: str) -> int:
    """A field of this process' status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time")
    parser.add_argument("--json", action="store_true", help="one JSON line per case and engine instead of a table")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 8], help="images per record")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=["time", "memory"], help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()

"""Time and peak memory of one training step, over those of plain training on the same images.

    python -m benchmarks.step_time [--json] [--cases wrn cnn] [--views 1 8] [--engines ours opacus_hooks] [--repeats 5]
    python -m benchmarks.step_time --device cuda [--cases wrn_bf16 --views 16 --engines ours]

Times: each engine in a process of its own, one step at a time in turn; medians of process CPU time, which stands load
better, and of wall time. Both settings of the C allocator: as it comes (``time_ratio``), and with freed buffers kept in
the process (``time_ratio_kept``), which helps the engines that instantiate gradients. Memory: growth of the peak
resident set over steps, one process for each engine, with an allocator that returns freed buffers at once. On a CUDA
device the times are wall times around a synchronised step, at one setting of the allocator, and the memory is the peak
that was allocated; the large cases run there only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
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
        if arguments.measure == "time":
            _take_turns(arguments)
        else:
            print(_memory(arguments))
        return
    if not arguments.json:
        print(
            f"{'case':8}{'views':>6}  {'engine':14}{'cpu':>7}{'wall':>7}{'cpu kept':>10}{'wall kept':>11}{'memory':>8}"
        )
    for case in arguments.cases or [
        name for name, case in CASES.items() if not case.cuda or arguments.device == "cuda"
    ]:
        for views in arguments.views:
            for row in _rows(arguments, case, views):
                _print(row, arguments.json)


def _rows(arguments: argparse.Namespace, case: str, views: int) -> list[dict[str, Any]]:
    engines = [name for name in ENGINES if name in ("plain", *arguments.engines)]
    engines = [name for name in engines if views == 1 or name in WITH_VIEWS]
    engines = [name for name in engines if CASES[case].opacus or not name.startswith("opacus")]
    if views > 1 and case == "probe":
        return []
    default = _interleaved(arguments, case, views, engines, {})
    kept = default if arguments.device == "cuda" else _interleaved(arguments, case, views, engines, _KEPT)
    memory = {name: _memory_apart(arguments, case, views, name) for name in engines}
    rows = []
    for name in engines:
        (cpu, wall), (cpu_kept, wall_kept) = (
            [times[name][clock] / times["plain"][clock] for clock in (0, 1)] for times in (default, kept)
        )
        row = {"case": case, "engine": name, "views": views, "time_ratio": wall, "cpu_ratio": cpu}
        row |= {"time_ratio_kept": wall_kept, "cpu_ratio_kept": cpu_kept}
        row |= {"images_per_second": CASES[case].batch * views / default[name][1]}
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


def _command(arguments: argparse.Namespace, measure: str, case: str, views: int, engine: str) -> list[str]:
    """One engine in a process of its own."""
    return [
        sys.executable, "-W", "ignore", "-m", "benchmarks.step_time", "--measure", measure, "--cases", case,
        "--views", str(views), "--threads", str(arguments.threads), "--device", arguments.device, "--engines", engine,
    ]  # fmt: skip


def _memory_apart(arguments: argparse.Namespace, case: str, views: int, engine: str) -> float:
    command = _command(arguments, "memory", case, views, engine)
    done = subprocess.run(command, env={**os.environ, **_RETURNED}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _interleaved(
    arguments: argparse.Namespace, case: str, views: int, engines: list[str], settings: dict[str, str]
) -> dict[str, list[float]]:
    """Medians of (CPU seconds, wall seconds) by engine; each waits in a process of its own for its turn."""
    with ExitStack() as running:
        workers = {
            name: running.enter_context(
                subprocess.Popen(
                    _command(arguments, "time", case, views, name),
                    env={**os.environ, **settings},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for name in engines
        }
        for name, worker in workers.items():
            if _ask(worker) != "ready":
                raise SystemExit(f"engine {name} failed on case {case}")
        times = [{name: json.loads(_ask(worker)) for name, worker in workers.items()} for _ in range(arguments.repeats)]
    return {name: [median(clock) for clock in zip(*(turn[name] for turn in times), strict=True)] for name in engines}


def _ask(worker: subprocess.Popen[str]) -> str:
    """Give a worker its turn and wait for its answer."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def _take_turns(arguments: argparse.Namespace) -> None:
    """One step a turn, timed; the first turn is for warming up."""
    step = make_step(CASES[arguments.cases[0]], arguments.engines[0], arguments.views[0], arguments.device)
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    for turn, _ in enumerate(sys.stdin):
        for _ in range(2 if turn == 0 else 0):
            step()
        wait()
        cpu, wall = time.process_time(), time.perf_counter()
        if turn:
            step()
            wait()
        print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]) if turn else "ready", flush=True)


def _memory(arguments: argparse.Namespace) -> float:
    """Growth of the peak resident set, or of the peak of a device's memory, over three steps, MiB."""
    step = make_step(CASES[arguments.cases[0]], arguments.engines[0], arguments.views[0], arguments.device)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return max(1.0, (torch.cuda.max_memory_allocated() - held) / 2**20)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return max(1.0, (_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """A field of this process' status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time")
    parser.add_argument("--json", action="store_true", help="one JSON line per case and engine instead of a table")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="all that fit the device")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 8], help="images per record")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--measure", choices=["time", "memory"], help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()

"""The table and the plot of a comparison, from its results alone."""

import csv
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""A line of ``results.jsonl``: name, row, axes, epsilon_target, seed, metrics, card (None without privacy; its "data"
says which split, pool and encoder were used), version of lightning_dp, seconds, folder, arguments."""

_COLUMNS = ("row", "epsilon target", "error %", "standard error", "n", "error increase %", "certified", "seconds")


def write_report(
    output: Path,
    results: Sequence[Result],
    rows: Sequence[str],
    metric: str,
    paragon: str | None,
    only_public: str | None,
) -> None:
    """Write ``table.csv``, ``table.md`` and ``plot.png`` into ``output``."""
    table = summarise(results, rows, metric, paragon)
    with (output / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    (output / "table.md").write_text(to_markdown(table, metric, paragon), encoding="utf-8")
    save_plot(table, output / "plot.png", [name for name in (paragon, only_public) if name is not None], paragon)


def summarise(results: Sequence[Result], rows: Sequence[str], metric: str, paragon: str | None) -> list[dict[str, Any]]:
    """One line per place of the axes, row and epsilon: the keys of the axes, then those of the table's columns.

    ``error %`` is 100 (1 - metric), the mean over seeds; ``standard error`` is of that mean (None for one seed);
    ``error increase %`` is 100 (error / paragon's mean error - 1) at the same place of the axes; ``seconds`` is the
    mean time of a whole process. Values without meaning are None.
    """

    def group(result: Result) -> tuple[Any, ...]:
        axes = tuple(sorted(result["axes"].items()))
        return (axes, rows.index(result["row"]), result["epsilon_target"] or 0.0)

    table: list[dict[str, Any]] = []
    for (axes, row, epsilon), members in itertools.groupby(sorted(results, key=group), key=group):
        runs = list(members)
        errors = [100 * (1 - run["metrics"][metric]) for run in runs]
        spread = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
        values = (
            rows[row], epsilon or None, statistics.fmean(errors), spread, len(runs), None, certified(runs),
            statistics.fmean(run["seconds"] for run in runs),
        )  # fmt: skip
        table.append({**dict(axes), **dict(zip(_COLUMNS, values, strict=True))})
    for line in table:
        line["error increase %"] = _increase(line, table, paragon)
    return table


def certified(runs: Sequence[Result]) -> str:
    """The largest epsilon on the runs' cards, with all that it needs to mean something."""
    cards = [run["card"] for run in runs]
    if None in cards or any(card["epsilon"] is None for card in cards):
        return "no guarantee"
    card = max(cards, key=lambda each: each["epsilon"])
    seeded = ", NOT FOR RELEASE (fixed seed)" if any("NOT FOR RELEASE" in each["rng"] for each in cards) else ""
    means = f"delta {card['delta']:g}, {card['adjacency']} one {card['unit']}, {card['accountant']}"
    return f"epsilon {card['epsilon']:.4g} at {means}{seeded}"


def to_markdown(table: Sequence[dict[str, Any]], metric: str, paragon: str | None) -> str:
    """The table for people, and what its columns mean."""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in line.values()) + " |" for line in table]
    notes = f"error % is 100 (1 - {metric}), mean over n seeds; seconds are those of a whole process."
    if paragon is not None:
        notes += f" error increase % is relative to the mean error of {paragon}."
    return "\n".join([*lines, "", notes]) + "\n"


def save_plot(table: Sequence[dict[str, Any]], path: Path, reference: Sequence[str], paragon: str | None) -> None:
    """Error, and error increase over the paragon if there is one, by epsilon; one column per place of the axes."""
    from matplotlib.figure import Figure

    quantities = ["error %"] if paragon is None else ["error %", "error increase %"]
    places = list(dict.fromkeys(_place(line) for line in table))
    figure = Figure(figsize=(5 * len(places) + 2, 3.5 * len(quantities)), layout="constrained")
    panels = figure.subplots(len(quantities), len(places), squeeze=False)
    for (y, quantity), (x, place) in itertools.product(enumerate(quantities), enumerate(places)):
        axes = panels[y][x]
        _panel(
            axes, [line for line in table if _place(line) == place and line[quantity] is not None], quantity, reference
        )
        axes.set(xlabel="epsilon (target)", ylabel=quantity, title=", ".join(place))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(path, dpi=120)


def _panel(axes: Any, lines: Sequence[dict[str, Any]], quantity: str, reference: Sequence[str]) -> None:
    """Rows with a budget as points over epsilon, rows without one as level lines (dashed if they are a reference)."""
    ticks = sorted({line["epsilon target"] for line in lines if line["epsilon target"] is not None})
    for i, name in enumerate(dict.fromkeys(line["row"] for line in lines)):
        mine, colour = [line for line in lines if line["row"] == name], f"C{i % 10}"
        if mine[0]["epsilon target"] is None:
            axes.axhline(mine[0][quantity], color=colour, linestyle="--" if name in reference else ":", label=name)
            continue
        bars = [(line["standard error"] or 0.0) if quantity == "error %" else 0.0 for line in mine]
        where = [ticks.index(line["epsilon target"]) for line in mine]
        axes.errorbar(where, [line[quantity] for line in mine], bars, color=colour, marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])


def _increase(line: dict[str, Any], table: Sequence[dict[str, Any]], paragon: str | None) -> float | None:
    base = [other["error %"] for other in table if other["row"] == paragon and _place(other) == _place(line)]
    return 100 * (line["error %"] / base[0] - 1) if base and base[0] > 0 else None


def _place(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(value) for key, value in line.items() if key not in _COLUMNS)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)

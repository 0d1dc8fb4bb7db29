"""``lightning-dp ledger``: what all runs on the private data sets have cost together."""

import math
import os
from pathlib import Path

from lightning_dp.errors import ConfigError
from lightning_dp.privacy import epsilon
from lightning_dp.privacy.accounting import Adjacency
from lightning_dp.privacy.dataset_ledger import DatasetLedger, whole


def ledger(root: Path = Path("data"), delta: float = 1e-5, adjacency: Adjacency = "add_remove") -> None:
    """Print every run on every private data set below a root, and the epsilon of all of them together.

    A run that did not go to its end counts with all that it planned. Runs on any split of a data set count together, as
    their private records overlap.

    Args:
        root: folder that holds all data sets; the environment variables LIGHTNING_DP_DATA (for it) and
            LIGHTNING_DP_LEDGER (for the ledgers' own folder), if set, replace it.
        delta: of the totals.
        adjacency: of the totals.

    Raises:
        ConfigError: there is no ledger, or one cannot be read.
    """
    folder = Path(os.environ.get("LIGHTNING_DP_LEDGER", Path(os.environ.get("LIGHTNING_DP_DATA", root)) / ".ledger"))
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ConfigError(f"{folder} holds no dataset ledger: no private run was made, or --root is another folder")
    print("\n".join(_table(DatasetLedger(file), delta, adjacency) for file in files))


def _table(found: DatasetLedger, delta: float, adjacency: Adjacency) -> str:
    lines = [f"{found.path.stem}:", "", "| began | method | run | releases | epsilon alone |", "|---|---|---|---|---|"]
    for run in found.runs():
        releases = run.releases()
        count = sum(release.count for release in releases)
        alone = epsilon(whole(releases), delta, adjacency)
        note = "" if run.ended else " planned; has not ended"
        lines.append(f"| {run.began} | {run.method} | {run.run[:8]} | {count}{note} | {alone:.4g} |")
    total = found.epsilon(delta, adjacency)
    lines += ["", f"all together: epsilon {total:.4g} at delta {delta:g}, {adjacency}, accountant pld"]
    if math.isinf(total):
        lines.append("(a run without noise has no guarantee, and so has no total that contains it)")
    return "\n".join(lines) + "\n"

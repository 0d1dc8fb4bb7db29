"""What the pages show runs, and what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/add_a_method.md"])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": "__main__"})
    # The block of docs/add_a_method.md asserts its three releases itself, in a folder of its own.
    assert list(tmp_path.glob("**/ledger*.jsonl")) or page != "README.md"


def test_every_test_named_in_the_docs_exists():
    named = {name for page in PAGES for name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())}
    assert named
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert not missing


def test_every_file_named_in_the_docs_exists():
    named = {
        name for page in PAGES for name in re.findall(r"\b(?:configs|tests)/[\w/]+\.(?:yaml|py)\b", page.read_text())
    }
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]

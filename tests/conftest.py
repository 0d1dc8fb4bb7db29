"""Fixtures of all tests."""

import pytest


@pytest.fixture(autouse=True)
def no_ledger_beside_real_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of tests are written down in a folder of their own, whatever data they read."""
    monkeypatch.setenv("LIGHTNING_DP_LEDGER", str(tmp_path_factory.mktemp("ledgers")))

import pytest


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)

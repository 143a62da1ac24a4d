"""The manager's benchmark on a round small enough for a test: that it measures what it says, not what the figures are."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hpcft.campaign import decide

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_goes_through_a_round_and_asks_the_scheduler_no_more_than_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    manager = importlib.import_module("manager")
    monkeypatch.setattr(manager, "REPEATS", 1)
    monkeypatch.setattr(decide, "GONE_S", 0.0)
    found = manager.measure_large_round(tmp_path, items=120, tasks=40)
    assert all(value > 0 for value in found.values())
    assert found["scheduler_calls_per_step"] == 2
    assert found["scheduler_calls_per_usual_step"] == 1
    label = tmp_path / "large" / "round-001" / "label"
    assert (label / "history.zip").exists()
    assert len((label / "results.jsonl").read_text().splitlines()) == 40

"""The benchmark of molecular dynamics on a tiny model: that it measures what it says, not what the figures are."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "md.py"


@pytest.fixture
def md(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("md")


def measured(tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The figures in the file, and the tables."""
    found = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(found), *options]
    tables = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    return json.loads(found.read_text()), tables


def check_rows(found: dict[str, Any]) -> None:
    """One of each engine for each batch; shares lie between none and all, and all else is positive."""
    batches = found["settings"]["batches"]
    wanted = {(name, b["num_replicas"], 32) for b in batches for name in ("hpcft", "ase")}
    rows = found["rows"]
    assert len(rows) == len(wanted)
    assert {(row["engine"], row["num_replicas"], row["num_atoms"]) for row in rows} == wanted
    for row in rows:
        assert row["version"].startswith(row["engine"])
        assert 0 < row["outside_model_share"] <= row["outside_network_share"] < 1
        assert row["forces_rel_diff"] < 1e-4
        for name in ("us_per_atom_step", "cpu_us_per_atom_step", "times_hpcft", "temperature_K"):
            low, high = row[f"{name}_range"]
            assert 0 < low <= row[name] <= high < math.inf
        if row["engine"] == "hpcft":
            assert math.isfinite(row["outside_bare_share"])
            assert row["times_hpcft"] == 1


def check_files(found: dict[str, Any]) -> None:
    speeds = ("write_MB_per_s", "plain_MB_per_s", "random_frames_per_s", "ordered_frames_per_s")
    for name in (
        *speeds,
        "write_seconds",
        "write_share_mace",
        "consolidation_cpu_share",
        "random_times_ordered",
        "random_cpu_times_ordered",
    ):
        assert 0 < found[name] < math.inf
    # Two runs beside each other: on a busy machine, the one that writes may be the faster.
    assert -1 < found["write_share"] < math.inf


@pytest.mark.nightly
def test_both_engines_move_the_same_and_what_was_not_run_is_absent(tmp_path: Path) -> None:
    found, tables = measured(tmp_path, "--only", "engines", "write", "read")
    check_rows(found)
    check_files(found)
    assert "torch-sim was not run" in tables
    assert "frames per s, at random" in tables
    assert not [name for name in found if name.startswith("rank_")]


def test_ratios_are_of_the_two_runs_of_a_round_and_times_of_an_atoms_step(md: Any) -> None:
    def ran(seconds: float, inside: float) -> Any:
        return md.Ran(seconds, seconds / 2, inside, inside / 2, temperature_K=600.0)

    rounds = [{"hpcft": ran(1.0, 0.9), "ase": ran(2.0, 1.0)}, {"hpcft": ran(4.0, 3.0), "ase": ran(16.0, 8.0)}]
    row = md.row_of("ase", md.Batch(10, (1, 1, 1), 100), rounds)
    assert row["num_atoms"] == 4
    assert row["us_per_atom_step_range"] == pytest.approx([500.0, 4000.0])
    assert row["times_hpcft"] == row["cpu_times_hpcft"] == 3.0
    assert row["times_hpcft_range"] == [2.0, 4.0]
    assert row["outside_model_share"] == 0.5
    assert row["outside_network_share"] == 0.75
    assert "outside_bare_share" not in row


def test_a_replica_that_was_stopped_leaves_nothing_to_compare(md: Any) -> None:
    stretch = md.Stretch(30, 10, 1)
    md.check_ends({"0000": {"stopped": "", "step": 30}}, stretch)
    with pytest.raises(SystemExit, match=r"0001.*temperature"):
        md.check_ends({"0001": {"stopped": "temperature", "step": 12}}, stretch)
    with pytest.raises(SystemExit, match="ase has exploded"):
        md.check_temperatures("1 × 32 atoms", {"ase": md.Ran(1.0, 1.0, 0.5, 0.5, float("nan"))})


@pytest.mark.nightly
def test_the_benchmark_runs_on_one_rank_and_on_two(tmp_path: Path) -> None:
    found, tables = measured(tmp_path)
    check_rows(found)
    check_files(found)
    assert "2 ranks, times as fast" in tables
    for name in ("rank_seconds_1", "rank_seconds_2", "rank_speedup_2", "rank_cpu_speedup_2"):
        assert 0 < found[name] < math.inf

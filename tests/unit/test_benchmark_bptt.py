"""The benchmark of the gradient engines on a tiny model: that it measures what it says, not what the figures are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bptt.py"


@pytest.mark.nightly
def test_the_benchmark_measures_every_engine_and_that_they_agree(tmp_path: Path) -> None:
    found = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(found)]
    table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "finite-difference" in table
    rows = json.loads(found.read_text())
    assert {"engine", "map", "k", "peak_mib", "seconds", "grad_rel_diff"} <= rows[0].keys()
    measured = {(row["engine"], row["map"], row["k"]): row for row in rows}
    for map, k in [("heavy ball", 5), ("heavy ball", 20), ("plain", 5), ("FIRE", 5)]:
        assert measured["plain", map, k]["grad_rel_diff"] is None
        for engine, bound in (("checkpoint", 1e-10), ("adjoint", 1e-10), ("finite-difference", 1e-6)):
            row = measured[engine, map, k]
            assert row["seconds"] > 0
            assert row["grad_rel_diff"] < bound
    plain, adjoint = measured["plain", "heavy ball", 20], measured["adjoint", "heavy ball", 20]
    assert adjoint["peak_mib"] < 0.5 * plain["peak_mib"]

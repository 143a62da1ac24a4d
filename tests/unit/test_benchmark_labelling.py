"""The benchmark of labelling on little of everything: that it measures what it says, not what the figures are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "labelling.py"


@pytest.mark.nightly
def test_every_figure_is_measured_and_written(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    table = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(found)],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    figures = json.loads(found.read_text())
    assert figures["quick"] is True
    assert figures["index_lookup_million_s"] > 0
    assert figures["index_lookup_hundred_ms"] > 0
    assert figures["overhead_ms_per_label"] < figures["bare_ms_espresso"]
    assert figures["worker_speedup_2"] > 0
    assert figures["labels_per_second"] > 0
    assert (figures["num_labels"], figures["files_per_task"]) == (1000, 3)
    assert figures["kills"] == 3
    assert (figures["lost"], figures["duplicated"]) == (0, 0)
    assert "index_lookup_million_s" in table

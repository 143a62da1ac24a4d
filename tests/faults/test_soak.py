"""Five minutes of everything at once; an hour of it is `make soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.nightly]


def test_campaigns_among_failing_tasks_nodes_daemons_and_managers_end_as_if_nothing_had_happened() -> None:
    soak = Path(__file__).parents[1] / "soak.py"
    done = subprocess.run([sys.executable, str(soak), "--minutes", "5", "--size", "small"], check=False)
    assert done.returncode == 0

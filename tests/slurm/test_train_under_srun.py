"""hpcft train under a real srun: the ranks find each other across nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from train_command import command, write_files

pytestmark = pytest.mark.slurm


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "valid/loss", "gradient_norm")]


def test_two_nodes_train_as_one_process_does(slurm_cluster: Any, tmp_path: Path) -> None:
    """One rank on each node, without --ntasks-per-node: fails if each trains alone."""
    write_files(tmp_path)
    environment = {**slurm_cluster.environment(), "OMP_NUM_THREADS": "1"}
    srun = ["srun", "-p", "cpu", "-N", "2", "-n", "2", "-c", "1", "--chdir", str(tmp_path)]
    done = subprocess.run(
        [*srun, *command()], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    across = losses(tmp_path)
    shutil.rmtree(tmp_path / "out")
    subprocess.run(
        command(), cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )
    assert across == pytest.approx(losses(tmp_path), rel=1e-10)

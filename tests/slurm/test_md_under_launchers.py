"""hpcft md under a real srun across two nodes, and under a real mpirun: the trajectories of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write

from hpcft.models.files import save_model
from hpcft.models.morse import MorsePotential
from hpcft.storage.trajectory import Trajectory

pytestmark = pytest.mark.slurm

COMMAND = (
    sys.executable, "-m", "hpcft", "md", "in.extxyz", "--model", "morse.pt", "--steps", "20", "--frame-every", "5",
    "--segment-frames", "2", "--copies", "2", "--precision", "float64",
)  # fmt: skip
MPIRUN = ("mpirun", "--mca", "ras", "^slurm", "--mca", "plm", "^slurm", "--oversubscribe", "-n", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the trajectory of one process in `alone`."""
    save_model(tmp_path / "morse.pt", MorsePotential([29], cutoff=4.0, length=2.6).double())
    crystal = bulk("Cu", a=3.6, cubic=True)
    write(tmp_path / "in.extxyz", [crystal, crystal.repeat((2, 1, 1))])
    run(tmp_path, {}, *COMMAND, "-o", "alone")
    return tmp_path


def run(folder: Path, environment: dict[str, str], *command: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_same(folder: Path, output: str) -> None:
    """Two ranks have written a file each, and together they are what one process wrote, to rounding."""
    names = {path.name for path in (folder / output).glob("*.h5")}
    assert names == {"rank-0000.h5", "rank-0001.h5", "trajectory.h5"}
    for rank in (0, 1):
        with Trajectory(folder / output / f"rank-{rank:04d}.h5") as own:
            assert len(own.replicas) == 2
    with (
        Trajectory(folder / "alone" / "trajectory.h5") as one,
        Trajectory(folder / output / "trajectory.h5") as two,
    ):
        assert one.replicas == two.replicas == [0, 1, 2, 3]
        assert one.checkpoint().keys() == two.checkpoint().keys()
        for replica in one.replicas:
            for name in ("step", "positions", "velocities", "forces"):
                expected, found = one.array(replica, name), two.array(replica, name)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8, err_msg=f"{replica} {name}")


def test_two_nodes_under_srun_run_the_trajectories_of_one_process(slurm_cluster: Any, folder: Path) -> None:
    """Fails if each node takes itself for the only one, or if replicas are dealt out twice."""
    srun = (
        "srun",
        "-p",
        "cpu",
        "-N",
        "2",
        "-n",
        "2",
        "-c",
        "1",
        "--kill-on-bad-exit",
        "--chdir",
        str(folder),
    )
    run(folder, slurm_cluster.environment(), *srun, *COMMAND, "-o", "both")
    check_same(folder, "both")


def test_two_ranks_under_mpirun_run_the_trajectories_of_one_process(folder: Path) -> None:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    run(folder, root, *MPIRUN, *COMMAND, "-o", "both")
    check_same(folder, "both")

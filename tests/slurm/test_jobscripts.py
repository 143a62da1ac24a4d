"""The scripts that run inside jobs, inside real jobs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

MPI_HERE = Path(__file__).parents[2] / "jobscripts" / "mpi-here"

SILICON = """&control
 calculation='scf', pseudo_dir='/usr/share/espresso/pseudo', outdir='{folder}/scratch'
/
&system
 ibrav=2, celldm(1)=10.2, nat=2, ntyp=1, ecutwfc=12
/
&electrons
/
ATOMIC_SPECIES
 Si 28.086 Si.pz-vbc.UPF
ATOMIC_POSITIONS alat
 Si 0.00 0.00 0.00
 Si 0.25 0.25 0.25
K_POINTS gamma
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_quantum_espresso_runs_inside_a_slurm_step_through_mpi_here(
    ranks: int, slurm_cluster: Any, tmp_path: Path
) -> None:
    (tmp_path / "si.in").write_text(SILICON.format(folder=tmp_path))
    command = ["srun", "-p", "cpu", "-n", "1", "-c", str(ranks), "--chdir", str(tmp_path)]
    command += [str(MPI_HERE), str(ranks), "pw.x", "-in", "si.in"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=slurm_cluster.environment(), check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "convergence has been achieved" in done.stdout


def test_mpi_here_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    for arguments, words in (
        (["0", "true"], "whole number"),
        (["2"], "usage"),
        (["1", "no-such-program"], "PATH"),
    ):
        done = subprocess.run([MPI_HERE, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (2, 127)
        assert words in done.stderr

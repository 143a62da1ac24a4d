"""The scripts that run inside jobs, inside real jobs."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import submitit

from hpcft.config.site import JOBSCRIPTS, Site

pytestmark = pytest.mark.slurm

MPI_HERE = JOBSCRIPTS / "mpi-here"
BIND_RANK = JOBSCRIPTS / "bind-rank"

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


def test_ranks_stay_on_the_cores_that_their_calculation_was_given() -> None:
    """Two calculations side by side on the same core would take twice as long."""
    core = max(os.sched_getaffinity(0))
    show = ["grep", "Cpus_allowed_list", "/proc/self/status"]
    command = ["taskset", "-c", str(core), str(MPI_HERE), "2", *show]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == [str(core)] * 2


def test_mpi_here_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    for arguments, words in (
        (["0", "true"], "whole number"),
        (["2"], "usage"),
        (["1", "no-such-program"], "PATH"),
    ):
        done = subprocess.run([MPI_HERE, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (2, 127)
        assert words in done.stderr


def srun(cluster: Any, folder: Path, *arguments: str) -> list[str]:
    """The lines, in order of the ranks, that a step of bind-rank prints."""
    command = ["srun", "--label", "--partition=gpu", "--nodes=1", "--chdir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.environment(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split(": ", 1)[1] for line in sorted(done.stdout.splitlines())]


GPUS = [str(BIND_RANK), "bash", "-c", 'echo "$CUDA_VISIBLE_DEVICES"']
CORES = [str(BIND_RANK), "python3", "-c", "import os; print(*sorted(os.sched_getaffinity(0)))"]


def test_ranks_of_a_job_get_one_of_its_gpus_each(slurm_cluster: Any, tmp_path: Path) -> None:
    assert srun(slurm_cluster, tmp_path, "-n4", "--gpus-per-node=4", *GPUS) == ["0", "1", "2", "3"]
    assert srun(slurm_cluster, tmp_path, "-n2", "--gres=gpu:4", *GPUS) == ["0,1", "2,3"]
    assert srun(slurm_cluster, tmp_path, "-n1", "--gres=gpu:2", *GPUS) == ["0,1"]


def sbatch(cluster: Any, command: str, *arguments: str) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable", "--output=/dev/null", *arguments, "--wrap", command],
        capture_output=True,
        text=True,
        env=cluster.environment(),
        check=True,
    )
    return done.stdout.strip()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120  # only a hang would reach it
    while not holds():
        assert time.monotonic() < deadline, f"not within two minutes: {what}"
        time.sleep(0.2)


def test_ranks_take_the_gpus_that_slurm_has_given_to_their_job(slurm_cluster: Any, tmp_path: Path) -> None:
    environment = slurm_cluster.environment()
    started = tmp_path / "started"
    wrapped = f"touch {started}; sleep 120"
    other = sbatch(slurm_cluster, wrapped, "--partition=gpu", "--nodelist=n3", "--gres=gpu:2")
    try:
        wait_until(started.exists, f"job {other} runs")
        assert srun(slurm_cluster, tmp_path, "-w", "n3", "-n2", "--gres=gpu:2", *GPUS) == ["2", "3"]
    finally:
        subprocess.run(["scancel", other], env=environment, check=True)


def test_a_cancelled_job_leaves_nothing_on_the_nodes_disk(slurm_cluster: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [
        str(JOBSCRIPTS / "node-scratch"),
        "--in",
        str(disk),
        "bash",
        "-c",
        'touch "$TMPDIR/x"; sleep 300',
    ]
    job = sbatch(slurm_cluster, f"srun {shlex.join(words)}", "--partition=cpu")
    wait_until(lambda: bool(list(disk.glob("*/x"))), f"job {job} has its folder")
    subprocess.run(["scancel", job], env=slurm_cluster.environment(), check=True)
    wait_until(lambda: not list(disk.iterdir()), f"the folder of job {job} is gone")


def test_ranks_of_a_job_get_cores_of_their_own_where_the_host_has_enough(
    slurm_cluster: Any, tmp_path: Path
) -> None:
    """The virtual nodes do not bind to cores, so that every rank sees all cores of the real host."""
    host = os.sched_getaffinity(0)
    first, second = (set(line.split()) for line in srun(slurm_cluster, tmp_path, "-n2", "-c1", *CORES))
    if len(host) < 2:
        pytest.skip("two cores are needed")
    assert len(first) == len(second) == 1
    assert first.isdisjoint(second)


def test_submitit_starts_each_rank_through_the_words_of_a_sites_python(
    slurm_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Apptainer on PATH, which Debian 12 does not have: it runs the command after the image."""
    for name, value in slurm_cluster.environment().items():
        monkeypatch.setenv(name, value)
    programs, scratch = tmp_path / "bin", tmp_path / "node disk"
    programs.mkdir()
    scratch.mkdir()
    runtime = programs / "apptainer"
    runtime.write_text(
        '#!/usr/bin/env bash\nwhile [ "$1" != image.sif ]; do shift; done\nexport INSIDE=$1; shift; exec "$@"\n'
    )
    runtime.chmod(0o755)
    (tmp_path / "image.sif").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    site = Site.model_validate(
        {
            "name": "wrapped",
            "executor": "slurm",
            "slurm": {"partition": "gpu"},
            "python": [
                "{jobscripts}/bind-rank",
                *("{jobscripts}/node-scratch", "--in", str(scratch)),
                *("{jobscripts}/in-container", "--bind", str(scratch), "image.sif"),
                "{python}",
            ],
        }
    )

    def seen() -> list[str]:
        import os

        names = ("SLURM_PROCID", "CUDA_VISIBLE_DEVICES", "INSIDE", "TMPDIR")
        return [os.environ[name] for name in names]

    executor = submitit.SlurmExecutor(tmp_path / "submission", python=shlex.join(site.python))
    executor.update_parameters(
        partition="gpu", nodes=1, ntasks_per_node=2, gpus_per_node=2, time=5, wckey=None, srun_args=["-c1"]
    )
    results = executor.submit(seen).results()
    assert [result[:3] for result in results] == [["0", "0", "image.sif"], ["1", "1", "image.sif"]]
    folders = {Path(result[3]) for result in results}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {scratch}
    deadline = time.monotonic() + 60
    while (
        list(scratch.iterdir()) and time.monotonic() < deadline
    ):  # the results are there before the job has cleared up
        time.sleep(0.1)
    assert list(scratch.iterdir()) == []

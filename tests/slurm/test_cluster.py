"""The test cluster itself: what the other tests in this folder rely on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

DEADLINE_S = 300

Submit = Callable[..., str]


def output_of(*argv: str, stdin: str = "") -> str:
    """What a command prints; when it fails, an AssertionError with its own words."""
    done = subprocess.run(argv, check=False, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv} exited with {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return once the condition holds; the deadline is for a cluster that hangs, not for a slow one."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            queue, history = output_of("squeue", "-l"), output_of("sacct", "-X")
            pytest.fail(f"not so after {DEADLINE_S} s: {what}\n{queue}\n{history}")
        time.sleep(0.2)


def accounted(job: str) -> list[str]:
    """State and exit code of a job (of each element, if it is an array), as accounting has them."""
    return output_of("sacct", "-nPX", "-j", job, "-o", "State,ExitCode").splitlines()


def wait_until_accounted(job: str, expected: list[str]) -> None:
    wait_until(lambda: accounted(job) == expected, f"sacct says {expected} of job {job}")


@pytest.fixture
def submit(slurm_cluster: object, tmp_path: Path) -> Iterator[Submit]:
    """Submits a script, with options for sbatch, and returns the job's id.

    Output goes to tmp_path/ID.out (ID_INDEX.out for an array).  Jobs left after the test are cancelled.
    """
    jobs = []

    def submit(script: str, *options: str) -> str:
        name = "%A_%a.out" if any(option.startswith("--array") for option in options) else "%j.out"
        argv = ["sbatch", "--parsable", f"--output={tmp_path / name}", f"--chdir={tmp_path}", *options]
        jobs.append(output_of(*argv, stdin=f"#!/bin/bash\n{script}\n"))
        return jobs[-1]

    yield submit
    if jobs:
        output_of("scancel", *jobs)


@pytest.mark.usefixtures("slurm_cluster")
def test_the_cluster_has_four_nodes_of_which_two_have_four_gpus() -> None:
    nodes = output_of("sinfo", "-hN", "-p", "preempt", "-o", "%N %c %G").splitlines()
    assert nodes == ["n1 4 (null)", "n2 4 (null)", "n3 4 gpu:4", "n4 4 gpu:4"]


def test_what_a_job_prints_comes_back(submit: Submit, tmp_path: Path) -> None:
    job = submit('echo "$SLURM_JOB_ID on $SLURMD_NODENAME"', "--nodelist=n2")
    wait_until_accounted(job, ["COMPLETED|0:0"])
    assert (tmp_path / f"{job}.out").read_text() == f"{job} on n2\n"


def test_accounting_knows_the_exit_code_of_a_job_that_failed(submit: Submit) -> None:
    wait_until_accounted(submit("exit 7"), ["FAILED|7:0"])


def test_each_element_of_an_array_gets_a_gpu_of_its_own(submit: Submit, tmp_path: Path) -> None:
    # Each waits for the others, so that all four hold their GPUs at the same time.
    script = """
        touch "started.$SLURM_ARRAY_TASK_ID"
        until [ "$(ls started.* | wc -l)" = 4 ]; do sleep 0.2; done
        echo "$CUDA_VISIBLE_DEVICES"
    """
    job = submit(script, "--array=0-3", "--partition=gpu", "--nodelist=n3", "--gres=gpu:1")
    wait_until_accounted(job, ["COMPLETED|0:0"] * 4)
    devices = [(tmp_path / f"{job}_{index}.out").read_text().strip() for index in range(4)]
    assert sorted(devices) == ["0", "1", "2", "3"]


def test_an_mpi_program_spans_two_nodes(submit: Submit, tmp_path: Path) -> None:
    program = "import os, mpi4py.MPI as M; print(M.COMM_WORLD.allgather(os.environ['SLURMD_NODENAME']))"
    job = submit(f'srun --mpi=pmix {sys.executable} -c "{program}"', "--nodes=2", "--ntasks=2")
    wait_until_accounted(job, ["COMPLETED|0:0"])
    assert (tmp_path / f"{job}.out").read_text() == "['n1', 'n2']\n" * 2


def test_a_preempted_job_runs_again_after_the_job_that_preempted_it(submit: Submit, tmp_path: Path) -> None:
    script = """
        if [ -z "$SLURM_RESTART_COUNT" ]; then touch started; sleep 600; fi
        echo "restarts: $SLURM_RESTART_COUNT"
    """
    preempted = submit(script, "--partition=preempt", "--nodelist=n1", "--exclusive", "--time=30")
    wait_until((tmp_path / "started").exists, f"job {preempted} has started")
    urgent = submit("true", "--partition=cpu", "--nodelist=n1", "--exclusive")
    wait_until_accounted(urgent, ["COMPLETED|0:0"])
    wait_until_accounted(preempted, ["COMPLETED|0:0"])
    assert (tmp_path / f"{preempted}.out").read_text() == "restarts: 1\n"

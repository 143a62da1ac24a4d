"""Slurm as seen by its own commands: argv lists, never a shell string."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcft.errors import SchedulerUnavailable

Run = Callable[[Sequence[str]], str]

# Jobs in these states are over; every other state, unknown ones included, means that the job may still run.
_FINAL = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "DEADLINE",
        "BOOT_FAIL",
        "REVOKED",
    }
)


def run_command(argv: Sequence[str]) -> str:
    """The command's standard output; SchedulerUnavailable when it fails or hangs, for a failure says nothing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerUnavailable(f"{argv[0]} gave no answer: {error}") from error
    if done.returncode != 0:
        raise SchedulerUnavailable(f"{' '.join(argv[:3])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


@dataclass(frozen=True)
class QueuedJob:
    """One line of the queue. `job_id` is ARRAY_INDEX for an array's element."""

    job_id: str
    name: str
    state: str
    reason: str

    @property
    def is_held(self) -> bool:
        return self.state == "PENDING" and self.reason == "JobHeldUser"


def queue(name_prefix: str, run: Run = run_command) -> list[QueuedJob]:
    """This user's jobs that are not over and whose name begins with `name_prefix`, an entry per array element."""
    output = run(["squeue", "--me", "--noheader", "--array", "--format=%i|%j|%T|%r"])
    jobs = []
    for line in output.splitlines():
        # Other jobs of this user may have any name, with line breaks too; ours has none of these characters.
        job_id, _, rest = line.strip().partition("|")
        name, _, rest = rest.partition("|")
        state, _, reason = rest.partition("|")
        if name.startswith(name_prefix) and state not in _FINAL:
            jobs.append(QueuedJob(job_id, name, state, reason))
    return jobs


def release(job_ids: Sequence[str], run: Run = run_command) -> None:
    """Let held jobs start; an array by its base id."""
    run(["scontrol", "release", *sorted({job_id.split("_")[0] for job_id in job_ids})])


def cancel(job_ids: Sequence[str], run: Run = run_command) -> None:
    run(["scancel", *sorted({job_id.split("_")[0] for job_id in job_ids})])

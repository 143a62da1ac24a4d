"""Slurm as seen by its own commands: argv lists, never a shell string."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hpcft.errors import SchedulerUnavailable

Run = Callable[[Sequence[str]], str]

# Jobs in these states are over; every other state, unknown ones included, means that the job may still run.
FINAL_STATES = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "OUT_OF_MEMORY",
        "DEADLINE",
        "BOOT_FAIL",
        "REVOKED",
    }
)
# A job that waits for one of these waits for ever, or until somebody changes it.
HOPELESS_REASONS = frozenset(
    {
        "AccountNotAllowed",
        "BadConstraints",
        "DependencyNeverSatisfied",
        "InvalidAccount",
        "InvalidQOS",
        "JobHeldAdmin",
        "MaxMemPerLimit",
        "PartitionConfig",
        "PartitionInactive",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "QOSNotAllowed",
        "AssocMaxWallDurationPerJobLimit",
        "QOSMaxWallDurationPerJobLimit",
        "job_requeued_in_held_state",
        "launch_failed_requeued_held",
    }
)
COMMAND_TIMEOUT_S = 60.0


def run_command(argv: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """The command's standard output; SchedulerUnavailable when it fails or hangs, for a failure says nothing."""
    # A user's SQUEUE_PARTITION would hide jobs from us, which then would count as lost.
    personal = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SLURM_TIME_FORMAT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(personal)}
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerUnavailable(f"{argv[0]} gave no answer: {error}") from error
    if done.returncode != 0:
        raise SchedulerUnavailable(f"{' '.join(argv[:3])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


@dataclass(frozen=True)
class QueuedJob:
    """One line of the queue. `job_id` is ARRAY_INDEX for an array's element; `node` may be a list of nodes."""

    job_id: str
    name: str
    state: str
    reason: str
    node: str = ""
    account: str = ""
    qos: str = ""

    @property
    def is_held(self) -> bool:
        return self.state == "PENDING" and self.reason == "JobHeldUser"

    @property
    def is_over(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def is_running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


def queue(name_prefix: str, run: Run = run_command) -> list[QueuedJob]:
    """This user's jobs whose name begins with `name_prefix`, an entry per array element; those that have just ended too.

    Slurm keeps ended jobs for a while (MinJobAge), whether or not the site has accounting.
    """
    output = run(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%j|%T|%r|%N|%a|%q"])
    jobs = []
    for line in output.splitlines():
        # Other jobs of this user may have any name, with line breaks too; ours has none of these characters.
        job_id, _, rest = line.strip().partition("|")
        name, _, rest = rest.partition("|")
        state, _, rest = rest.partition("|")
        reason, node, account, qos = (rest.split("|") + [""] * 4)[:4]
        if name.startswith(name_prefix):
            jobs.append(QueuedJob(job_id, name, state, reason, node, account, qos))
    return jobs


@dataclass(frozen=True)
class AccountedJob:
    """What accounting knows of a job that is over. `states` are those of the job and of its steps."""

    job_id: str
    name: str
    state: str
    step_states: frozenset[str]
    exit_code: str
    node: str
    memory_GB: float | None


def accounting(job_ids: Iterable[str], run: Run = run_command) -> dict[str, AccountedJob]:
    """Jobs by id, as far as accounting knows them by now; it lags some seconds behind.

    Raises SchedulerUnavailable where there is no accounting, or it does not answer.
    """
    arrays = sorted({job_id.split("_")[0] for job_id in job_ids})
    fields = "JobID,JobName,State,ExitCode,NodeList,ReqMem"
    output = run(["sacct", "--noheader", "--parsable2", f"--format={fields}", f"--jobs={','.join(arrays)}"])
    jobs: dict[str, AccountedJob] = {}
    for line in output.splitlines():
        words = line.split("|")
        if len(words) != 6:
            continue
        job_id, _, step = words[0].partition(".")
        state = (words[2].split() or [""])[0]  # "CANCELLED by 1000"
        if not step:
            jobs[job_id] = AccountedJob(
                job_id, words[1], state, frozenset(), words[3], words[4], _gigabytes(words[5])
            )
        elif job_id in jobs:
            known = jobs[job_id]
            states = known.step_states | {state}
            jobs[job_id] = AccountedJob(**{**vars(known), "step_states": states})
    return jobs


def _gigabytes(text: str) -> float | None:
    """ReqMem such as 500M, 4G or, from older versions, 4Gn and 500Mc; None where it is for each core or unreadable."""
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    number, unit = text.rstrip("n")[:-1], text.rstrip("n")[-1:]
    try:
        return float(number) * units[unit] or None
    except (ValueError, KeyError):
        return None


def job_is_over(job_id: str, run: Run = run_command) -> bool:
    """Whether Slurm says that a job has ended, or knows it no more; False while it does not answer."""
    try:
        states = run(["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"]).split()
    except SchedulerUnavailable as error:
        return "Invalid job id" in str(error)
    return all(state in FINAL_STATES for state in states)


def release(job_ids: Sequence[str], run: Run = run_command) -> None:
    """Let held jobs start; an array by its base id."""
    run(["scontrol", "release", *sorted({job_id.split("_")[0] for job_id in job_ids})])


def cancel(job_ids: Sequence[str], run: Run = run_command) -> None:
    run(["scancel", *sorted({job_id.split("_")[0] for job_id in job_ids})])

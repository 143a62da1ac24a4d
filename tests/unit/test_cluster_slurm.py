from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from hpcft.cluster.slurm import QueuedJob, cancel, queue, release, run_command
from hpcft.errors import SchedulerUnavailable

OURS = "hpcft-0123abcd-"


class Slurm:
    """Answers each command with the same text, and remembers the commands."""

    def __init__(self, answer: str = "") -> None:
        self.answer, self.commands = answer, list[list[str]]()

    def __call__(self, argv: Sequence[str]) -> str:
        self.commands.append(list(argv))
        return self.answer


def queued(*lines: str) -> list[QueuedJob]:
    return queue(OURS, Slurm("".join(f"{line}\n" for line in lines)))


def test_the_queue_is_asked_for_each_element_of_this_users_arrays() -> None:
    slurm = Slurm()
    assert queue(OURS, slurm) == []
    assert slurm.commands == [
        ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%j|%T|%r|%N|%a|%q"]
    ]


def test_single_jobs_and_elements_of_arrays_are_told_apart_by_their_ids() -> None:
    assert queued(
        f"812|{OURS}r0-probe-1|RUNNING|None",
        f"813_0|{OURS}r1-label-1|PENDING|Resources",
        f"813_1|{OURS}r1-label-1|RUNNING|None",
        f"813_17|{OURS}r1-label-1|PENDING|JobArrayTaskLimit",
    ) == [
        QueuedJob("812", f"{OURS}r0-probe-1", "RUNNING", "None"),
        QueuedJob("813_0", f"{OURS}r1-label-1", "PENDING", "Resources"),
        QueuedJob("813_1", f"{OURS}r1-label-1", "RUNNING", "None"),
        QueuedJob("813_17", f"{OURS}r1-label-1", "PENDING", "JobArrayTaskLimit"),
    ]


def test_jobs_of_other_campaigns_and_programs_are_left_out() -> None:
    assert (
        queued(
            "1|hpcft-0123abce-r0-probe-1|RUNNING|None",
            f"2|my-{OURS}r0-probe-1|RUNNING|None",
            "3|bash|RUNNING|None",
            "4|hpcft|RUNNING|None",
            "5||RUNNING|None",
        )
        == []
    )


def test_any_name_of_another_job_is_passed_over() -> None:
    """sbatch takes bars and line breaks in a name."""
    ours = f"9|{OURS}r0-probe-1|PENDING|Priority"
    strange = ["1|a|b|c|d|RUNNING|None", "2|first line", "second line|RUNNING|None", "", "|", "3|", "4"]
    assert queued(*strange, ours, *strange) == [QueuedJob("9", f"{OURS}r0-probe-1", "PENDING", "Priority")]


def test_the_node_of_a_job_is_known_once_it_has_one() -> None:
    lines = [f"813_0|{OURS}r1-label-1|RUNNING|None|n[3-4]", f"813_1|{OURS}r1-label-1|PENDING|Priority|"]
    assert [(job.state, job.reason, job.node) for job in queued(*lines)] == [
        ("RUNNING", "None", "n[3-4]"),
        ("PENDING", "Priority", ""),
    ]


@pytest.mark.parametrize(
    "state",
    [
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
    ],
)
def test_a_job_that_is_over_is_shown_as_such(state: str) -> None:
    [job] = queued(f"1|{OURS}r0-probe-1|{state}|None|n1")
    assert (job.is_over, job.is_running, job.is_held) == (True, False, False)


@pytest.mark.parametrize(
    ("state", "runs"),
    [
        ("PENDING", False),
        ("RUNNING", True),
        ("COMPLETING", True),
        ("CONFIGURING", False),
        ("SUSPENDED", True),
        ("STOPPED", True),
        ("REQUEUED", False),
        ("SPECIAL_EXIT", False),
        ("X", False),
        ("", False),
    ],
)
def test_a_job_in_any_other_state_may_still_run(state: str, runs: bool) -> None:
    [job] = queued(f"1|{OURS}r0-probe-1|{state}|None|")
    assert (job.state, job.is_over, job.is_running) == (state, False, runs)


@pytest.mark.parametrize(
    ("state", "reason", "held"),
    [
        ("PENDING", "JobHeldUser", True),
        ("PENDING", "JobHeldAdmin", False),  # not ours to end
        ("PENDING", "Priority", False),
        ("PENDING", "Dependency", False),
        ("RUNNING", "JobHeldUser", False),
        ("PENDING", "", False),
    ],
)
def test_only_a_waiting_job_that_somebody_holds_is_held(state: str, reason: str, held: bool) -> None:
    assert [job.is_held for job in queued(f"1_0|{OURS}r0-probe-1|{state}|{reason}")] == [held]


def test_release_and_cancel_name_each_array_once() -> None:
    ids = ["13_0", "13_1", "13_2", "7", "120_0"]
    for act, command in ((release, ["scontrol", "release"]), (cancel, ["scancel"])):
        slurm = Slurm()
        act(ids, slurm)
        assert slurm.commands == [[*command, "120", "13", "7"]]


def test_a_command_gives_its_standard_output_alone() -> None:
    program = "import sys; print('1|a|b|c'); print('a warning', file=sys.stderr)"
    assert run_command([sys.executable, "-c", program]) == "1|a|b|c\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["squeue-that-nobody-has", "--me"], "squeue-that-nobody-has gave no answer"),
        (
            [sys.executable, "-c", "import sys; print('1|hpcft|RUNNING|None'); sys.exit('Socket timed out')"],
            "failed: Socket timed out",
        ),
        ([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], "failed: "),
    ],
)
def test_a_command_that_fails_says_nothing_about_the_jobs(argv: list[str], words: str) -> None:
    with pytest.raises(SchedulerUnavailable, match=words):
        run_command(argv)

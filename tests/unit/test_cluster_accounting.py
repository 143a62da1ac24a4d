"""What sacct says of jobs that are over, in lines of real Slurm versions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hpcft.cluster.slurm import AccountedJob, accounting, job_is_over
from hpcft.errors import SchedulerUnavailable

NAME = "hpcft-0123abcd-r1-label-1"
# sacct of Slurm 22.05: an array with an element that was killed for its memory, one that timed out, one that completed.
REAL = f"""\
812_0|{NAME}|OUT_OF_MEMORY|0:125|n3|4G
812_0.batch|batch|OUT_OF_MEMORY|0:125|n3|
812_0.extern|extern|COMPLETED|0:0|n3|
812_0.0|python|OUT_OF_MEMORY|0:125|n3|
812_1|{NAME}|TIMEOUT|0:0|n4|4G
812_1.batch|batch|CANCELLED|0:15|n4|
812_1.extern|extern|COMPLETED|0:0|n4|
812_1.0|python|CANCELLED by 1000|0:15|n4|
812_2|{NAME}|COMPLETED|0:0|n4|4G
812_2.batch|batch|COMPLETED|0:0|n4|
812_[3-9%4]|{NAME}|PENDING|0:0|None assigned|4G
"""


def answering(text: str) -> dict[str, AccountedJob]:
    return accounting(["812_0"], lambda argv: text)


def test_accounting_is_asked_once_for_each_array() -> None:
    commands: list[list[str]] = []

    def run(argv: Sequence[str]) -> str:
        commands.append(list(argv))
        return ""

    assert accounting(["812_0", "812_1", "9", "812_2"], run) == {}
    [command] = commands
    assert command[:3] == ["sacct", "--noheader", "--parsable2"]
    assert command[-1] == "--jobs=812,9"


def test_jobs_are_told_with_the_states_of_their_steps() -> None:
    jobs = answering(REAL)
    assert jobs["812_0"] == AccountedJob(
        "812_0", NAME, "OUT_OF_MEMORY", frozenset({"OUT_OF_MEMORY", "COMPLETED"}), "0:125", "n3", 4.0
    )
    assert jobs["812_1"].state == "TIMEOUT"
    assert jobs["812_1"].step_states == {"CANCELLED", "COMPLETED"}
    assert jobs["812_2"].step_states == {"COMPLETED"}


def test_a_job_that_somebody_cancelled_is_cancelled_whoever_it_was() -> None:
    assert answering(f"9|{NAME}|CANCELLED by 1000|0:0|n1|4G\n")["9"].state == "CANCELLED"


def test_memory_that_ran_out_shows_in_a_step_of_a_job_that_failed() -> None:
    """Without cgroup events for the batch step, the job only has the exit code of its script."""
    jobs = answering(
        f"9|{NAME}|FAILED|1:0|n1|4G\n9.batch|batch|FAILED|1:0|n1|\n9.0|python|OUT_OF_MEMORY|0:125|n1|\n"
    )
    assert (jobs["9"].state, "OUT_OF_MEMORY" in jobs["9"].step_states) == ("FAILED", True)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "sacct: something to say",
        "9|a|b",
        f"9|{NAME}|FAILED|1:0|n1|4G|more",
        "9.batch|batch|FAILED|1:0|n1|",
    ],
)
def test_lines_that_are_no_job_are_passed_over(line: str) -> None:
    assert answering(f"{line}\n812_0|{NAME}|FAILED|1:0|n3|4G\n").keys() == {"812_0"}


@pytest.mark.parametrize(
    ("text", "memory_GB"),
    [
        ("4G", 4.0),
        ("512M", 0.5),
        ("1.50G", 1.5),
        ("1T", 1024.0),
        ("1048576K", 1.0),
        ("4Gn", 4.0),  # before 21.08: for each node
        ("500Mc", None),  # for each core, of which nobody knows the number here
        ("0", None),
        ("0M", None),
        ("", None),
        ("?", None),
    ],
)
def test_the_memory_of_a_job_is_read_in_all_spellings(text: str, memory_GB: float | None) -> None:
    assert answering(f"9|{NAME}|FAILED|1:0|n1|{text}\n")["9"].memory_GB == memory_GB


def test_a_site_without_accounting_says_nothing() -> None:
    def run(argv: Sequence[str]) -> str:
        raise SchedulerUnavailable("sacct failed: Slurm accounting storage is disabled")

    with pytest.raises(SchedulerUnavailable, match="is disabled"):
        accounting(["9"], run)


@pytest.mark.parametrize(
    ("answer", "over"),
    [("RUNNING\n", False), ("PENDING\n", False), ("CANCELLED\n", True), ("", True), ("X\n", False)],
)
def test_a_job_is_over_when_slurm_says_so_or_shows_it_no_more(answer: str, over: bool) -> None:
    assert job_is_over("9", lambda argv: answer) == over


@pytest.mark.parametrize(
    ("words", "over"),
    [
        ("squeue failed: slurm_load_jobs error: Invalid job id specified", True),
        ("squeue failed: Unable to contact slurm controller (connect failure)", False),
    ],
)
def test_a_job_that_slurm_does_not_know_is_over_and_one_that_it_is_silent_about_is_not(
    words: str, over: bool
) -> None:
    def run(argv: Sequence[str]) -> str:
        raise SchedulerUnavailable(words)

    assert job_is_over("9", run) == over

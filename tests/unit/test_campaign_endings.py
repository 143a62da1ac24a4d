"""How the jobs of tasks have ended, as far as the queue and accounting say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from decisions import PASSING, error, label
from slurm_lines import NAME, TWO, Clock, Slurm, line, new_scheduler, submitted

from hpcft.campaign.records import Ending
from hpcft.campaign.scheduler import Scheduler


@pytest.fixture
def slurm() -> Slurm:
    return Slurm()


@pytest.fixture
def scheduler(slurm: Slurm, tmp_path: Path) -> Scheduler:
    return new_scheduler(slurm, Clock(), tmp_path)


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", "time-limit"),
        ("DEADLINE", "time-limit"),
        ("OUT_OF_MEMORY", "out-of-memory"),
        ("NODE_FAIL", "node-failure"),
        ("BOOT_FAIL", "node-failure"),
        ("PREEMPTED", "preempted"),
        ("CANCELLED", "cancelled"),
        ("REVOKED", "lost"),
    ],
)
def test_the_queue_still_says_how_a_job_ended(
    state: str, cause: Any, scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_0", state, node="n3"), line("812_1", "RUNNING"))
    observation = scheduler.observe(label(TWO, num_tasks=2))
    assert observation.ended == {0: Ending(1, cause, node="n3")}
    assert observation.gone_for_s == {0: 0.0}
    assert observation.alive.keys() == {1}


@pytest.mark.parametrize("state", ["FAILED", "COMPLETED"])
def test_a_job_that_failed_or_completed_without_a_result_says_too_little(
    state: str, scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_0", state), line("812_1", "RUNNING"))
    observation = scheduler.observe(label(TWO, num_tasks=2))
    assert (observation.ended, observation.gone_for_s) == ({}, {0: 0.0})


def accounted(job_id: str, state: str, *, name: str = NAME.format(1), memory: str = "4G") -> tuple[str, ...]:
    """A job and its steps as sacct lists them, of which the last one has the state of the job."""
    return (
        f"{job_id}|{name}|{state}|9:0|n3|{memory}",
        f"{job_id}.batch|batch|FAILED|9:0|n3|",
        f"{job_id}.extern|extern|COMPLETED|0:0|n3|",
        f"{job_id}.0|python|{state.split()[0]}|0:9|n3|",
    )


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("FAILED", "failed"),
        ("TIMEOUT", "time-limit"),
        ("OUT_OF_MEMORY", "out-of-memory"),
        ("NODE_FAIL", "node-failure"),
        ("PREEMPTED", "preempted"),
        ("CANCELLED by 1000", "cancelled"),
    ],
)
def test_accounting_says_how_a_job_ended_that_the_queue_shows_no_more(
    state: str, cause: Any, scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_1", "RUNNING"),)
    slurm.accounts = accounted("812_0", state)
    observation = scheduler.observe(label(TWO, num_tasks=2))
    assert observation.ended == {0: Ending(1, cause, 0.0, "n3", "exit code 9:0", 4.0)}
    assert slurm.asked("sacct")[0][-1] == "--jobs=812"


def test_memory_that_ran_out_in_a_step_is_known_though_the_job_only_failed(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_0", "FAILED"), line("812_1", "RUNNING"))
    slurm.accounts = (*accounted("812_0", "FAILED"), "812_0.1|python|OUT_OF_MEMORY|0:125|n3|")
    [ending] = scheduler.observe(label(TWO, num_tasks=2)).ended.values()
    assert ending.cause == "out-of-memory"


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETED", "COMPLETING", "REQUEUED"])
def test_accounting_that_lags_behind_says_nothing(state: str, scheduler: Scheduler, slurm: Slurm) -> None:
    slurm.queue = (line("812_1", "RUNNING"),)
    slurm.accounts = accounted("812_0", state)
    assert scheduler.observe(label(TWO, num_tasks=2)).ended == {}


def test_another_job_that_had_the_number_before_is_not_taken_for_ours(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_1", "RUNNING"),)
    slurm.accounts = accounted("812_0", "TIMEOUT", name="somebody-else")
    assert scheduler.observe(label(TWO, num_tasks=2)).ended == {}
    slurm.accounts = accounted("812_0", "TIMEOUT", name=NAME.format(2))
    assert scheduler.observe(label(TWO, num_tasks=2)).ended == {}


def test_accounting_is_asked_only_for_tasks_that_have_not_said_why(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.accounts = ()
    said = {task: [error(1, PASSING)] for task in (0, 1)}
    assert scheduler.observe(label(TWO, num_tasks=2, errors=said)).ended == {}
    assert slurm.asked("sacct") == []


def test_the_memory_that_a_job_had_is_learnt_from_accounting_where_the_queue_names_the_cause(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_0", "OUT_OF_MEMORY", node="n3"), line("812_1", "RUNNING"))
    records = label(TWO, num_tasks=2)
    assert scheduler.observe(records).ended == {0: Ending(1, "out-of-memory", node="n3")}, "no accounting"
    slurm.accounts = accounted("812_0", "OUT_OF_MEMORY", memory="3G")
    assert scheduler.observe(records).ended[0].memory_GB == 3.0


@pytest.mark.parametrize(("num_tasks", "each"), [(4, 3.0), (2, 6.0)])
def test_tasks_that_share_a_job_shared_its_memory(
    num_tasks: int, each: float, scheduler: Scheduler, slurm: Slurm
) -> None:
    records = label(submitted(1, *range(num_tasks), ids=["812"], packed=4), num_tasks=num_tasks)
    slurm.accounts = accounted("812", "OUT_OF_MEMORY", memory="12G")
    assert {ending.memory_GB for ending in scheduler.observe(records).ended.values()} == {each}

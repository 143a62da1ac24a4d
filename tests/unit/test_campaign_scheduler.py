"""What the answers of Slurm say of a stage's tasks: which of them wait, run or are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from decisions import ended, label
from slurm_lines import NAME, TWO, Clock, Slurm, line, new_scheduler, submitted

from hpcft.campaign.decide import FoundSubmission, Observation, QueuedTask
from hpcft.campaign.policy import Needs
from hpcft.campaign.records import Ending, Records
from hpcft.campaign.scheduler import Scheduler
from hpcft.config.site import Site


@pytest.fixture
def slurm() -> Slurm:
    return Slurm()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scheduler(slurm: Slurm, clock: Clock, tmp_path: Path) -> Scheduler:
    return new_scheduler(slurm, clock, tmp_path)


def test_tasks_wait_or_run_as_their_jobs_do(scheduler: Scheduler, slurm: Slurm) -> None:
    slurm.queue = (line("812_0", "RUNNING", node="n3"), line("812_1", "PENDING", "Priority"))
    observation = scheduler.observe(label(TWO, num_tasks=2))
    assert observation.alive == {
        0: QueuedTask("812_0", is_running=True, reason="None", node="n3"),
        1: QueuedTask("812_1", is_running=False, reason="Priority"),
    }
    assert (observation.ended, observation.gone_for_s, observation.found) == ({}, {}, {})


def test_tasks_that_share_a_job_wait_and_run_together(scheduler: Scheduler, slurm: Slurm) -> None:
    records = label(submitted(1, 0, 1, 2, ids=["812_0", "812_1"], packed=2))
    slurm.queue = (line("812_0", "RUNNING"), line("812_1", "PENDING"))
    alive = scheduler.observe(records).alive
    assert {task: (queued.job_id, queued.is_running) for task, queued in alive.items()} == {
        0: ("812_0", True),
        1: ("812_0", True),
        2: ("812_1", False),
    }


def test_a_stage_that_waits_for_nothing_is_not_asked_about(scheduler: Scheduler, slurm: Slurm) -> None:
    for records in (label(num_tasks=None), label(num_tasks=0), label(TWO, num_tasks=2, done=[0, 1])):
        assert scheduler.observe(records) == Observation()
    assert slurm.commands == []


def test_while_slurm_is_silent_nothing_is_known(scheduler: Scheduler, slurm: Slurm) -> None:
    slurm.is_down = True
    observation = scheduler.observe(label(TWO, num_tasks=2))
    assert not observation.known
    assert (observation.alive, observation.found) == ({}, {})


def test_jobs_that_nobody_has_recorded_are_found_by_their_name_in_the_order_of_their_elements(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    records = label(submitted(1, *range(11)), submitted(2, 11), num_tasks=12)
    elements = [f"900_{number}" for number in range(11)]
    slurm.queue = (
        *(line(element, "PENDING", "JobHeldUser") for element in sorted(elements)),
        line("87", "PENDING", "JobHeldUser", number=2),
        line("1200", "PENDING", "JobHeldUser", number=2),
        line("86", "CANCELLED", number=2),
        line("85", "PENDING", number=3),
        "84|hpcft-0123abcd-r0-label-1|PENDING|JobHeldUser|",
        "83|hpcft-0123abcd-r1-train-1|PENDING|JobHeldUser|",
    )
    observation = scheduler.observe(records)
    assert observation.found == {
        1: (FoundSubmission("900", tuple(elements)),),
        2: (FoundSubmission("87", ("87",)), FoundSubmission("1200", ("1200",))),
    }
    assert observation.alive == {}
    assert slurm.asked("scontrol") == [], "what is not recorded stays held"


def test_a_second_submission_under_the_name_of_a_recorded_one_is_found(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (
        line("812_0", "RUNNING"),
        line("812_1", "RUNNING"),
        line("813_0", "PENDING", "JobHeldUser"),
    )
    observation = scheduler.observe(label(TWO, num_tasks=2))
    assert observation.alive.keys() == {0, 1}
    assert observation.found == {1: (FoundSubmission("813", ("813_0",)),)}


def test_what_was_recorded_and_not_released_is_released(scheduler: Scheduler, slurm: Slurm) -> None:
    slurm.queue = (line("812_0", "PENDING", "JobHeldUser"), line("812_1", "PENDING", "JobHeldUser"))
    assert scheduler.observe(label(TWO, num_tasks=2)).alive.keys() == {0, 1}
    assert slurm.asked("scontrol") == [["scontrol", "release", "812"]]


def test_time_since_a_job_is_gone_counts_from_the_first_look_that_missed_it(
    scheduler: Scheduler, slurm: Slurm, clock: Clock
) -> None:
    records = label(TWO, num_tasks=2)
    slurm.queue = (line("812_0", "RUNNING"), line("812_1", "RUNNING"))
    assert scheduler.observe(records).gone_for_s == {}
    slurm.queue = (line("812_1", "RUNNING"),)
    clock.now += 1000.0
    assert scheduler.observe(records).gone_for_s == {0: 0.0}
    clock.now += 7.0
    assert scheduler.observe(records).gone_for_s == {0: 7.0}
    slurm.is_down = True
    clock.now += 7.0
    scheduler.observe(records)
    slurm.is_down = False
    assert scheduler.observe(records).gone_for_s == {0: 14.0}


def test_a_job_that_comes_back_is_not_gone_and_starts_anew_when_it_goes(
    scheduler: Scheduler, slurm: Slurm, clock: Clock
) -> None:
    records = label(TWO, num_tasks=2)
    scheduler.observe(records)
    clock.now += 100.0
    slurm.queue = (line("812_0", "PENDING", "BeginTime"), line("812_1", "RUNNING"))
    assert scheduler.observe(records).gone_for_s == {}
    clock.now += 100.0
    slurm.queue = ()
    assert scheduler.observe(records).gone_for_s == {0: 0.0, 1: 0.0}


def test_every_attempt_is_gone_for_a_time_of_its_own(
    scheduler: Scheduler, slurm: Slurm, clock: Clock
) -> None:
    scheduler.observe(label(TWO, num_tasks=2))
    clock.now += 100.0
    again = submitted(2, 0, ids=["813"])
    assert scheduler.observe(label(TWO, again, num_tasks=2)).gone_for_s == {0: 0.0, 1: 100.0}


@pytest.mark.parametrize(
    "records",
    [
        label(TWO, num_tasks=2, endings={0: ended("lost"), 1: ended("lost")}),
        label(submitted(1, 0, 1), num_tasks=2),
    ],
    ids=["its end is written down", "nobody knows whether it arrived"],
)
def test_only_a_recorded_attempt_without_an_end_is_gone(records: Records, scheduler: Scheduler) -> None:
    assert scheduler.observe(records).gone_for_s == {}


def test_an_earlier_attempt_that_slurm_still_shows_says_nothing_of_how_the_latest_ended(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    again = submitted(2, 0, 1, ids=["813_0", "813_1"])
    records = label(TWO, again, num_tasks=2, endings={0: ended("time-limit"), 1: ended("time-limit")})
    slurm.queue = (line("812_0", "TIMEOUT"), line("812_1", "TIMEOUT"))
    observation = scheduler.observe(records)
    assert (observation.ended, observation.gone_for_s) == ({}, {0: 0.0, 1: 0.0})
    slurm.queue += (line("813_0", "PREEMPTED", number=2), line("813_1", "RUNNING", number=2))
    assert scheduler.observe(records).ended == {0: Ending(2, "preempted")}


def test_an_earlier_attempt_that_slurm_has_started_again_keeps_its_task_busy(
    scheduler: Scheduler, slurm: Slurm
) -> None:
    slurm.queue = (line("812_0", "RUNNING"),)
    records = label(TWO, num_tasks=2, endings={0: ended("node-failure"), 1: ended("node-failure")})
    assert scheduler.observe(records).alive.keys() == {0}


def test_tasks_of_one_rank_share_a_job_where_the_site_says_so(
    slurm: Slurm, clock: Clock, tmp_path: Path
) -> None:
    packed = new_scheduler(slurm, clock, tmp_path, tasks_per_job=4)
    assert [packed.tasks_per_job("label", 1), packed.tasks_per_job("train", 2)] == [4, 1]
    here = Scheduler(packed.folder, packed.settings, Site(name="here", executor="local"))
    assert here.tasks_per_job("label", 1) == 1


def test_an_adopted_submission_finds_its_input_under_its_own_job_ids(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    from submitit.core.utils import DelayedSubmission

    adopted = submitted(7, 3, 4, 5, packed=2)
    scheduler.folder.stage(1, "label").logs(7).mkdir(parents=True)  # as before the jobs were submitted
    scheduler.adopt(1, "label", adopted, ["900_0", "900_1"])
    logs = scheduler.folder.stage(1, "label").logs(7)
    assert sorted(path.name for path in logs.iterdir()) == ["900_0_submitted.pkl", "900_1_submitted.pkl"]
    inputs = [DelayedSubmission.load(logs / f"900_{number}_submitted.pkl") for number in (0, 1)]
    assert [(job.function.__name__, job.args) for job in inputs] == [
        ("run_tasks", (str(tmp_path), 1, "label", (3, 4), 7)),
        ("run_tasks", (str(tmp_path), 1, "label", (5,), 7)),
    ]


def test_a_submission_asks_for_what_the_attempt_needs(
    slurm: Slurm, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def submit(site: Any, spec: Any, function: Any, arguments: Any) -> list[str]:
        asked.append((spec, arguments))
        return ["900"]

    monkeypatch.setattr("hpcft.campaign.scheduler.submit", submit)
    packed = new_scheduler(slurm, clock, tmp_path, tasks_per_job=4)
    plain = packed.settings.resources_for("label")
    packed.submit(1, "label", (0, 1, 2, 3, 5), 7, 1, Needs())
    packed.submit(1, "label", (0, 1), 8, 1, Needs(time_min=90, memory_GB=3.0, exclude=("n1", "n2")))
    packed.submit(1, "train", (0,), 1, 2, Needs())
    (five, shares), (two, _), (train, alone) = asked
    assert (five.name, five.ranks, five.are_packed, five.resources) == (NAME.format(7), 4, True, plain)
    assert [share[3] for share in shares] == [(0, 1, 2, 3), (5,)]
    assert five.folder == packed.folder.stage(1, "label").logs(7)
    assert (two.ranks, two.exclude) == (2, ("n1", "n2"))
    assert (two.resources.time_min, two.resources.memory_GB) == (90, 3.0)
    assert (train.ranks, train.are_packed) == (2, False)
    assert alone == [(str(tmp_path), 1, "train", (0,), 1)]

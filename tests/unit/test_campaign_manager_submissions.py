"""How the manager submits: intent, held jobs, their ids, release; and what it makes of a kill or a silence in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import (
    HELD,
    NAME,
    RUNNING,
    Clock,
    FakeSlurm,
    attempts,
    current,
    finish,
    install,
    lines,
    new_manager,
    probe,
    small_campaign,
    turns,
)

from hpcft.campaign.decide import (
    LIMIT_BACKOFF_S,
    SETTLING_S,
    Adopt,
    CancelStrays,
    FoundSubmission,
    Submit,
    Wait,
)
from hpcft.campaign.manager import Manager, record_resume
from hpcft.campaign.policy import Needs
from hpcft.errors import CampaignStopped, LeaseHeld
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
TOO_MANY = """sbatch: error: QOSMaxSubmitJobPerUserLimit
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
"""
INVALID = "sbatch: error: Batch job submission failed: Invalid qos specification"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CampaignFolder]:
    with small_campaign(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
def slurm(folder: CampaignFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, probe(folder).attempts, monkeypatch)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(folder: CampaignFolder, slurm: FakeSlurm, clock: Clock) -> Manager:
    return new_manager(folder, clock)


def test_the_intent_stands_before_the_submission_and_the_ids_before_the_release(
    manager: Manager, slurm: FakeSlurm
) -> None:
    turns(manager, 2)
    submission, release = slurm.log()
    assert submission.startswith("sbatch ")
    assert submission.endswith(" [0001-intent.json ]")
    assert release == "scontrol release 812 [0001-intent.json 0001-submitted.json ]"


def test_a_submission_without_an_answer_is_looked_for_and_adopted_when_it_shows(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    slurm.fails(TIMED_OUT)
    first, second = turns(manager, 2)
    assert (first.unconfirmed, first.scheduler_answers) == ("", True)
    assert "Socket timed out" in second.unconfirmed
    assert not second.scheduler_answers
    assert second.is_idle, "Slurm is given time"
    assert [attempt.job_ids for attempt in attempts(folder)] == [None]
    slurm.log()

    slurm.fails(None)
    manager = new_manager(folder, clock)
    assert manager.step().actions == (Wait("0 running, 2 unclear"),)
    clock.now += SETTLING_S - 0.1
    assert manager.step().actions == (Wait("0 running, 2 unclear"),)
    assert slurm.log() == []

    clock.now += 60
    slurm.shows(*lines(HELD, HELD))
    assert manager.step().actions == (Adopt(0, "probe", 1, ("812_0", "812_1")),)
    assert slurm.log() == [
        "scontrol release 812 [0001-intent.json 0001-submitted.json 0001-unconfirmed.json ]"
    ]
    assert attempts(folder)[0].job_ids == {0: "812_0", 1: "812_1"}
    inputs = {path.name for path in probe(folder).logs(1).glob("*_submitted.pkl")}
    assert inputs >= {"812_0_submitted.pkl", "812_1_submitted.pkl"}
    slurm.shows(*lines(RUNNING, RUNNING))
    assert manager.step().actions == (Wait("2 running"),)


def test_a_submission_that_never_arrived_is_repeated_and_cancelled_should_it_show_later(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    slurm.fails(TIMED_OUT)
    turns(manager, 2)
    slurm.fails(None)
    clock.now += SETTLING_S
    assert manager.step().actions == (Submit(0, "probe", (0, 1), 2),)
    slurm.log()
    slurm.shows(*lines(HELD, HELD), *lines(RUNNING, RUNNING, job=813, number=2))
    assert manager.step().actions == (CancelStrays(("812",)),)
    assert slurm.commands() == ["scancel 812"]


def test_two_submissions_under_one_name_are_both_cancelled(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    slurm.fails(TIMED_OUT)
    turns(manager, 2)
    slurm.log()
    slurm.shows(*lines(HELD, HELD), *lines(HELD, HELD, job=815))
    turn = manager.step()
    assert turn.observation.found[1][0] == FoundSubmission("812", ("812_0", "812_1"))
    assert turn.actions == (CancelStrays(("812", "815")),)
    assert turn.is_idle
    assert slurm.commands() == ["scancel 812 815"]


def test_a_manager_that_was_killed_before_the_release_leaves_it_to_the_next(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    turns(manager, 2)
    slurm.log()
    slurm.shows(*lines(HELD, HELD))
    assert new_manager(folder, clock).step().actions == (Wait("0 running, 2 pending (JobHeldUser)"),)
    assert slurm.commands() == ["scontrol release 812"]


def test_a_job_that_waits_without_being_held_is_left_alone(manager: Manager, slurm: FakeSlurm) -> None:
    turns(manager, 2)
    slurm.log()
    slurm.shows(*lines("PENDING|Priority", "PENDING|Priority"))
    assert manager.step().actions == (Wait("0 running, 2 pending (Priority)"),)
    assert slurm.log() == []


def test_too_many_jobs_become_fewer_and_a_single_one_waits(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    slurm.fails(TOO_MANY)
    _, turn = turns(manager, 2)
    assert turn.unconfirmed == ""
    rejection = attempts(folder)[0].rejected
    assert rejection is not None
    assert rejection.limit
    assert "QOSMaxSubmitJobPerUserLimit" in rejection.message
    assert json.loads(probe(folder).rejected(1).read_text())["limit"] is True
    assert manager.step().actions == (Submit(0, "probe", (0,), 2),)
    assert manager.step().actions == (Wait("0 running, 2 waiting for room"),)
    clock.now += LIMIT_BACKOFF_S
    slurm.fails(None)
    assert manager.step().actions == (Submit(0, "probe", (0,), 3),)
    slurm.shows(f"814|{NAME.format(3)}|RUNNING|None|")
    assert manager.step().actions == (Submit(0, "probe", (1,), 4),)
    assert [attempt.rejected is None for attempt in attempts(folder)] == [False, False, True, True]


def test_what_slurm_will_never_take_stops_the_campaign_until_somebody_resumes(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    slurm.fails(INVALID)
    turns(manager, 2)
    rejection = attempts(folder)[0].rejected
    assert rejection is not None
    assert not rejection.limit
    for _ in range(2):
        with pytest.raises(CampaignStopped, match=r"round 0, stage probe: .*Invalid qos specification"):
            manager.step()
    slurm.fails(None)
    record_resume(folder, clock.now)
    assert manager.step().actions == (Submit(0, "probe", (0, 1), 2),)


def test_a_time_out_of_sbatch_keeps_later_submissions_of_the_turn_back(
    folder: CampaignFolder, slurm: FakeSlurm, clock: Clock
) -> None:
    manager = new_manager(folder, clock, max_array_size=1)
    manager.step()
    slurm.fails(TIMED_OUT)
    turn = manager.step()
    assert turn.actions == (Submit(0, "probe", (0,), 1), Submit(0, "probe", (1,), 2))
    assert turn.unconfirmed
    assert [attempt.number for attempt in attempts(folder)] == [1]


def test_the_time_of_a_turn_is_that_before_slurm_was_asked(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    """An answer that takes a minute must not make a submission of a moment ago look settled."""
    manager.step()
    content = {"attempt": 1, "tasks": [0, 1], "job_name": NAME.format(1), "at": clock.now}
    write_json(probe(folder).intent(1), content)
    observe = manager.scheduler.observe

    def observe_slowly(records: object) -> object:
        clock.now += 60.0
        return observe(records)  # type: ignore[arg-type]

    manager.scheduler.observe = observe_slowly  # type: ignore[method-assign, assignment]
    assert manager.step().actions == (Wait("0 running, 2 unclear"),)
    assert isinstance(manager.step().actions[0], Submit)


def test_jobs_of_an_earlier_stage_that_still_end_are_nobodys_business(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    turns(manager, 2)
    finish(folder, 0, 1)
    manager.step()
    slurm.log()
    slurm.shows(
        f"812_0|{NAME.format(1)}|COMPLETING|None|", "900|hpcft-0123abcd-r0-probe-9|PENDING|JobHeldUser|"
    )
    stage = folder.stage(0, "reference")
    stage.attempts.mkdir(parents=True)
    write_json(stage.plan, {"tasks": [{}]})
    assert manager.step().actions == (Submit(0, "reference", (0,), 1),)
    assert not [line for line in slurm.log() if line.startswith("scancel")]


def test_two_managers_that_both_believe_in_their_lease_submit_an_attempt_once(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    manager.step()
    action = Submit(0, "probe", (0, 1), 1)
    manager._perform(action)
    slurm.log()
    with pytest.raises(LeaseHeld, match=r"attempt 1 of .* was submitted by another manager"):
        new_manager(folder, clock)._perform(action)
    assert slurm.log() == []


def test_cancelling_names_every_job_of_the_campaign_and_of_no_other(
    manager: Manager, slurm: FakeSlurm
) -> None:
    slurm.shows(
        *lines(RUNNING, "PENDING|Priority", "CANCELLED|None"),
        "900|hpcft-0123abcd-r1-train-4|PENDING|JobHeldUser|",
        "901|hpcft-99999999-r0-probe-1|RUNNING|None|",
        "902|bash|RUNNING|None|",
    )
    assert manager.scheduler.cancel_all() == 3
    assert slurm.commands() == ["scancel 812 900"]
    slurm.shows(*lines("CANCELLED|None"))
    assert manager.scheduler.cancel_all() == 0
    assert slurm.log() == []


def test_a_stage_that_is_larger_than_the_largest_array_becomes_several(
    folder: CampaignFolder, slurm: FakeSlurm, clock: Clock
) -> None:
    manager = new_manager(folder, clock, max_array_size=1)
    manager.step()
    assert manager.step().actions == (Submit(0, "probe", (0,), 1), Submit(0, "probe", (1,), 2))
    assert [attempt.job_ids for attempt in attempts(folder)] == [{0: "812"}, {1: "813"}]


def test_tasks_that_share_a_job_have_its_id_and_the_intent_says_how_many_do(
    folder: CampaignFolder, slurm: FakeSlurm, clock: Clock
) -> None:
    manager = new_manager(folder, clock, tasks_per_job=2)
    manager.step()
    assert manager.step().actions == (Submit(0, "probe", (0, 1), 1),)
    [attempt] = attempts(folder)
    assert (attempt.tasks_per_job, attempt.num_jobs, attempt.job_ids) == (2, 1, {0: "812", 1: "812"})
    slurm.shows(f"812|{NAME.format(1)}|RUNNING|None|n1")
    assert manager.step().actions == (Wait("2 running"),)


def test_an_intent_keeps_what_its_attempt_needs(folder: CampaignFolder, manager: Manager) -> None:
    manager.step()
    manager._perform(Submit(0, "probe", (0,), 1, Needs(time_min=120, exclude=("n1",))))
    intent = json.loads(probe(folder).intent(1).read_text())
    assert intent["needs"] == {"time_min": 120, "memory_GB": None, "exclude": ["n1"]}
    assert current(folder).attempts[0].tasks == (0,)

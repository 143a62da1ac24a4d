"""How many tasks are submitted at once, and in which company; what follows a refusal; which tasks are gone on without."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decisions import (
    FINAL,
    NOW,
    PASSING,
    QUIET,
    alive,
    attempt,
    decided,
    ended,
    error,
    label,
    refused,
    submit,
)

from hpcft.campaign.decide import (
    LIMIT_BACKOFF_S,
    LONGEST_SETTLING_S,
    MAX_UNCONFIRMED,
    Action,
    Observation,
    SetAside,
    Stop,
    Submit,
    Wait,
    decide,
)
from hpcft.campaign.policy import Limits
from hpcft.campaign.records import Attempt, Records, StageRecord

ENDED = {task: ended("lost") for task in range(3)}


@pytest.mark.parametrize(
    ("running", "limit", "expected"),
    [
        ((), 2, submit(2, 0, 1)),
        ((0,), 2, submit(2, 1)),
        ((0, 1), 2, Wait("2 running, 1 waiting for room")),
        ((0, 1), 1, Wait("2 running, 1 waiting for room")),
        ((0, 1), None, submit(2, 2)),
    ],
)
def test_no_more_tasks_run_than_the_site_allows(
    running: tuple[int, ...], limit: int | None, expected: Action
) -> None:
    endings = {task: known for task, known in ENDED.items() if task not in running}
    records = label(attempt(1, 0, 1, 2), endings=endings)
    assert decided(records, alive(*running), Limits(max_running=limit)) == [expected]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(max_array=2), [submit(1, 0, 1), submit(2, 2)]),
        (Limits(max_array=3), [submit(1, 0, 1, 2)]),
        (Limits(max_array=4), [submit(1, 0, 1, 2)]),
        (Limits(max_array=1), [submit(1, 0), submit(2, 1), submit(3, 2)]),
        (Limits(max_array=2, max_running=1), [submit(1, 0)]),
        (Limits(max_array=1, max_running=2), [submit(1, 0), submit(2, 1)]),
        (Limits(room=2), [submit(1, 0, 1)]),
        (Limits(room=2, max_running=1), [submit(1, 0)]),
        (Limits(room=0), [Wait("0 running, 3 waiting for room")]),
        (Limits(tasks_per_job=2), [submit(1, 0, 1, 2)]),
        (Limits(tasks_per_job=2, max_array=1), [submit(1, 0, 1), submit(2, 2)]),
        (Limits(tasks_per_job=2, room=1), [submit(1, 0, 1)]),
    ],
)
def test_no_submission_is_larger_than_the_site_allows(limits: Limits, expected: list[Action]) -> None:
    assert decided(label(), QUIET, limits) == expected


def test_a_submission_that_may_have_arrived_takes_room_like_one_that_runs() -> None:
    records = label(attempt(1, 0, recorded=False, age_s=1.0))
    assert decided(records, QUIET, Limits(max_running=1)) == [
        Wait("0 running, 1 unclear, 2 waiting for room")
    ]
    assert decided(records, QUIET, Limits(max_running=2)) == [submit(2, 1)]


def test_tasks_that_need_different_things_are_submitted_apart() -> None:
    endings = {
        0: ended("time-limit"),
        1: ended("out-of-memory"),
        2: ended("lost"),
        3: ended("time-limit"),
        4: ended("node-failure", node="n2"),
    }
    limits = Limits(time_min=60, memory_GB=4.0, max_time_min=600, max_memory_GB=64.0)
    records = label(attempt(1, *range(6)), num_tasks=6, endings=endings)
    assert decided(records, alive(5), limits) == [
        submit(2, 0, 3, time_min=120),
        submit(3, 1, memory_GB=8.0),
        submit(4, 2),
        submit(5, 4, exclude=("n2",)),
    ]


def test_packed_tasks_that_need_different_things_take_no_more_jobs_than_there_is_room_for() -> None:
    endings = {0: ended("time-limit"), 1: ended("lost"), 2: ended("lost"), 3: ended("lost")}
    limits = Limits(time_min=60, max_time_min=600, tasks_per_job=2)
    records = label(attempt(1, *range(4), tasks_per_job=2), num_tasks=4, endings=endings)
    apart: list[Action] = [submit(2, 0, time_min=120), submit(3, 1, 2, 3)]
    assert decided(records, QUIET, limits) == apart
    for room, expected in {1: apart[:1], 2: [apart[0], submit(3, 1, 2)], 3: apart}.items():
        narrow = Limits(time_min=60, max_time_min=600, tasks_per_job=2, room=room)
        assert decided(records, QUIET, narrow) == expected


@pytest.mark.parametrize(
    ("num_jobs", "expected"), [(100, 50), (3, 1), (2, 1)], ids=["a hundred", "three", "two"]
)
def test_after_a_refusal_for_too_many_half_as_many_are_tried(num_jobs: int, expected: int) -> None:
    records = label(refused(1, *range(num_jobs)), num_tasks=num_jobs)
    assert decided(records, QUIET) == [submit(2, *range(expected))]


def test_half_as_many_jobs_are_as_many_tasks_as_fit_into_them() -> None:
    records = label(refused(1, *range(12), tasks_per_job=3), num_tasks=12)
    assert decided(records, QUIET, Limits(tasks_per_job=3)) == [submit(2, *range(6))]


def test_other_limits_hold_after_a_refusal_too() -> None:
    records = label(refused(1, *range(100)), num_tasks=100)
    assert decided(records, QUIET, Limits(max_array=10)) == [submit(2, *range(10))]
    assert decided(records, QUIET, Limits(room=7)) == [submit(2, *range(7))]


def test_a_single_job_that_is_refused_for_too_many_is_tried_again_after_a_while() -> None:
    fresh = label(attempt(1, 0), refused(2, 1, age_s=LIMIT_BACKOFF_S - 0.1))
    assert decided(fresh, alive(0)) == [Wait("1 running, 2 waiting for room")]
    later = label(attempt(1, 0), refused(2, 1, age_s=LIMIT_BACKOFF_S))
    assert decided(later, alive(0)) == [submit(3, 1)]


def test_once_slurm_takes_a_submission_again_the_rest_follows_at_once() -> None:
    records = label(refused(1, *range(9)), attempt(2, 0, 1), num_tasks=9)
    assert decided(records, alive(0, 1)) == [submit(3, *range(2, 9))]


def test_a_refused_submission_is_no_attempt_at_its_tasks() -> None:
    many = [refused(number, 0, age_s=1e4) for number in range(1, 30)]
    assert decided(label(*many, num_tasks=1), QUIET, Limits(max_attempts=1)) == [submit(30, 0)]


def test_a_refusal_that_is_no_matter_of_number_stops_the_campaign_with_slurms_words() -> None:
    records = label(refused(1, 0, 1, 2, limit=False))
    assert decided(records, QUIET) == [Stop("round 1, stage label: Invalid qos specification")]


def test_whoever_says_to_go_on_has_it_tried_again() -> None:
    records = label(refused(1, 0, 1, 2, limit=False), resumed_after=1)
    assert decided(records, QUIET) == [submit(2, 0, 1, 2)]
    single = label(refused(1, 0, age_s=0.0), num_tasks=1, resumed_after=1)
    assert decided(single, QUIET) == [submit(2, 0)]


def failing(*tasks: int, num_tasks: int = 4, others: str = "run", **stage: object) -> Records:
    """Tasks that have failed for good; the others run, are done, or have to be tried again."""
    rest = [task for task in range(num_tasks) if task not in tasks]
    return label(
        attempt(1, *range(num_tasks)),
        num_tasks=num_tasks,
        errors={task: [error(1, FINAL)] for task in tasks}
        | ({task: [error(1, PASSING)] for task in rest} if others == "again" else {}),
        endings={task: ended("error") for task in (*tasks, *(rest if others == "again" else ()))},
        done=rest if others == "done" else (),
        **stage,  # type: ignore[arg-type]
    )


def test_as_many_failed_tasks_as_are_tolerated_are_set_aside_once_all_others_are_over() -> None:
    limits = Limits(tolerated=2)
    why = {1: "no such element", 3: "no such element"}
    assert decided(failing(1, 3), alive(0, 2), limits) == [Wait("2 running")]
    assert decided(failing(1, 3, others="again"), QUIET, limits) == [submit(2, 0, 2)]
    assert decided(failing(1, 3, others="done"), QUIET, limits) == [SetAside(1, "label", why)]


@pytest.mark.parametrize("others", ["again", "done"])
def test_one_more_than_is_tolerated_stops_the_campaign_and_submits_nothing(others: str) -> None:
    [action] = decided(failing(1, 3, others=others), QUIET, Limits(tolerated=1))
    assert isinstance(action, Stop)
    assert "tasks 1, 3 failed" in action.why


def test_tasks_that_were_set_aside_before_count() -> None:
    before = failing(1, others="done", num_tasks=3)
    assert isinstance(decided(before, QUIET, Limits(tolerated=1))[0], SetAside)
    again = label(
        attempt(1, 0, 1, 2),
        done=[2],
        set_aside=[0],
        errors={1: [error(1, FINAL)]},
        endings={1: ended("error")},
    )
    assert isinstance(decided(again, QUIET, Limits(tolerated=1))[0], Stop)
    assert decided(again, QUIET, Limits(tolerated=2)) == [SetAside(1, "label", {1: "no such element"})]


def test_what_slurm_refused_does_not_hide_that_the_other_tasks_are_over() -> None:
    final: Attempt = refused(2, 0, limit=False)
    records = label(
        attempt(1, 0),
        final,
        num_tasks=1,
        errors={0: [error(1, FINAL)]},
        endings={0: ended("error")},
    )
    assert decided(records, QUIET, Limits(tolerated=1)) == [SetAside(1, "label", {0: "no such element"})]


def test_every_task_is_in_one_submission_and_all_keep_to_the_limits() -> None:
    endings = {task: ended(*["time-limit"] * (task % 3)) for task in range(40) if task % 3}
    records = label(attempt(1, *range(40)), attempt(2, *range(40)), num_tasks=40, endings=endings)
    untouched = label(num_tasks=40)
    for packed in (1, 4):
        for bound in (1, 3, None):
            limits = Limits(max_array=bound, tasks_per_job=packed, time_min=60, max_time_min=600)
            for case in (records, untouched):
                submissions = [a for a in decided(case, QUIET, limits) if isinstance(a, Submit)]
                tasks = [task for action in submissions for task in action.tasks]
                assert len(tasks) == len(set(tasks))
                assert [a.attempt for a in submissions] == sorted({a.attempt for a in submissions})
                assert all(bound is None or len(a.tasks) <= bound * packed for a in submissions)
    assert NOW - records.stages[-1].attempts[0].at > LIMIT_BACKOFF_S


def test_submissions_that_never_arrive_are_not_repeated_for_ever() -> None:
    attempts = tuple(
        Attempt(number, (0,), f"job-{number}", 0.0, None, unconfirmed="sbatch: error: Unspecified error")
        for number in range(1, MAX_UNCONFIRMED + 1)
    )
    stage = StageRecord(1, "label", 1, attempts)
    [stop] = decide(Records((stage,), 1), Observation(), LONGEST_SETTLING_S, Limits())
    assert isinstance(stop, Stop)
    assert "100 submissions in a row were not confirmed" in stop.why
    assert "Unspecified error" in stop.why
    again = replace(stage, resumed_after=MAX_UNCONFIRMED)
    [submission] = decide(Records((again,), 1), Observation(), LONGEST_SETTLING_S, Limits())
    assert isinstance(submission, Submit)

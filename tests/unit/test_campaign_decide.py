from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hpcft.campaign.decide import (
    SETTLING_S,
    Action,
    CancelStrays,
    Collect,
    Finish,
    Limits,
    Observation,
    Plan,
    Stop,
    Submit,
    Wait,
    decide,
)
from hpcft.campaign.records import Attempt, Records, StageRecord

NOW = 1_000_000.0
QUIET = Observation()
UNKNOWN = Observation(known=False)
FINAL: Mapping[str, Any] = {"final": True, "message": "no such element"}
PASSING: Mapping[str, Any] = {"final": False, "message": "the node went away"}


def attempt(number: int, *tasks: int, recorded: bool = True, age_s: float = 3600.0) -> Attempt:
    """A submission of these tasks, so long ago; with `recorded` False nobody knows whether it arrived."""
    job_ids = {task: f"{100 + number}_{task}" for task in tasks} if recorded else None
    return Attempt(number, tasks, f"job-{number}", NOW - age_s, job_ids)


def label(
    *attempts: Attempt,
    num_tasks: int | None = 3,
    done: Sequence[int] = (),
    errors: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    resumed_after: int = 0,
) -> Records:
    """A campaign whose stage in progress is `label` of round 1, after stages that are finished."""
    before = StageRecord(1, "select", 1, (), frozenset({0}), {}, {"selected": 8})
    stage = StageRecord(
        1,
        "label",
        num_tasks,
        attempts,
        frozenset(done),
        {task: tuple(known) for task, known in (errors or {}).items()},
        resumed_after=resumed_after,
    )
    return Records((before, stage), rounds=1)


def error(number: int, of: Mapping[str, Any]) -> dict[str, Any]:
    return {"attempt": number, **of}


def alive(*tasks: int, strays: Sequence[str] = ()) -> Observation:
    return Observation(frozenset((1, "label", task) for task in tasks), True, tuple(strays))


def submit(number: int, *tasks: int) -> Submit:
    return Submit(1, "label", tasks, number)


def decided(records: Records, observation: Observation, limits: Limits | None = None) -> list[Action]:
    return decide(records, observation, NOW, limits or Limits())


FINISHED = Records((StageRecord(1, "evaluate", 1, (), frozenset({0}), {}, {"metrics": {}}),), rounds=1)
THREE = (attempt(1, 0), attempt(2, 0), attempt(3, 0))


@pytest.mark.parametrize(
    ("records", "observation", "expected"),
    [
        pytest.param(FINISHED, QUIET, Finish(), id="every stage has its product"),
        pytest.param(FINISHED, UNKNOWN, Finish(), id="finished, though Slurm is down"),
        pytest.param(label(num_tasks=None), UNKNOWN, Plan(1, "label"), id="a plan needs no scheduler"),
        pytest.param(label(), QUIET, submit(1, 0, 1, 2), id="all tasks of a new plan go into one submission"),
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[1]), alive(0, 2), Wait("2 running"), id="the rest still runs"
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[1]), alive(2), submit(2, 0), id="one died and one still runs"
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[0, 1, 2]), QUIET, Collect(1, "label"), id="all have results"
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[0, 1, 2]),
            alive(2),
            Collect(1, "label"),
            id="result before the end",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[0, 1, 2]),
            UNKNOWN,
            Collect(1, "label"),
            id="results need no Slurm",
        ),
        pytest.param(label(num_tasks=0), QUIET, Collect(1, "label"), id="a stage without tasks"),
        pytest.param(
            label(attempt(1, 0, 1, 2)), UNKNOWN, Wait("the scheduler does not answer"), id="Slurm is silent"
        ),
        pytest.param(
            label(),
            UNKNOWN,
            Wait("the scheduler does not answer"),
            id="nothing is submitted to a silent Slurm",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2, recorded=False)),
            alive(strays=["77_0", "77_1", "77_2"]),
            CancelStrays(("77_0", "77_1", "77_2")),
            id="an unrecorded job is cancelled before its tasks are submitted again",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2, recorded=False, age_s=SETTLING_S - 0.1)),
            QUIET,
            Wait("3 running"),
            id="an unrecorded submission may still arrive",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2, recorded=False, age_s=SETTLING_S)),
            QUIET,
            submit(2, 0, 1, 2),
            id="an unrecorded submission has never arrived",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), attempt(2, 1, recorded=False, age_s=1.0), done=[0]),
            QUIET,
            submit(3, 2),
            id="only the tasks of the unrecorded submission settle",
        ),
        pytest.param(
            label(attempt(1, 0, recorded=False, age_s=7200.0), attempt(2, 0, age_s=1.0), num_tasks=1),
            QUIET,
            submit(3, 0),
            id="a recorded submission does not settle",
        ),
        pytest.param(
            label(attempt(1, 0), num_tasks=1, errors={0: [error(1, PASSING)]}),
            QUIET,
            submit(2, 0),
            id="an error that may pass is tried again",
        ),
        pytest.param(
            label(attempt(1, 0), attempt(2, 0), num_tasks=1, errors={0: [error(1, FINAL)]}, resumed_after=1),
            QUIET,
            submit(3, 0),
            id="a final error of an earlier attempt says nothing about the latest",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), errors={1: [error(1, FINAL)]}),
            alive(0, 2),
            Wait("2 running"),
            id="what runs may end before the campaign stops",
        ),
        pytest.param(
            label(attempt(1, 0, 1), errors={1: [error(1, FINAL)]}),
            alive(0),
            Wait("1 running"),
            id="nothing more is submitted once a task is given up",
        ),
        pytest.param(
            label(*THREE, num_tasks=1, resumed_after=3), QUIET, submit(4, 0), id="resume gives new attempts"
        ),
        pytest.param(
            label(*THREE, attempt(4, 0), num_tasks=1, resumed_after=3),
            QUIET,
            submit(5, 0),
            id="attempts are counted from the resume",
        ),
        pytest.param(
            label(attempt(1, 0), num_tasks=1, errors={0: [error(1, FINAL)]}, resumed_after=1),
            QUIET,
            submit(2, 0),
            id="resume forgives a final error",
        ),
        pytest.param(
            label(attempt(1, 0), attempt(7, 1), attempt(3, 2), done=[1, 2]),
            QUIET,
            submit(8, 0),
            id="a new number is above all others",
        ),
    ],
)
def test_the_next_action_follows_from_records_and_queue(
    records: Records, observation: Observation, expected: Action
) -> None:
    assert decided(records, observation) == [expected]


def test_an_early_stage_without_a_product_comes_before_later_ones() -> None:
    first = StageRecord(0, "probe", 1, (), frozenset({0}))
    second = StageRecord(0, "reference", 1, (), frozenset({0}), {}, {"items": 1})
    assert decided(Records((first, second), rounds=0), QUIET) == [Collect(0, "probe")]


def test_a_task_of_another_round_or_stage_in_the_queue_is_not_taken_for_ours() -> None:
    others = frozenset({(2, "label", 0), (1, "train", 0), (1, "label", 1)})
    assert decided(label(num_tasks=1), Observation(others)) == [submit(1, 0)]


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
    records = label(attempt(1, 0, 1, 2))
    assert decided(records, alive(*running), Limits(max_running=limit)) == [expected]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(max_array=2), submit(1, 0, 1)),
        (Limits(max_array=3), submit(1, 0, 1, 2)),
        (Limits(max_array=4), submit(1, 0, 1, 2)),
        (Limits(max_array=2, max_running=1), submit(1, 0)),
        (Limits(max_array=1, max_running=2), submit(1, 0)),
    ],
)
def test_no_array_is_larger_than_the_site_allows(limits: Limits, expected: Action) -> None:
    assert decided(label(), QUIET, limits) == [expected]


def test_what_does_not_fit_into_one_array_follows_in_the_next() -> None:
    records = label(attempt(1, 0, 1))
    assert decided(records, alive(0, 1), Limits(max_array=2)) == [submit(2, 2)]


def test_a_submission_that_may_have_arrived_takes_room_like_one_that_runs() -> None:
    records = label(attempt(1, 0, recorded=False, age_s=1.0))
    assert decided(records, QUIET, Limits(max_running=1)) == [Wait("1 running, 2 waiting for room")]
    assert decided(records, QUIET, Limits(max_running=2)) == [submit(2, 1)]


def test_no_verdict_is_passed_while_the_last_submission_may_still_arrive() -> None:
    limits = Limits(max_attempts=2)
    fresh = label(attempt(1, 0), attempt(2, 0, recorded=False, age_s=1.0), num_tasks=1)
    assert decided(fresh, QUIET, limits) == [Wait("1 running")]
    old = label(attempt(1, 0), attempt(2, 0, recorded=False), num_tasks=1)
    assert isinstance(decided(old, QUIET, limits)[0], Stop)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            label(*THREE, num_tasks=1, errors={0: [error(1, PASSING), error(3, FINAL)]}),
            "round 1, stage label: task 0 failed after 3 attempts. Task 0: no such element",
        ),
        (
            label(attempt(1, 0), num_tasks=1, errors={0: [error(1, FINAL)]}),
            "round 1, stage label: task 0 failed after 1 attempt. Task 0: no such element",
        ),
        (
            label(attempt(1, 0, 1, 2), done=[1], errors={0: [error(1, FINAL)], 2: [error(1, FINAL)]}),
            "round 1, stage label: tasks 0, 2 failed after 1 attempt. Task 0: no such element",
        ),
        (
            label(*THREE, num_tasks=1),
            "round 1, stage label: task 0 failed after 3 attempts. Task 0: it ended without a result or an error "
            "(killed, or out of memory?)",
        ),
    ],
)
def test_a_campaign_that_cannot_go_on_says_which_task_failed_and_why(records: Records, words: str) -> None:
    assert decided(records, QUIET) == [Stop(words)]


def test_a_task_has_as_many_attempts_as_the_campaign_grants() -> None:
    for granted in (1, 2, 5):
        attempts = [attempt(number, 0) for number in range(1, granted + 1)]
        limits = Limits(max_attempts=granted)
        assert isinstance(decided(label(*attempts, num_tasks=1), QUIET, limits)[0], Stop)
        one_less = label(*attempts[:-1], num_tasks=1)
        assert decided(one_less, QUIET, limits) == [submit(granted, 0)]

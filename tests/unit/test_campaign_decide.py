from __future__ import annotations

import pytest
from decisions import (
    FINAL,
    NOW,
    PASSING,
    QUIET,
    UNKNOWN,
    alive,
    attempt,
    decided,
    ended,
    error,
    gone,
    label,
    submit,
)

from hpcft.campaign.decide import (
    GONE_S,
    SETTLING_S,
    UNEXPLAINED_S,
    Action,
    Collect,
    Finish,
    Observation,
    Plan,
    QueuedTask,
    RecordEndings,
    Stop,
    Wait,
    decide,
)
from hpcft.campaign.policy import Limits
from hpcft.campaign.records import Ending, Records, StageRecord

FINISHED = Records((StageRecord(1, "evaluate", 1, (), frozenset({0}), {}, {"metrics": {}}),), rounds=1)
THREE = (attempt(1, 0), attempt(2, 0), attempt(3, 0))
LOST = Ending(1, "lost")


def record(*, round_: int = 1, stage: str = "label", **endings: Ending) -> RecordEndings:
    return RecordEndings(round_, stage, {int(task[1:]): ending for task, ending in endings.items()})


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
            label(attempt(1, 0, 1, 2), done=[1]),
            gone(UNEXPLAINED_S, 0, alive=[2]),
            record(t0=LOST),
            id="one died and one still runs",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[1], endings={0: ended("lost")}),
            alive(2),
            submit(2, 0),
            id="one died, as is written down, and one still runs",
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
        pytest.param(
            label(attempt(1, 0, 1, 2), done=[0, 2], set_aside=[1]),
            UNKNOWN,
            Collect(1, "label"),
            id="a task that was set aside is not waited for",
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
            label(attempt(1, 0), num_tasks=1, errors={0: [error(1, FINAL)]}),
            UNKNOWN,
            Wait("the scheduler does not answer"),
            id="while Slurm is silent a job whose task has failed may still run",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2, recorded=False, age_s=SETTLING_S - 0.1)),
            QUIET,
            Wait("0 running, 3 unclear"),
            id="an unrecorded submission may still arrive",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2, recorded=False, age_s=SETTLING_S)),
            QUIET,
            submit(2, 0, 1, 2),
            id="an unrecorded submission has never arrived",
        ),
        pytest.param(
            label(
                attempt(1, 0, 1, 2),
                attempt(2, 1, recorded=False, age_s=1.0),
                done=[0],
                endings={1: ended("lost"), 2: ended("lost")},
            ),
            QUIET,
            submit(3, 2),
            id="only the tasks of the unrecorded submission settle",
        ),
        pytest.param(
            label(attempt(1, 0, recorded=False, age_s=7200.0), attempt(2, 0, age_s=1.0), num_tasks=1),
            gone(UNEXPLAINED_S, 0),
            record(t0=Ending(2, "lost")),
            id="a recorded submission does not settle",
        ),
        pytest.param(
            label(attempt(1, 0), num_tasks=1, errors={0: [error(1, PASSING)]}, endings={0: ended("error")}),
            QUIET,
            submit(2, 0),
            id="an error that may pass is tried again",
        ),
        pytest.param(
            label(
                attempt(1, 0),
                attempt(2, 0),
                num_tasks=1,
                errors={0: [error(1, FINAL)]},
                endings={0: ended("error", "lost")},
                resumed_after=1,
            ),
            QUIET,
            submit(3, 0),
            id="a final error of an earlier attempt says nothing about the latest",
        ),
        pytest.param(
            label(attempt(1, 0, 1, 2), errors={1: [error(1, FINAL)]}, endings={1: ended("error")}),
            alive(0, 2),
            Wait("2 running"),
            id="what runs may end before the campaign stops",
        ),
        pytest.param(
            label(attempt(1, 0, 1), errors={1: [error(1, FINAL)]}, endings={1: ended("error")}),
            alive(0),
            Wait("1 running"),
            id="nothing more is submitted once a task is given up",
        ),
        pytest.param(
            label(*THREE, num_tasks=1, endings={0: ended("lost", "lost", "lost")}, resumed_after=3),
            QUIET,
            submit(4, 0),
            id="resume gives new attempts",
        ),
        pytest.param(
            label(
                *THREE,
                attempt(4, 0),
                num_tasks=1,
                endings={0: ended("lost", "lost", "lost", "lost")},
                resumed_after=3,
            ),
            QUIET,
            submit(5, 0),
            id="attempts are counted from the resume",
        ),
        pytest.param(
            label(
                attempt(1, 0),
                num_tasks=1,
                errors={0: [error(1, FINAL)]},
                endings={0: ended("error")},
                resumed_after=1,
            ),
            QUIET,
            submit(2, 0),
            id="resume forgives a final error",
        ),
        pytest.param(
            label(attempt(1, 0), attempt(7, 1), attempt(3, 2), done=[1, 2], endings={0: ended("lost")}),
            QUIET,
            submit(8, 0),
            id="a new number is above all others",
        ),
        pytest.param(
            label(attempt(1, 0), attempt(2, 0), num_tasks=1, endings={0: ended("lost")}),
            alive(0),
            Wait("1 running"),
            id="an ending of an earlier attempt says nothing about the one that runs",
        ),
        pytest.param(
            label(attempt(1, 0), num_tasks=1, endings={0: ended("node-failure")}),
            alive(0),
            Wait("1 running"),
            id="a job that Slurm has brought back after its end was written down",
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


@pytest.mark.parametrize(
    ("for_s", "known", "expected"),
    [
        (0.0, None, None),
        (UNEXPLAINED_S - 0.1, None, None),
        (UNEXPLAINED_S, None, LOST),
        (0.0, Ending(1, "time-limit"), None),
        (GONE_S - 0.1, Ending(1, "time-limit"), None),
        (GONE_S, Ending(1, "time-limit", node="n1"), Ending(1, "time-limit", node="n1")),
        (UNEXPLAINED_S, Ending(1, "out-of-memory"), Ending(1, "out-of-memory")),
    ],
)
def test_a_job_that_is_gone_is_given_time_for_its_result_to_arrive_before_its_end_is_written_down(
    for_s: float, known: Ending | None, expected: Ending | None
) -> None:
    observation = gone(for_s, 0, ended={} if known is None else {0: known})
    actions = decided(label(attempt(1, 0), num_tasks=1), observation)
    assert actions == [Wait("0 running, 1 unclear") if expected is None else record(t0=expected)]


def test_a_task_that_has_said_why_it_failed_is_not_waited_for_once_its_job_is_gone() -> None:
    about = {**error(1, PASSING), "host": "node7"}
    records = label(attempt(1, 0, 1), num_tasks=2, errors={0: [about]})
    assert decided(records, alive(1)) == [record(t0=Ending(1, "error", node="node7"))]
    assert decided(records, alive(0, 1)) == [Wait("2 running")], "its other ranks still run"


def test_a_task_that_has_seen_its_time_limit_come_names_it_as_the_cause() -> None:
    about = {**error(1, PASSING), "cause": "time-limit"}
    records = label(attempt(1, 0), num_tasks=1, errors={0: [about]})
    assert decided(records, QUIET) == [record(t0=Ending(1, "time-limit"))]


def test_how_several_tasks_ended_is_written_down_at_once_and_before_anything_is_submitted() -> None:
    records = label(attempt(1, 0, 1), num_tasks=3, errors={1: [error(1, PASSING)]})
    observation = gone(GONE_S, 0, ended={0: Ending(1, "preempted")})
    assert decided(records, observation) == [record(t0=Ending(1, "preempted"), t1=Ending(1, "error"))]


def test_waiting_says_for_what() -> None:
    queue = {
        0: QueuedTask("101_0", is_running=True),
        1: QueuedTask("101_1", is_running=False, reason="Priority"),
        2: QueuedTask("101_2", is_running=False, reason="Priority"),
        3: QueuedTask("101_3", is_running=False, reason="QOSMaxJobsPerUserLimit"),
        4: QueuedTask("101_4", is_running=False),
    }
    records = label(attempt(1, 0, 1, 2, 3, 4, 5), num_tasks=6)
    assert decided(records, Observation(alive=queue)) == [
        Wait(
            "1 running, 2 pending (Priority), 1 pending (QOSMaxJobsPerUserLimit), 1 pending (no reason given), 1 unclear"
        )
    ]


def test_no_verdict_is_passed_while_the_last_submission_may_still_arrive() -> None:
    limits = Limits(max_attempts=1)
    known = {"num_tasks": 1, "endings": {0: ended("lost")}}
    fresh = label(attempt(1, 0), attempt(2, 0, recorded=False, age_s=1.0), **known)  # type: ignore[arg-type]
    assert decided(fresh, QUIET, limits) == [Wait("0 running, 1 unclear")]
    old = label(attempt(1, 0), attempt(2, 0, recorded=False), **known)  # type: ignore[arg-type]
    assert isinstance(decided(old, QUIET, limits)[0], Stop)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            label(
                *THREE,
                num_tasks=1,
                errors={0: [error(1, PASSING), error(3, FINAL)]},
                endings={0: ended("error", "lost", "error")},
            ),
            "round 1, stage label: task 0 failed after 3 attempts. Task 0: no such element",
        ),
        (
            label(attempt(1, 0), num_tasks=1, errors={0: [error(1, FINAL)]}, endings={0: ended("error")}),
            "round 1, stage label: task 0 failed after 1 attempt. Task 0: no such element",
        ),
        (
            label(
                attempt(1, 0, 1, 2),
                done=[1],
                errors={0: [error(1, FINAL)], 2: [error(1, FINAL)]},
                endings={0: ended("error"), 2: ended("error")},
            ),
            "round 1, stage label: tasks 0, 2 failed after 1 attempt. Task 0: no such element",
        ),
        (
            label(*THREE, num_tasks=1, endings={0: ended("lost", "lost", "lost")}),
            "round 1, stage label: task 0 failed after 3 attempts. Task 0: it ended without a result or an error "
            "(killed, or out of memory?)",
        ),
        (
            label(*THREE, num_tasks=1, endings={0: ended("lost", "lost", "out-of-memory", node="node7")}),
            "round 1, stage label: task 0 failed after 3 attempts. Task 0: it ran out of memory on node7",
        ),
    ],
)
def test_a_campaign_that_cannot_go_on_says_which_task_failed_and_why(records: Records, words: str) -> None:
    assert decided(records, QUIET) == [Stop(words)]


def test_many_tasks_that_failed_are_not_all_named() -> None:
    failed = range(12)
    records = label(
        attempt(1, *failed),
        num_tasks=12,
        errors={task: [error(1, FINAL)] for task in failed},
        endings={task: ended("error") for task in failed},
    )
    [action] = decided(records, QUIET)
    assert isinstance(action, Stop)
    assert "tasks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... failed" in action.why


def test_a_task_has_as_many_attempts_as_the_campaign_grants() -> None:
    for granted in (1, 2, 5):
        attempts = [attempt(number, 0) for number in range(1, granted + 1)]
        limits = Limits(max_attempts=granted)
        failed = {0: ended(*["lost"] * granted)}
        assert isinstance(decided(label(*attempts, num_tasks=1, endings=failed), QUIET, limits)[0], Stop)
        one_less = label(*attempts[:-1], num_tasks=1, endings={0: failed[0][:-1]})
        assert decided(one_less, QUIET, limits) == [submit(granted, 0)]


def test_the_same_records_and_the_same_answer_lead_to_the_same_actions() -> None:
    records, observation = label(attempt(1, 0, 1), done=[1]), gone(UNEXPLAINED_S, 0)
    assert decide(records, observation, NOW, Limits()) == decide(records, observation, NOW, Limits())

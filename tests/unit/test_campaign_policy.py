"""What becomes of a task whose attempts have failed, for each way in which an attempt can end."""

from __future__ import annotations

from typing import Any

import pytest
from decisions import FINAL, NOW, PASSING, current, ended, error, label

from hpcft.campaign.policy import AVOID_NODE_S, INTERRUPTIONS, GivenUp, Limits, Needs, describe, next_attempt
from hpcft.campaign.records import CAUSES, Cause, Ending

LIMITS = Limits(
    max_attempts=3, max_interruptions=4, time_min=60, memory_GB=4.0, max_time_min=200, max_memory_GB=30.0
)
FAULTS = [cause for cause in CAUSES if cause not in INTERRUPTIONS]


def after(*endings: Ending, limits: Limits = LIMITS, now: float = NOW, **stage: Any) -> Needs | GivenUp:
    """What is to become of task 0, whose attempts have ended so."""
    return next_attempt(current(label(num_tasks=1, endings={0: endings}, **stage)), 0, limits, now)


def test_a_task_that_was_never_tried_gets_what_the_campaign_says() -> None:
    assert after() == Needs()


@pytest.mark.parametrize("cause", FAULTS)
def test_what_is_the_task_s_own_fault_counts_as_an_attempt(cause: Cause) -> None:
    assert isinstance(after(*ended(cause, cause)), Needs)
    assert isinstance(after(*ended(cause, cause, cause)), GivenUp)


@pytest.mark.parametrize("cause", sorted(INTERRUPTIONS))
def test_what_the_machine_does_to_a_task_does_not_count_up_to_a_bound_of_its_own(cause: Cause) -> None:
    assert isinstance(after(*ended(cause, cause, cause)), Needs)
    assert isinstance(after(*ended(cause, "lost", cause, "lost", cause)), Needs)
    assert isinstance(after(*ended("node-failure", "preempted", cause, cause)), GivenUp)


def test_interruptions_leave_a_task_the_attempts_that_it_has() -> None:
    assert isinstance(after(*ended("lost", "preempted", "node-failure", "lost", "preempted")), Needs)
    assert isinstance(after(*ended("lost", "preempted", "node-failure", "lost", "lost")), GivenUp)


def test_an_error_that_the_same_input_would_give_again_is_the_last() -> None:
    final, passing = {0: [error(1, FINAL)]}, {0: [error(1, PASSING)]}
    assert after(*ended("error"), errors=final) == GivenUp("no such element")
    assert after(*ended("error"), errors=passing) == Needs()
    assert after(*ended("error", "preempted"), errors=final) == Needs(), "it is not the latest"


def test_a_task_that_ran_into_its_time_limit_gets_twice_as_much_up_to_the_bound() -> None:
    assert after(*ended("time-limit")) == Needs(time_min=120)
    assert after(*ended("time-limit", "time-limit")) == Needs(time_min=200)
    assert after(*ended("time-limit", "lost")) == Needs(time_min=120), "and keeps it"


def test_a_task_that_ran_out_of_memory_gets_twice_as_much_up_to_the_bound() -> None:
    plenty = Limits(max_attempts=9, memory_GB=4.0, max_memory_GB=30.0)
    asked = [after(*ended(*["out-of-memory"] * times), limits=plenty) for times in range(1, 5)]
    assert asked == [Needs(memory_GB=memory) for memory in (8.0, 16.0, 30.0, 30.0)]


def test_time_and_memory_grow_apart_from_each_other() -> None:
    assert after(*ended("time-limit", "out-of-memory")) == Needs(time_min=120, memory_GB=8.0)


def test_where_no_bound_is_known_nothing_grows_for_a_job_could_wait_for_ever() -> None:
    unbounded = Limits(max_attempts=9, time_min=60, memory_GB=4.0)
    assert after(*ended("time-limit", "out-of-memory"), limits=unbounded) == Needs()


def test_a_bound_below_what_the_campaign_asks_for_takes_nothing_away() -> None:
    narrow = Limits(time_min=60, memory_GB=4.0, max_time_min=30, max_memory_GB=2.0)
    assert after(*ended("time-limit", "out-of-memory"), limits=narrow) == Needs(time_min=60, memory_GB=4.0)


def test_memory_that_the_campaign_does_not_name_grows_from_what_the_job_had() -> None:
    default = Limits(memory_GB=None, max_memory_GB=30.0)
    known = ended("out-of-memory", memory_GB=3.0)
    assert after(*known, limits=default) == Needs(memory_GB=6.0)
    again = (*known, *ended("out-of-memory", first=2, memory_GB=6.0))
    assert after(*again, limits=default) == Needs(memory_GB=12.0)
    assert after(*ended("out-of-memory"), limits=default) == Needs()


def test_a_task_keeps_away_for_a_while_from_the_nodes_that_failed_under_it() -> None:
    failed = (
        Ending(1, "node-failure", at=NOW - AVOID_NODE_S, node="old"),
        Ending(2, "node-failure", at=NOW - AVOID_NODE_S + 1, node="n9"),
        Ending(3, "node-failure", at=NOW - 1, node="n2"),
    )
    assert after(*failed) == Needs(exclude=("n2", "n9"))
    assert after(*failed, now=NOW + AVOID_NODE_S) == Needs()
    assert after(*ended("node-failure")) == Needs(), "nobody knows which node that was"


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if cause != "node-failure"])
def test_a_node_on_which_a_task_ended_otherwise_is_not_avoided(cause: Cause) -> None:
    needs = after(*ended(cause, node="n2"))
    assert isinstance(needs, Needs)
    assert needs.exclude == ()


@pytest.mark.parametrize("cause", CAUSES)
def test_whoever_says_to_go_on_gives_a_task_new_attempts_with_what_the_campaign_says(cause: Cause) -> None:
    endings = ended(*[cause] * 4, node="n2")
    assert isinstance(after(*endings), GivenUp)
    assert after(*endings, resumed_after=4) == Needs()
    later = after(*endings, *ended("time-limit", first=5), resumed_after=4)
    assert later == Needs(time_min=120)


@pytest.mark.parametrize(
    ("ending", "message", "words"),
    [
        (Ending(1, "error", node="n2", detail="exit code 1:0"), "no such file", "no such file"),
        (Ending(1, "error"), None, "it ended with an error"),
        (Ending(1, "time-limit"), None, "it ran into its time limit"),
        (Ending(1, "out-of-memory", node="n2"), None, "it ran out of memory on n2"),
        (Ending(1, "node-failure", node="n2"), None, "its node failed on n2"),
        (Ending(1, "preempted"), None, "it was preempted and not requeued"),
        (Ending(1, "cancelled"), None, "its job was cancelled"),
        (
            Ending(1, "failed", node="n2", detail="exit code 127:0"),
            None,
            "its job failed before the task could say why on n2 (exit code 127:0)",
        ),
        (Ending(1, "lost"), None, "it ended without a result or an error (killed, or out of memory?)"),
    ],
)
def test_how_an_attempt_ended_is_said_in_words(ending: Ending, message: str | None, words: str) -> None:
    assert describe(ending, message) == words


def test_a_task_that_is_given_up_says_how_its_last_attempt_ended() -> None:
    assert after(*ended("lost", "time-limit", "out-of-memory", node="n2")) == GivenUp(
        "it ran out of memory on n2"
    )
    said = {0: [error(3, PASSING)]}
    assert after(*ended("lost", "lost", "error"), errors=said) == GivenUp("the node went away")

"""A node dies with all that runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dying_jobs import Disturbed, assert_same_data, losing
from slurm_campaign import command

pytestmark = pytest.mark.slurm


def test_a_task_whose_node_dies_goes_on_elsewhere_under_the_same_job_and_the_status_names_both_nodes(
    slurm_cluster: Any, disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards that a requeued job is left alone (decide), and that each execution says where it runs (worker._claim)."""
    from hpcft.campaign.status import describe

    case = disturb("probe")
    with case.managed():
        case.until_stopped_in_md()
        before, node = case.segments(), case.mark(1)["node"]
        with losing(slurm_cluster, node, crash=True):
            case.until(lambda: len(case.runs()) == 2, "the job has started again on another node")
            problems = describe(case.folder)["problems"]
            after = case.segments()
            assert {name: after[name] for name in before} == before
            case.until_finished()
    one, two = case.runs()
    assert one["job"] == two["job"] and one["node"] == node != two["node"]
    assert problems == [f"task 0: started again 1 time; it ran on {node}, then {two['node']}"]
    assert len(case.intents()) == 1 and case.ends() == []
    assert_same_data(undisturbed["end"], case.root, "probe")


@pytest.mark.nightly
def test_a_dead_node_s_job_that_is_not_requeued_is_submitted_again_but_not_to_that_node_and_counts_as_no_attempt(
    slurm_cluster: Any, disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards scheduler._CAUSES' NODE_FAIL, policy.INTERRUPTIONS, and the nodes that policy.next_attempt excludes."""
    # Four nodes: of a partition of two, half would be too many to keep away from.
    case = disturb("probe", partition="preempt")
    with case.managed():
        case.until_stopped_in_md()
        before, node = case.segments(), case.mark(1)["node"]
        command("scontrol", "update", f"JobId={case.job()}", "Requeue=0")
        with losing(slurm_cluster, node, crash=True):
            case.until(case.ends, "the end is recorded")
        case.until(lambda: len(case.runs()) == 2, "a second attempt has begun")
        after = case.segments()
        assert {name: after[name] for name in before} == before
        case.until_finished()
    assert [(ending["cause"], ending["node"]) for ending in case.ends()] == [("node-failure", node)]
    assert [intent["needs"]["exclude"] for intent in case.intents()] == [[], [node]]
    assert case.runs()[1]["node"] != node
    assert_same_data(undisturbed["end"], case.root, "probe")

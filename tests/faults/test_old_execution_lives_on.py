"""A node is lost, its slurmd dead, and the step on it goes on: two executions of one task, under one job id."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data, has_ended, losing

pytestmark = pytest.mark.slurm


def test_an_execution_on_a_lost_node_ends_itself_and_its_successor_pays_only_for_the_labels_that_are_missing(
    slurm_cluster: Any, disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards the watch of an execution for a newer one (worker._ending_once_superseded), and the lock between the two."""
    case = disturb("reference")
    case.order("wait 3")
    with case.managed():
        case.until_labels_wait(3)
        old = case.mark(1)
        with losing(slurm_cluster, old["node"], crash=False):
            case.until(lambda: len(case.runs()) == 2, "the job has started again on another node")
            case.until(lambda: has_ended(old["pid"]), "the old execution has ended")
            case.order("go")
            case.until_finished()
    assert case.runs()[1]["node"] != old["node"]
    assert case.result()["about"]["execution"] == 2
    assert len(case.intents()) == 1 and case.ends() == []
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")


@pytest.mark.nightly
def test_an_execution_that_stood_still_while_its_successor_began_ends_when_it_wakes_up_and_spoils_no_md(
    slurm_cluster: Any, disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards that the watch looks at once when a frozen process goes on (worker._ending_once_superseded), and the lock."""
    case = disturb("probe")
    with case.managed():
        pid = case.until_stopped_in_md()
        with losing(slurm_cluster, case.mark(1)["node"], crash=False):
            case.until(lambda: len(case.runs()) == 2, "the job has started again on another node")
            assert not has_ended(pid)
            os.kill(pid, signal.SIGCONT)
            case.until_finished()
            case.until(lambda: has_ended(pid), "the old execution has ended")
    assert case.result()["about"]["execution"] == 2
    assert len(case.intents()) == 1 and case.ends() == []
    assert_same_data(undisturbed["end"], case.root, "probe")

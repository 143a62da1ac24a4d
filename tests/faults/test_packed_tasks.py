"""Several tasks of one rank share a job (`slurm.tasks_per_job`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data

pytestmark = pytest.mark.slurm


def test_tasks_that_share_a_job_give_the_bits_of_tasks_that_run_alone(
    disturb: Callable[..., Disturbed], undisturbed_in_two: dict[str, Path]
) -> None:
    """Guards that each rank of a packed job is told to be alone (worker.run_tasks)."""
    case = disturb("probe", tasks=2, tasks_per_job=2)
    with case.managed():
        case.until_finished()
    assert case.runs(0)[0]["job"] == case.runs(1)[0]["job"]
    assert len(case.intents()) == 1
    assert_same_data(undisturbed_in_two["end"], case.root, "probe")


def test_a_rank_that_dies_in_a_packed_job_leaves_the_other_task_alone_and_only_its_own_task_is_run_again(
    disturb: Callable[..., Disturbed], undisturbed_in_two: dict[str, Path]
) -> None:
    """Guards srun's --kill-on-bad-exit=0 for packed jobs (executors.slurm_parameters)."""
    case = disturb("reference", tasks=2, tasks_per_job=2, config={"max_attempts": 2})
    case.order("wait 2")
    with case.managed():
        case.until(
            lambda: case.runs(0) and case.runs(1) and len(case.journal(0)) + len(case.journal(1)) >= 2,
            "both tasks have begun, and wait",
        )
        os.kill(case.mark(1)["pid"], signal.SIGKILL)
        case.order("go")
        case.until_finished()
    assert [ending["cause"] for ending in case.ends(0)] == ["failed"] and case.ends(1) == []
    assert [intent["tasks"] for intent in case.intents()] == [[0, 1], [0]]
    assert [case.result(task)["about"]["attempt"] for task in (0, 1)] == [2, 1]
    # The label that the dead rank had in hand may have been computed, and not yet been written down.
    assert len(set(case.labels_paid())) == NUM_LABELS
    assert len(case.labels_paid()) <= NUM_LABELS + 1
    assert_same_data(undisturbed_in_two["end"], case.root, "reference")

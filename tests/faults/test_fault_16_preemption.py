"""A job must make way for one of a higher tier: it gets a signal, a few seconds of grace, and a new start later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data, hogging

pytestmark = pytest.mark.slurm


def test_a_preempted_task_has_every_finished_label_on_disk_when_it_ends_and_goes_on_once_there_is_room_again(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards that a label is durable before the next begins (Journal.append): the grace time has nothing left to save."""
    case = disturb("reference", partition="preempt", options={"nodelist": "n1"})
    case.order("wait 3")
    with case.managed():
        case.until_labels_wait(3)
        with hogging("n1"):
            case.until(lambda: case.job_state() == "PENDING", "the job has made way")
            assert len(case.journal()) == len(case.labels_paid()) == 3
            case.order("go")
        case.until_finished()
    one, two = case.runs()
    assert one["job"] == two["job"] and two["restarts"] == 1
    assert len(case.intents()) == 1 and case.ends() == []
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")

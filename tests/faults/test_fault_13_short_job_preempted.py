"""A job with a limit of ten minutes or less is preempted: submitit counts any signal to it as a time-out, and gives up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data, hogging, partition_with

pytestmark = pytest.mark.slurm


@pytest.fixture
def preempted_for_good(slurm_cluster: object) -> Iterator[None]:
    """Preempted jobs are cancelled here, not requeued: somebody has to decide what becomes of the task."""
    with partition_with("preempt", PreemptMode="CANCEL", GraceTime="2"):
        yield


def test_a_preempted_short_job_counts_as_preempted_and_is_submitted_again_though_one_attempt_is_all_it_has(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path], preempted_for_good: None
) -> None:
    """Guards that SIGUSR2 does not reach submitit (worker._ending_signals), and that policy.INTERRUPTIONS are no attempts."""
    case = disturb("reference", partition="preempt", options={"nodelist": "n1"})
    case.order("wait 3")
    with case.managed():
        assert case.manager.settings.max_attempts == 1
        assert case.manager.settings.resources_for("reference").time_min <= 10
        case.until_labels_wait(3)
        with hogging("n1"):
            case.until(case.ends, "the end of the preempted job is recorded")
            case.order("go")
        case.until_finished()
    assert [ending["cause"] for ending in case.ends()] == ["preempted"]
    assert [intent["attempt"] for intent in case.intents()] == [1, 2]
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")

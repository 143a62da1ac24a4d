"""Slurm starts a job again under its old id: by `scontrol requeue`, which sends SIGTERM and SIGCONT and nothing before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data, has_ended
from slurm_campaign import command

pytestmark = pytest.mark.slurm


def test_a_requeued_job_goes_on_as_a_new_execution_of_the_same_attempt_and_pays_for_no_label_twice(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards that executions are told apart where attempt and job id are the same (worker._claim), and read one journal."""
    case = disturb("reference")
    case.order("wait 3")
    with case.managed():
        case.until_labels_wait(3)
        first = case.mark(1)
        command("scontrol", "requeue", case.job())
        case.until(lambda: len(case.runs()) == 2, "the job has started again")
        assert has_ended(first["pid"])
        assert len(case.labels_paid()) == 3
        case.order("go")
        case.until_finished()
    one, two = case.runs()
    assert (one["job"], one["attempt"], one["restarts"]) == (two["job"], two["attempt"], 0)
    assert two["restarts"] == 1
    assert len(case.intents()) == 1 and case.ends() == []
    assert case.result()["about"]["execution"] == 2
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")

"""A task runs out of time: it gets twice the time, as far as the site goes, or what its user says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data, hpcft
from slurm_campaign import command

# Slurm looks at time limits every 30 s, and none is shorter than a minute.
pytestmark = [pytest.mark.slurm, pytest.mark.nightly]

SHORT = {"label": {"resources": {"time_min": 1}}}


def test_a_task_that_ran_out_of_time_gets_twice_the_time_and_pays_for_no_label_again(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards the cause that TIMEOUT stands for in scheduler._CAUSES, and policy._grown_time."""
    case = disturb("reference", config={"max_attempts": 2, **SHORT})
    case.order("wait 3")
    with case.managed():
        case.until(case.ends, "time has run out")
        case.order("go")
        case.until_finished()
    assert [ending["cause"] for ending in case.ends()] == ["time-limit"]
    assert [intent["needs"]["time_min"] for intent in case.intents()] == [None, 2]
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")


def test_tasks_that_ran_out_of_time_are_tried_again_with_the_time_that_their_user_gives_them(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards `hpcft retry --cause time-limit --set label.time_min=60` from the recorded cause to the job's own limit."""
    from hpcft.errors import CampaignStopped

    case = disturb("reference", config=SHORT)
    case.order("wait 3")
    with case.managed(), pytest.raises(CampaignStopped, match="time limit"):
        case.until_finished()
    hpcft("retry", case.root, "--stage", "reference", "--cause", "time-limit", "--set", "label.time_min=60")
    with case.managed():
        case.until(lambda: len(case.runs()) == 2, "a second attempt has begun")
        assert command("squeue", "-h", "-o", "%l", "-j", case.job(2)) == "1:00:00"
        case.order("go")
        case.until_finished()
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")

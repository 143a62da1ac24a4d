"""A task fails as often as it may: it is set aside, the round goes on, and a user brings it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dying_jobs import NUM_LABELS, Disturbed, assert_same_data, hpcft

pytestmark = pytest.mark.slurm


def test_a_task_that_failed_twice_is_set_aside_with_its_labels_kept_and_rewind_pays_only_for_those_it_lacks(
    disturb: Callable[..., Disturbed], undisturbed_in_two: dict[str, Path]
) -> None:
    """Guards decide._submissions' SetAside, label_tasks._salvage, and that mend.rewind registers the labels it moves."""
    case = disturb(
        "reference",
        tasks=2,
        config={"max_attempts": 2, "label": {"tolerated_failures": 0.5}},
        site={"max_running_tasks": 1},
    )
    case.order("break 2")
    with case.managed():
        case.until(lambda: len(case.ends()) == 2, "the first task has failed twice")
        assert len(case.labels_paid()) == 2
        case.order("go")
        case.until_finished()
        evaluate = case.folder.stage(0, "evaluate")
        case.manager.step()
        assert evaluate.plan.exists()
    product = json.loads(case.here.product.read_text())
    assert (product["done"], product["failed"], product["causes"]) == (6, 2, {"set-aside": 2})
    assert [ending["cause"] for ending in case.ends()] == ["error", "error"]
    assert list(case.here.read_set_aside()) == [0]
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == 6
    hpcft("rewind", case.root, "--round", 0, "--stage", "reference", "--yes")
    with case.managed():
        case.until_finished()
    assert case.here.read_set_aside() == {}
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed_in_two["end"], case.root, "reference", but_for="found")


def test_a_stage_that_stopped_for_a_failed_task_goes_on_after_retry_with_the_labels_that_the_task_had(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards mend.retry's markers and change_settings, and that a new attempt reads the journals of the old ones."""
    from hpcft.errors import CampaignStopped

    case = disturb("reference")
    case.order("break 3")
    with case.managed(), pytest.raises(CampaignStopped, match="no/such/program"):
        case.until_finished()
    case.order("go")
    said = hpcft("retry", case.root, "--stage", "reference", "--cause", "error", "--set", "label.time_min=60")
    assert "label.resources.time_min: 5 -> 60" in said and "task 0 will be tried again" in said
    with case.managed():
        case.until_finished()
    assert len(case.intents()) == 2
    assert len(case.labels_paid()) == len(set(case.labels_paid())) == NUM_LABELS
    assert_same_data(undisturbed["end"], case.root, "reference")

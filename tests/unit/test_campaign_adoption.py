"""Submissions of which nobody noted whether they arrived: one is adopted, what is too many or too late is cancelled."""

from __future__ import annotations

import pytest
from decisions import NOW, QUIET, UNKNOWN, alive, attempt, decided, ended, label, refused, submit

from hpcft.campaign.decide import SETTLING_S, Action, Adopt, CancelStrays, FoundSubmission, Submit, Wait
from hpcft.campaign.records import Attempt, Records

ARRAY = FoundSubmission("77", ("77_0", "77_1", "77_2"))
ADOPTED = Adopt(1, "label", 1, ARRAY.elements)


def unrecorded(*attempts: Attempt, age_s: float = 3600.0, **stage: object) -> Records:
    """Attempt 1 at all three tasks is an intent that nobody confirmed; others follow."""
    return label(attempt(1, 0, 1, 2, recorded=False, age_s=age_s), *attempts, **stage)  # type: ignore[arg-type]


def found(*submissions: FoundSubmission, of: int = 1) -> dict[int, tuple[FoundSubmission, ...]]:
    return {of: submissions}


@pytest.mark.parametrize("age_s", [0.0, SETTLING_S, 1e6])
def test_the_one_submission_of_the_right_shape_is_adopted_however_late_it_shows(age_s: float) -> None:
    assert decided(unrecorded(age_s=age_s), alive(found=found(ARRAY))) == [ADOPTED]


def test_a_single_job_is_adopted_for_a_single_task() -> None:
    single = FoundSubmission("78", ("78",))
    records = label(attempt(1, 0, recorded=False), num_tasks=1)
    assert decided(records, alive(found=found(single))) == [Adopt(1, "label", 1, ("78",))]


@pytest.mark.parametrize("elements", [("77_0", "77_1"), ("77",), (*ARRAY.elements, "77_3")])
def test_a_submission_of_another_shape_is_cancelled(elements: tuple[str, ...]) -> None:
    """Some of its elements have been cancelled by somebody, or it is not ours at all."""
    observation = alive(found=found(FoundSubmission("77", elements)))
    assert decided(unrecorded(), observation) == [CancelStrays(("77",))]


@pytest.mark.parametrize(("num_jobs", "fits"), [(1, False), (2, True), (3, False)])
def test_packed_tasks_have_fewer_jobs_than_they_are(num_jobs: int, fits: bool) -> None:
    records = label(attempt(1, 0, 1, 2, recorded=False, tasks_per_job=2))
    elements = tuple(f"77_{element}" for element in range(num_jobs))
    [action] = decided(records, alive(found=found(FoundSubmission("77", elements))))
    assert action == (Adopt(1, "label", 1, elements) if fits else CancelStrays(("77",)))


@pytest.mark.parametrize(
    "second", [FoundSubmission("80", ("80_0", "80_1", "80_2")), FoundSubmission("80", ("80_0",))]
)
def test_of_two_submissions_none_is_adopted(second: FoundSubmission) -> None:
    """They are held: both are cancelled, and their tasks are submitted again once they are gone."""
    assert decided(unrecorded(), alive(found=found(ARRAY, second))) == [CancelStrays(("77", "80"))]
    assert decided(unrecorded(), QUIET) == [submit(2, 0, 1, 2)]


@pytest.mark.parametrize(
    "newer",
    [
        attempt(2, 0, 1, 2),
        attempt(2, 0, 1, 2, recorded=False, age_s=1.0),
        attempt(2, 1),
    ],
)
def test_a_submission_that_shows_when_its_place_is_taken_is_cancelled(newer: Attempt) -> None:
    """Adopting it for some of its tasks would run the others twice."""
    assert decided(unrecorded(newer), alive(found=found(ARRAY))) == [CancelStrays(("77",))]


def test_a_newer_attempt_that_slurm_refused_has_taken_no_place() -> None:
    assert decided(unrecorded(refused(2, 0, 1, 2)), alive(found=found(ARRAY))) == [ADOPTED]


@pytest.mark.parametrize("stage", [{"done": [1]}, {"set_aside": [1]}])
def test_a_submission_of_a_task_that_is_over_by_now_is_cancelled(stage: dict[str, list[int]]) -> None:
    """An older execution, on a node that was given up, has come to its end after all."""
    assert decided(unrecorded(**stage), alive(found=found(ARRAY))) == [CancelStrays(("77",))]


def test_a_second_submission_that_shows_after_the_first_was_recorded_is_cancelled() -> None:
    records = label(attempt(1, 0, 1, 2))
    assert decided(records, alive(0, 1, 2, found=found(ARRAY))) == [CancelStrays(("77",))]


def test_a_submission_that_slurm_said_it_refused_is_not_adopted() -> None:
    assert decided(label(refused(1, 0, 1, 2)), alive(found=found(ARRAY))) == [CancelStrays(("77",))]


def test_strays_of_several_attempts_are_cancelled_at_once() -> None:
    records = unrecorded(attempt(2, 0, 1, 2, recorded=False), attempt(3, 0, 1, 2))
    observation = alive(found={1: (ARRAY,), 2: (FoundSubmission("80", ("80_0", "80_1", "80_2")),)})
    assert decided(records, observation) == [CancelStrays(("77", "80"))]


def test_what_is_found_comes_before_anything_is_submitted_or_written_down() -> None:
    records = label(attempt(1, 0), attempt(2, 1, recorded=False), endings={0: ended("lost")}, num_tasks=3)
    observation = alive(found=found(FoundSubmission("80", ("80",)), of=2))
    assert decided(records, observation) == [Adopt(1, "label", 2, ("80",))]


def test_once_adopted_it_is_an_attempt_like_any_other() -> None:
    job_ids = {task: f"77_{task}" for task in range(3)}
    adopted = Attempt(1, (0, 1, 2), "job-1", NOW - 3600.0, job_ids)
    assert decided(label(adopted), alive(0, 1, 2)) == [Wait("3 running")]


@pytest.mark.parametrize("observation", [QUIET, alive(0, 1, 2)])
def test_what_does_not_show_is_neither_adopted_nor_cancelled(observation: object) -> None:
    actions: list[Action] = decided(unrecorded(age_s=1.0), observation)  # type: ignore[arg-type]
    assert not any(isinstance(action, Adopt | CancelStrays | Submit) for action in actions)


def test_nothing_is_adopted_while_slurm_is_silent() -> None:
    assert decided(unrecorded(), UNKNOWN) == [Wait("the scheduler does not answer")]

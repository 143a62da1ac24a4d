"""Records of a stage and answers of a scheduler, made by hand for tests of what is decided from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.campaign.decide import Action, FoundSubmission, Observation, QueuedTask, Submit, decide
from hpcft.campaign.policy import Limits, Needs
from hpcft.campaign.records import Attempt, Cause, Ending, Records, Rejection, StageRecord

NOW = 1_000_000.0
QUIET = Observation()
UNKNOWN = Observation(known=False)
FINAL: Mapping[str, Any] = {"final": True, "message": "no such element"}
PASSING: Mapping[str, Any] = {"final": False, "message": "the node went away"}


def attempt(
    number: int,
    *tasks: int,
    recorded: bool = True,
    age_s: float = 3600.0,
    rejected: Rejection | None = None,
    tasks_per_job: int = 1,
) -> Attempt:
    """A submission of these tasks, so long ago; with `recorded` False nobody knows whether it arrived."""
    elements = [f"{100 + number}_{place}" for place in range(-(-len(tasks) // tasks_per_job))]
    new = Attempt(number, tasks, f"job-{number}", NOW - age_s, None, rejected, tasks_per_job)
    if not recorded or rejected is not None:
        return new
    return Attempt(number, tasks, new.job_name, new.at, new.job_ids_of(elements), None, tasks_per_job)


def refused(
    number: int, *tasks: int, limit: bool = True, age_s: float = 1.0, tasks_per_job: int = 1
) -> Attempt:
    words = "too many jobs" if limit else "Invalid qos specification"
    rejection = Rejection(limit, words)
    return attempt(number, *tasks, age_s=age_s, rejected=rejection, tasks_per_job=tasks_per_job)


def ended(*causes: Cause, first: int = 1, **about: Any) -> tuple[Ending, ...]:
    """One attempt after the other has ended so, a moment ago."""
    return tuple(Ending(first + place, cause, **{"at": NOW, **about}) for place, cause in enumerate(causes))


def error(number: int, of: Mapping[str, Any]) -> dict[str, Any]:
    return {"attempt": number, **of}


def label(
    *attempts: Attempt,
    num_tasks: int | None = 3,
    done: Sequence[int] = (),
    errors: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    resumed_after: int = 0,
    endings: Mapping[int, Sequence[Ending]] | None = None,
    set_aside: Sequence[int] = (),
) -> Records:
    """A campaign whose stage in progress is `label` of round 1, after stages that are finished."""
    before = StageRecord(1, "select", 1, (), frozenset({0}), {}, {"selected": 8})
    stage = StageRecord(
        1,
        "label",
        num_tasks,
        attempts,
        frozenset(done),
        {task: tuple(known) for task, known in (errors or {}).items()},
        resumed_after=resumed_after,
        endings={task: tuple(known) for task, known in (endings or {}).items()},
        set_aside=frozenset(set_aside),
    )
    return Records((before, stage), rounds=1)


def current(records: Records) -> StageRecord:
    assert records.current is not None
    return records.current


def alive(*tasks: int, found: Mapping[int, Sequence[FoundSubmission]] | None = None) -> Observation:
    """These tasks run, and nothing else does."""
    running = {task: QueuedTask(f"101_{task}", is_running=True) for task in tasks}
    return Observation(alive=running, found={number: tuple(jobs) for number, jobs in (found or {}).items()})


def gone(
    for_s: float, *tasks: int, ended: Mapping[int, Ending] | None = None, alive: Sequence[int] = ()
) -> Observation:
    """The jobs of these tasks have been over for so long."""
    running = {task: QueuedTask(f"101_{task}", is_running=True) for task in alive}
    return Observation(alive=running, ended=ended or {}, gone_for_s=dict.fromkeys(tasks, for_s))


def submit(number: int, *tasks: int, **needs: Any) -> Submit:
    return Submit(1, "label", tasks, number, Needs(**needs))


def decided(records: Records, observation: Observation, limits: Limits | None = None) -> list[Action]:
    return decide(records, observation, NOW, limits or Limits())

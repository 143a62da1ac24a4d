"""What to do next: a pure function of what is recorded, what the scheduler says, and the time."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.campaign.records import Attempt, Records, StageRecord, TaskKey

# An attempt of which only the intent was written may still show up in the queue for this long.
SETTLING_S = 15.0


@dataclass(frozen=True)
class Observation:
    """What the scheduler says. `alive` are tasks that wait or run; `known` is False when it did not answer."""

    alive: frozenset[TaskKey] = frozenset()
    known: bool = True
    strays: tuple[str, ...] = ()
    """Held jobs of an attempt whose submission was never recorded."""


@dataclass(frozen=True)
class Limits:
    max_attempts: int = 3
    max_running: int | None = None
    max_array: int | None = None
    """Elements of one submission; what is beyond follows in the next."""


@dataclass(frozen=True)
class Plan:
    round: int
    stage: str


@dataclass(frozen=True)
class Submit:
    round: int
    stage: str
    tasks: tuple[int, ...]
    attempt: int


@dataclass(frozen=True)
class CancelStrays:
    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class Collect:
    round: int
    stage: str


@dataclass(frozen=True)
class Wait:
    why: str


@dataclass(frozen=True)
class Stop:
    """The campaign cannot go on by itself."""

    why: str


@dataclass(frozen=True)
class Finish:
    pass


Action = Plan | Submit | CancelStrays | Collect | Wait | Stop | Finish


def decide(records: Records, observation: Observation, now: float, limits: Limits) -> list[Action]:
    """The actions to take now, in order; `Wait` alone when there is nothing to do yet.

    A result record is the only proof that a task is done. A task without one is submitted again only when the
    scheduler has answered and does not know it any more.
    """
    stage = records.current
    if stage is None:
        return [Finish()]
    if stage.num_tasks is None:
        return [Plan(stage.round, stage.name)]
    if not stage.missing:
        return [Collect(stage.round, stage.name)]
    if not observation.known:
        return [Wait("the scheduler does not answer")]
    if observation.strays:
        return [CancelStrays(observation.strays)]
    idle = [
        i
        for i in stage.missing
        if (stage.round, stage.name, i) not in observation.alive
        and not _is_settling(stage.latest_attempt(i), now)
    ]
    given_up = [i for i in idle if _is_given_up(stage, i, limits)]
    # A settling task may run for all we know: it takes room, and no verdict is passed on it yet.
    running = len(stage.missing) - len(idle)
    if given_up and not running:
        return [Stop(_why_stopped(stage, given_up))]
    if given_up or not idle:
        return [Wait(f"{running} running")]
    room = len(idle) if limits.max_running is None else max(0, limits.max_running - running)
    if room == 0:
        return [Wait(f"{running} running, {len(idle)} waiting for room")]
    size = room if limits.max_array is None else min(room, limits.max_array)
    number = 1 + max((a.number for a in stage.attempts), default=0)
    return [Submit(stage.round, stage.name, tuple(idle[:size]), number)]


def _is_settling(attempt: Attempt | None, now: float) -> bool:
    """A submission that may or may not have arrived: wait, do not submit again blindly."""
    return attempt is not None and attempt.job_ids is None and now - attempt.at < SETTLING_S


def _is_given_up(stage: StageRecord, task: int, limits: Limits) -> bool:
    latest = stage.latest_attempt(task)
    if latest is None or latest.number <= stage.resumed_after:
        return False
    final = any(e.get("final") and e.get("attempt") == latest.number for e in stage.errors.get(task, ()))
    return final or stage.attempts_since_resume(task) >= limits.max_attempts


def _why_stopped(stage: StageRecord, tasks: list[int]) -> str:
    first = tasks[0]
    errors = stage.errors.get(first, ())
    cause = (
        errors[-1]["message"]
        if errors
        else "it ended without a result or an error (killed, or out of memory?)"
    )
    several = f"tasks {', '.join(map(str, tasks))}" if len(tasks) > 1 else f"task {first}"
    tries = sum(1 for a in stage.attempts if first in a.tasks)
    return (
        f"round {stage.round}, stage {stage.name}: {several} failed after {tries} attempt{'s' * (tries != 1)}. "
        f"Task {first}: {cause}"
    )

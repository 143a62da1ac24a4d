"""What to do next: a pure function of what is recorded, what the scheduler says, and the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpcft.campaign.policy import GivenUp, Limits, Needs, describe, next_attempt
from hpcft.campaign.records import Attempt, Ending, Records, StageRecord

# An attempt of which only the intent was written may still show up in the queue for this long.
SETTLING_S = 15.0
# Results cross a network file system, and endings reach accounting, with a delay.
GONE_S = 5.0
UNEXPLAINED_S = 60.0
# Submissions in a row that nobody confirmed and that never arrived, while Slurm answers.
MAX_UNCONFIRMED = 100
LONGEST_SETTLING_S = 300.0
# After Slurm has refused one more job because there are too many.
LIMIT_BACKOFF_S = 30.0


@dataclass(frozen=True)
class QueuedTask:
    """The job of a task that waits or runs."""

    job_id: str
    is_running: bool
    reason: str = ""
    node: str = ""


@dataclass(frozen=True)
class FoundSubmission:
    """Jobs in the queue that bear the name of an attempt whose submission was never recorded."""

    job_id: str
    """Id of the whole array, or of the single job."""
    elements: tuple[str, ...]


@dataclass(frozen=True)
class Observation:
    """What the scheduler says of the current stage; `known` is False when it did not answer."""

    known: bool = True
    silence: str = ""
    """What the scheduler's command said when it gave no answer."""
    alive: Mapping[int, QueuedTask] = field(default_factory=dict)
    ended: Mapping[int, Ending] = field(default_factory=dict)
    """How jobs ended that are over, as far as the scheduler or its accounting knows."""
    gone_for_s: Mapping[int, float] = field(default_factory=dict)
    """Time since a recorded job was first seen to be over."""
    found: Mapping[int, tuple[FoundSubmission, ...]] = field(default_factory=dict)
    """By attempt."""
    num_queued: int = 0
    """Jobs of this user in the queue, those of other campaigns and programs included."""


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
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True)
class Adopt:
    """Record a submission that arrived although nobody noted its job id."""

    round: int
    stage: str
    attempt: int
    elements: tuple[str, ...]


@dataclass(frozen=True)
class RecordEndings:
    round: int
    stage: str
    endings: Mapping[int, Ending]


@dataclass(frozen=True)
class CancelStrays:
    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class SetAside:
    """Go on without these tasks."""

    round: int
    stage: str
    why: Mapping[int, str]


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


Action = Plan | Submit | Adopt | RecordEndings | CancelStrays | SetAside | Collect | Wait | Stop | Finish


def decide(records: Records, observation: Observation, now: float, limits: Limits) -> list[Action]:
    """The actions to take now, in order; `Wait` alone when there is nothing to do yet.

    A result record is the only proof that a task is done. A task without one is submitted again only when the
    scheduler has answered, does not know its job any more, and the way it ended has been written down.
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
    found = _unrecorded(stage, observation)
    if found:
        return found
    ended = _newly_ended(stage, observation)
    if ended:
        return [RecordEndings(stage.round, stage.name, ended)]
    return _submissions(stage, observation, now, limits)


def is_open(stage: StageRecord, task: int) -> bool:
    """Whether an attempt at the task is under way, or may be for all that is written down."""
    latest = stage.latest_attempt(task)
    return latest is not None and stage.ending(task, latest.number) is None


def _unrecorded(stage: StageRecord, observation: Observation) -> list[Action]:
    """Adopt the one submission of the right shape; of several, or of one that came too late, cancel all: they are held."""
    strays: list[str] = []
    missing = set(stage.missing)
    for attempt in stage.attempts:
        found = observation.found.get(attempt.number, ())
        # Its place may have been taken by a later attempt while Slurm kept it to itself.
        wanted = attempt.job_ids is None and all(
            task in missing and stage.latest_attempt(task) is attempt for task in attempt.tasks
        )
        right = [f for f in found if len(f.elements) == attempt.num_jobs]
        if wanted and len(found) == len(right) == 1:
            return [Adopt(stage.round, stage.name, attempt.number, right[0].elements)]
        strays += [f.job_id for f in found]
    return [CancelStrays(tuple(strays))] if strays else []


def _newly_ended(stage: StageRecord, observation: Observation) -> dict[int, Ending]:
    """Attempts that are over, and whose end is not written down yet."""
    ended: dict[int, Ending] = {}
    for task in stage.missing:
        latest = stage.latest_attempt(task)
        if latest is None or task in observation.alive or not is_open(stage, task):
            continue
        error = stage.error(task, latest.number)
        gone_for = observation.gone_for_s.get(task, 0.0)
        ending = observation.ended.get(task)
        if error is not None:
            ended[task] = Ending(latest.number, error.get("cause", "error"), node=error.get("host"))
        elif latest.job_ids is None:
            continue
        elif ending is not None and gone_for >= GONE_S:
            ended[task] = ending
        elif gone_for >= UNEXPLAINED_S:
            ended[task] = Ending(latest.number, "lost")
    return ended


def _submissions(stage: StageRecord, observation: Observation, now: float, limits: Limits) -> list[Action]:
    busy = {
        task
        for task in stage.missing
        if task in observation.alive or (is_open(stage, task) and not _never_arrived(stage, task, now))
    }
    verdicts = {task: next_attempt(stage, task, limits, now) for task in stage.missing if task not in busy}
    given_up = {task: verdict.why for task, verdict in verdicts.items() if isinstance(verdict, GivenUp)}
    wanted = {task: verdict for task, verdict in verdicts.items() if isinstance(verdict, Needs)}
    too_many = len(given_up) + len(stage.set_aside) > limits.tolerated
    if given_up and too_many:
        # Let what runs come to its end, and submit nothing more.
        return [Wait(_waiting(observation, busy))] if busy else [Stop(_why_stopped(stage, given_up))]
    if given_up and not busy and not wanted:
        return [SetAside(stage.round, stage.name, given_up)]
    if not wanted:
        return [Wait(_waiting(observation, busy))]
    refused = _refusal(stage)
    if refused is not None and refused.rejected is not None and not refused.rejected.limit:
        if refused.excluded:  # perhaps there is no other node: any is better than none
            anywhere = {task: replace(needs, exclude=()) for task, needs in wanted.items()}
            return _chunks(stage, anywhere, busy, None, now, limits)
        return [Stop(f"round {stage.round}, stage {stage.name}: {refused.rejected.message}")]
    vain = _submitted_in_vain(stage)
    if len(vain) >= MAX_UNCONFIRMED:
        return [
            Stop(
                f"round {stage.round}, stage {stage.name}: {len(vain)} submissions in a row were not confirmed and never "
                f"arrived. {vain[-1].unconfirmed}".rstrip()
            )
        ]
    return _chunks(stage, wanted, busy, refused, now, limits) or [
        Wait(f"{_waiting(observation, busy)}, {len(wanted)} waiting for room")
    ]


def _chunks(
    stage: StageRecord,
    wanted: Mapping[int, Needs],
    busy: set[int],
    refused: Attempt | None,
    now: float,
    limits: Limits,
) -> list[Action]:
    """Submissions of tasks that need the same, within every limit on their number."""
    packed = limits.tasks_per_job
    free = len(wanted) if limits.max_running is None else max(0, limits.max_running - len(busy))
    # From here on counts of jobs: tasks that need different things cannot share one.
    room = len(wanted) if limits.room is None else limits.room
    size = len(wanted) if limits.max_array is None else limits.max_array
    if (
        refused is not None and refused.rejected is not None
    ):  # fewer at a time, until Slurm takes them; one alone has to wait
        if refused.num_jobs == 1 and 0 <= now - refused.at < LIMIT_BACKOFF_S:
            return []
        room = min(size, room, max(1, refused.num_jobs // 2))
    groups: dict[Needs, list[int]] = defaultdict(list)
    for task in sorted(wanted)[:free]:
        groups[wanted[task]].append(task)
    number = max((a.number for a in stage.attempts), default=0)
    actions: list[Action] = []
    for needs, tasks in groups.items():
        while tasks and room > 0:
            number += 1
            chunk = tuple(tasks[: min(size, room) * packed])
            tasks = tasks[len(chunk) :]
            room -= -(-len(chunk) // packed)
            actions.append(Submit(stage.round, stage.name, chunk, number, needs))
    return actions


def _never_arrived(stage: StageRecord, task: int, now: float) -> bool:
    """A submission that nobody confirmed, that is not in the queue, and that has had the time to get there."""
    latest = stage.latest_attempt(task)
    if latest is None or latest.job_ids is not None:
        return False
    # One that timed out may have been taken all the same; a controller that is too busy is not asked faster and faster.
    times = min(len(_submitted_in_vain(stage)), 10)
    # A time that lies ahead is another host's. Should that submission yet arrive, it is held, and cancelled as a stray.
    return not 0 <= now - latest.at < min(SETTLING_S * 2.0 ** max(0, times - 1), LONGEST_SETTLING_S)


def _submitted_in_vain(stage: StageRecord) -> list[Attempt]:
    """The newest submissions since the user last said to go on, as far as none of them arrived."""
    vain: list[Attempt] = []
    for attempt in reversed(stage.attempts):
        if attempt.number <= stage.resumed_after or attempt.job_ids is not None or attempt.rejected:
            break
        vain.insert(0, attempt)
    return vain


def _refusal(stage: StageRecord) -> Attempt | None:
    """The newest submission, if Slurm has refused it and nobody has said to go on since."""
    if not stage.attempts or stage.attempts[-1].number <= stage.resumed_after:
        return None
    return stage.attempts[-1] if stage.attempts[-1].rejected is not None else None


def _waiting(observation: Observation, busy: set[int]) -> str:
    running = sum(1 for task in busy if task in observation.alive and observation.alive[task].is_running)
    reasons: dict[str, int] = defaultdict(int)
    for task in busy:
        queued = observation.alive.get(task)
        if queued is not None and not queued.is_running:
            reasons[queued.reason or "no reason given"] += 1
    parts = [f"{running} running"]
    parts += [f"{count} pending ({reason})" for reason, count in sorted(reasons.items())]
    settling = len(busy) - running - sum(reasons.values())
    return ", ".join(parts + [f"{settling} unclear"] * bool(settling))


def _why_stopped(stage: StageRecord, given_up: Mapping[int, str]) -> str:
    tasks: Sequence[int] = sorted(given_up)
    first = tasks[0]
    shown = ", ".join(map(str, tasks[:10])) + (", ..." if len(tasks) > 10 else "")
    several = f"tasks {shown}" if len(tasks) > 1 else f"task {first}"
    tries = sum(1 for a in stage.attempts_at(first) if a.rejected is None and a.job_ids is not None)
    ending = stage.endings[first][-1]
    error = stage.error(first, ending.attempt)
    cause = describe(ending, error["message"] if error else None)
    return (
        f"round {stage.round}, stage {stage.name}: {several} failed after {tries} attempt{'s' * (tries != 1)}. "
        f"Task {first}: {cause}"
    )

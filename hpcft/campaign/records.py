"""What is known of a campaign, read from its small immutable files; any number of readers, no lock, no Slurm."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from hpcft.errors import UserError
from hpcft.storage.atomic import TEMPORARY_PREFIX, read_json
from hpcft.storage.campaign_folder import CampaignFolder, Outcomes, StageFolder

Cause = Literal[
    "error",
    "time-limit",
    "out-of-memory",
    "node-failure",
    "preempted",
    "cancelled",
    "failed",
    "lost",
]
"""Why an attempt ended without a result. error: the task said why; failed: its job failed without a word; lost: nobody
knows."""
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True)
class Ending:
    """How one attempt at one task ended without a result."""

    attempt: int
    cause: Cause
    at: float = 0.0
    node: str | None = None
    detail: str = ""
    memory_GB: float | None = None
    """What the job had asked for, where accounting says it."""


@dataclass(frozen=True)
class Rejection:
    """Slurm's refusal of a submission. `limit`: too many jobs at the moment, so a smaller or later one may pass."""

    limit: bool
    message: str


@dataclass(frozen=True)
class Attempt:
    """One submission of some tasks of a stage. `job_ids` is None while nobody knows whether the submission arrived."""

    number: int
    tasks: tuple[int, ...]
    job_name: str
    at: float
    job_ids: Mapping[int, str] | None
    rejected: Rejection | None = None
    tasks_per_job: int = 1
    excluded: tuple[str, ...] = ()
    """Nodes that were not to be used."""
    unconfirmed: str = ""
    """What sbatch said when it left open whether the jobs arrived."""

    @property
    def num_jobs(self) -> int:
        return -(-len(self.tasks) // self.tasks_per_job)

    def job_ids_of(self, elements: list[str]) -> dict[int, str]:
        """The job of each task, where `elements` are the ids of this submission's jobs in order."""
        return {task: elements[place // self.tasks_per_job] for place, task in enumerate(self.tasks)}


@dataclass(frozen=True)
class StageRecord:
    """One stage of one round. `num_tasks` is None before it is planned; `resumed_after` is the newest attempt that there
    was when a user last said to go on: a number, for the clocks of two hosts may differ.
    """

    round: int
    name: str
    num_tasks: int | None = None
    attempts: tuple[Attempt, ...] = ()
    done: frozenset[int] = frozenset()
    errors: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    product: Mapping[str, Any] | None = None
    resumed_after: int = 0
    endings: Mapping[int, tuple[Ending, ...]] = field(default_factory=dict)
    set_aside: frozenset[int] = frozenset()
    runs: Mapping[int, int] = field(default_factory=dict)
    retried_after: Mapping[int, int] = field(default_factory=dict)
    """As `resumed_after`, of single tasks."""

    def counted_after(self, task: int) -> int:
        """Only attempts beyond this one count against the task."""
        return max(self.resumed_after, self.retried_after.get(task, 0))

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """Tasks that are neither done nor set aside."""
        return tuple(i for i in range(self.num_tasks or 0) if i not in self.done and i not in self.set_aside)

    @cached_property
    def _attempts_by_task(self) -> Mapping[int, tuple[Attempt, ...]]:
        found: dict[int, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            for task in attempt.tasks:
                found[task].append(attempt)
        return {task: tuple(attempts) for task, attempts in found.items()}

    def attempts_at(self, task: int) -> tuple[Attempt, ...]:
        return self._attempts_by_task.get(task, ())

    def latest_attempt(self, task: int) -> Attempt | None:
        """The newest submission of a task that Slurm did not refuse."""
        return next((a for a in reversed(self.attempts_at(task)) if a.rejected is None), None)

    def ending(self, task: int, attempt: int) -> Ending | None:
        return next((e for e in self.endings.get(task, ()) if e.attempt == attempt), None)

    def error(self, task: int, attempt: int) -> Mapping[str, Any] | None:
        return next((e for e in self.errors.get(task, ()) if e["attempt"] == attempt), None)


@dataclass(frozen=True)
class Records:
    """All stages from the first to the one in progress."""

    stages: tuple[StageRecord, ...]
    rounds: int

    @property
    def current(self) -> StageRecord | None:
        """The stage that has no product yet; None when the campaign is finished."""
        return next((stage for stage in self.stages if stage.product is None), None)


def read_records(folder: CampaignFolder) -> Records:
    """Everything up to and including the first stage without a product; UserError naming the file that is damaged."""
    with _naming(folder.identity):
        places = folder.places()
    rounds = places[-1][0]
    stages: list[StageRecord] = []
    for round_, name in places:
        stages.append(_read_stage(folder, round_, name))
        if stages[-1].product is None:
            break
    return Records(tuple(stages), rounds)


def intents_of(stage: StageFolder) -> list[Path]:
    """The intents of all attempts, oldest first; not what a killed writer has left of one."""
    return [path for path in stage.intents() if not path.name.startswith(TEMPORARY_PREFIX)]


def _number(path: Path) -> int:
    with _naming(path):
        number = int(path.name.partition("-")[0])
    return number


def _read_stage(folder: CampaignFolder, round_: int, name: str) -> StageRecord:
    product = folder.stage(round_, name).product
    try:
        return _read_stage_now(folder, round_, name)
    except UserError:
        if not product.exists():
            raise
        # A manager has finished and packed the stage while we read it; a damaged record complains again.
        return _read_stage_now(folder, round_, name)


def _read_stage_now(folder: CampaignFolder, round_: int, name: str) -> StageRecord:
    stage = folder.stage(round_, name)
    if stage.product.exists():
        with _naming(stage.product):
            product = read_json(stage.product)
            count = int(product["tasks"])
        return StageRecord(round_, name, count, done=frozenset(range(count)), product=product)
    if not stage.plan.exists():
        return StageRecord(round_, name)
    with _naming(stage.plan):
        count = len(read_json(stage.plan)["tasks"])
    outcomes = stage.list_outcomes()
    resumed_after, retried_after = _markers(folder, round_, name)
    return StageRecord(
        round_,
        name,
        count,
        attempts=tuple(read_attempt(stage, _number(path)) for path in intents_of(stage)),
        done=frozenset(task for task in outcomes.done if task < count),
        errors=_read_errors(stage, outcomes),
        resumed_after=resumed_after,
        retried_after=retried_after,
        endings=_read_endings(stage),
        set_aside=frozenset(task for task in outcomes.set_aside if task < count),
        runs=outcomes.runs,
    )


def read_attempt(stage: StageFolder, number: int) -> Attempt:
    intent = stage.intent(number)
    with _naming(intent):
        content = read_json(intent)
        attempt = Attempt(
            number=int(content["attempt"]),
            tasks=tuple(content["tasks"]),
            job_name=str(content["job_name"]),
            at=float(content["at"]),
            job_ids=_read_job_ids(stage.submitted(number)),
            rejected=_read_rejection(stage.rejected(number)),
            tasks_per_job=int(content.get("tasks_per_job", 1)),
            excluded=tuple(content.get("needs", {}).get("exclude", ())),
            unconfirmed=_read_unconfirmed(stage.unconfirmed(number)),
        )
    return attempt


def _read_job_ids(path: Path) -> Mapping[int, str] | None:
    if not path.exists():
        return None
    with _naming(path):
        job_ids = {int(task): str(job) for task, job in read_json(path)["job_ids"].items()}
    return job_ids


def _read_rejection(path: Path) -> Rejection | None:
    if not path.exists():
        return None
    with _naming(path):
        content = read_json(path)
        rejection = Rejection(bool(content["limit"]), str(content["message"]))
    return rejection


def _read_unconfirmed(path: Path) -> str:
    if not path.exists():
        return ""
    with _naming(path):
        message = str(read_json(path)["message"])
    return message


def _read_errors(stage: StageFolder, outcomes: Outcomes) -> dict[int, tuple[Mapping[str, Any], ...]]:
    """What the tasks that are not done have said, oldest first."""
    return {
        task: tuple(_read_error(stage.task(task).error(number)) for number in numbers)
        for task, numbers in outcomes.errors.items()
        if task not in outcomes.done
    }


def _read_error(path: Path) -> Mapping[str, Any]:
    with _naming(path):
        content = read_json(path)
        error = {**content, "attempt": int(content["attempt"]), "message": str(content["message"])}
    return error


def _read_endings(stage: StageFolder) -> dict[int, tuple[Ending, ...]]:
    found: dict[int, list[Ending]] = defaultdict(list)
    for path in stage.endings():
        with _naming(path):
            content = read_json(path)
            for task, ending in content["tasks"].items():
                found[int(task)].append(Ending(at=float(content["at"]), **ending))
    return {task: tuple(endings) for task, endings in found.items()}


def _markers(folder: CampaignFolder, round_: int, stage: str) -> tuple[int, dict[int, int]]:
    """The newest attempt when a user last said to go on: with the whole stage, and with single tasks."""
    newest, by_task = 0, dict[int, int]()
    for path in folder.resumes.glob("[0-9]*.json"):
        with _naming(path):
            marker = read_json(path)
            if (marker["round"], marker["stage"]) != (round_, stage):
                continue
            attempt = int(marker["attempt"])
            for task in marker.get("tasks") or ():
                by_task[task] = max(attempt, by_task.get(task, 0))
            if marker.get("tasks") is None:
                newest = max(newest, attempt)
    return newest, by_task


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A record that is gone, or that lacks what it was written with, is the user's to mend: say which one."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is not what hpcft wrote there"
        raise UserError(
            f"{path} {what} ({type(error).__name__}: {error}), so it was damaged or edited by hand. "
            "Restore it from a backup: hpcft writes such a record once and never changes it."
        ) from error

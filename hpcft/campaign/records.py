"""What is known of a campaign, read from its small immutable files; any number of readers, no lock, no Slurm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.storage.atomic import TEMPORARY_PREFIX, read_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder, stages_of

TaskKey = tuple[int, str, int]
"""Round, stage, task."""


@dataclass(frozen=True)
class Attempt:
    """One submission of some tasks of a stage. `job_ids` is None while nobody knows whether the submission arrived."""

    number: int
    tasks: tuple[int, ...]
    job_name: str
    at: float
    job_ids: Mapping[int, str] | None


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

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_tasks or 0) if i not in self.done)

    def latest_attempt(self, task: int) -> Attempt | None:
        return next((a for a in reversed(self.attempts) if task in a.tasks), None)

    def attempts_since_resume(self, task: int) -> int:
        return sum(1 for a in self.attempts if task in a.tasks and a.number > self.resumed_after)


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
        rounds = int(folder.read_identity()["rounds"])
    stages: list[StageRecord] = []
    for round_ in range(rounds + 1):
        for name in stages_of(round_):
            stages.append(_read_stage(folder, round_, name))
            if stages[-1].product is None:
                return Records(tuple(stages), rounds)
    return Records(tuple(stages), rounds)


def intents_of(stage: StageFolder) -> list[Path]:
    """The intents of all attempts, oldest first; not what a killed writer has left of one."""
    return [path for path in stage.intents() if not path.name.startswith(TEMPORARY_PREFIX)]


def _read_stage(folder: CampaignFolder, round_: int, name: str) -> StageRecord:
    stage = folder.stage(round_, name)
    if stage.product.exists():
        count = _count_tasks(stage.plan)
        done = frozenset(range(count))
        return StageRecord(round_, name, count, (), done, {}, read_json(stage.product))
    if not stage.plan.exists():
        return StageRecord(round_, name)
    count = _count_tasks(stage.plan)
    attempts = tuple(_read_attempt(path, stage) for path in intents_of(stage))
    done = frozenset(i for i in range(count) if stage.task(i).result.exists())
    errors = {i: tuple(_read_error(path) for path in stage.task(i).errors()) for i in range(count)}
    known = {i: e for i, e in errors.items() if e}
    resumed_after = _resumed_after(folder, round_, name)
    return StageRecord(round_, name, count, attempts, done, known, resumed_after=resumed_after)


def _count_tasks(plan: Path) -> int:
    with _naming(plan):
        count = len(read_json(plan)["tasks"])
    return count


def _read_attempt(intent: Path, stage: StageFolder) -> Attempt:
    with _naming(intent):
        content = read_json(intent)
        number = int(content["attempt"])
        tasks, job_name, at = tuple(content["tasks"]), str(content["job_name"]), float(content["at"])
    submitted = stage.submitted(number)
    job_ids = None
    if submitted.exists():
        with _naming(submitted):
            job_ids = {int(task): str(job) for task, job in read_json(submitted)["job_ids"].items()}
    return Attempt(number, tasks, job_name, at, job_ids)


def _read_error(path: Path) -> Mapping[str, Any]:
    with _naming(path):
        content = read_json(path)
        error = {**content, "attempt": int(content["attempt"]), "message": str(content["message"])}
    return error


def _resumed_after(folder: CampaignFolder, round_: int, stage: str) -> int:
    newest = 0
    for path in folder.resumes.glob("[0-9]*.json"):
        with _naming(path):
            marker = read_json(path)
            if (marker["round"], marker["stage"]) == (round_, stage):
                newest = max(newest, int(marker["attempt"]))
    return newest


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

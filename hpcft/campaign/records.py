"""What is known of a campaign, read from its small immutable files; any number of readers, no lock, no Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.storage.atomic import read_json
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
    """One stage of one round. `num_tasks` is None before it is planned."""

    round: int
    name: str
    num_tasks: int | None = None
    attempts: tuple[Attempt, ...] = ()
    done: frozenset[int] = frozenset()
    errors: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    product: Mapping[str, Any] | None = None

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_tasks or 0) if i not in self.done)

    def latest_attempt(self, task: int) -> Attempt | None:
        return next((a for a in reversed(self.attempts) if task in a.tasks), None)

    def attempts_since(self, task: int, moment: float) -> int:
        return sum(1 for a in self.attempts if task in a.tasks and a.at >= moment)


@dataclass(frozen=True)
class Records:
    """All stages from the first to the one in progress; `resumed_at` is when a user last said to go on."""

    stages: tuple[StageRecord, ...]
    rounds: int
    resumed_at: float = 0.0

    @property
    def current(self) -> StageRecord | None:
        """The stage that has no product yet; None when the campaign is finished."""
        return next((stage for stage in self.stages if stage.product is None), None)


def read_records(folder: CampaignFolder) -> Records:
    """Everything up to and including the first stage without a product."""
    rounds = int(folder.read_identity()["rounds"])
    stages: list[StageRecord] = []
    for round_ in range(rounds + 1):
        for name in stages_of(round_):
            stages.append(_read_stage(folder.stage(round_, name), round_, name))
            if stages[-1].product is None:
                return Records(tuple(stages), rounds, _resumed_at(folder))
    return Records(tuple(stages), rounds, _resumed_at(folder))


def _read_stage(stage: StageFolder, round_: int, name: str) -> StageRecord:
    if stage.product.exists():
        plan = read_json(stage.plan)
        count = len(plan["tasks"])
        done = frozenset(range(count))
        return StageRecord(round_, name, count, (), done, {}, read_json(stage.product))
    if not stage.plan.exists():
        return StageRecord(round_, name)
    count = len(read_json(stage.plan)["tasks"])
    attempts = tuple(_read_attempt(path, stage) for path in stage.intents())
    done = frozenset(i for i in range(count) if stage.task(i).result.exists())
    errors = {i: tuple(read_json(path) for path in stage.task(i).errors()) for i in range(count)}
    return StageRecord(round_, name, count, attempts, done, {i: e for i, e in errors.items() if e})


def _read_attempt(intent: Path, stage: StageFolder) -> Attempt:
    content = read_json(intent)
    number = int(content["attempt"])
    submitted = stage.submitted(number)
    job_ids = None
    if submitted.exists():
        job_ids = {int(task): str(job) for task, job in read_json(submitted)["job_ids"].items()}
    return Attempt(number, tuple(content["tasks"]), content["job_name"], float(content["at"]), job_ids)


def _resumed_at(folder: CampaignFolder) -> float:
    return max((float(read_json(path)["at"]) for path in folder.resumes.glob("*.json")), default=0.0)

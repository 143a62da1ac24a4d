"""What a stage is given, and what it must be able to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpcft.config.campaign import Campaign
from hpcft.config.settings import Settings
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder, TaskFolder
from hpcft.training.rank import Rank


class Superseded(RuntimeError):
    """A newer attempt owns this task: this one must not publish anything more."""


@dataclass(frozen=True)
class StageContext:
    folder: CampaignFolder
    settings: Settings
    round: int
    stage: str
    device: str = "auto"
    mpi: tuple[str, ...] = ()
    """The site's words that start a reference code's MPI ranks, with {ranks} among them."""

    @property
    def campaign(self) -> Campaign:
        """The settings, for the stages that only a campaign has."""
        assert isinstance(self.settings, Campaign)
        return self.settings

    @property
    def here(self) -> StageFolder:
        return self.folder.stage(self.round, self.stage)

    def task_folder(self, index: int) -> Path:
        return self.here.task(index).path

    def plan(self, stage: str | None = None, round_: int | None = None) -> list[dict[str, Any]]:
        """The task payloads of a stage that has been planned."""
        where = self.folder.stage(self.round if round_ is None else round_, stage or self.stage)
        return list(read_json(where.plan)["tasks"])

    def tasks_of(self, stage: str, round_: int | None = None) -> list[TaskFolder]:
        """The tasks of a finished stage that have a result, in order; those that were set aside are missing."""
        round_ = self.round if round_ is None else round_
        where = self.folder.stage(round_, stage)
        aside = where.read_set_aside()
        return [where.task(i) for i in range(len(self.plan(stage, round_))) if i not in aside]

    def results(self) -> list[dict[str, Any]]:
        """The result of each task of this stage that has one, in order."""
        return [result for _, result in sorted(self.here.read_results().items())]

    def product(self, stage: str) -> dict[str, Any]:
        """What a stage of this round has left, once it is finished."""
        return dict(read_json(self.folder.stage(self.round, stage).product))

    def model(self, round_: int) -> Path:
        """The model that round `round_` produced; round 0 is the foundation."""
        if round_ == 0:
            return self.folder.inputs / str(self.folder.read_identity()["foundation_file"])
        return self.folder.stage(round_, "train").task(0).path / "model.pt"

    def entropy(self, *names: object) -> tuple[int, ...]:
        """Seed material of its own for everything that has a name: the campaign's seed and a hash of the name."""
        digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
        return (self.campaign.seed, *(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8, 12)))


@dataclass(frozen=True)
class TaskContext:
    """One task of one stage, as its ranks see it. `attempt` numbers the executions."""

    context: StageContext
    index: int
    payload: Mapping[str, Any]
    attempt: int
    rank: Rank
    is_owned: Callable[[], bool] = lambda: True
    """Whether this is still the newest execution of the task."""
    is_ending: Callable[[], bool] = lambda: False
    """Whether the scheduler has announced the end of this execution."""

    def ensure_owned(self) -> None:
        """Asked before each publication: Superseded if another execution, or a later time, owns the task's files."""
        if not self.is_owned():
            raise Superseded(f"{self.path} belongs to a newer execution, or its stage is over")

    @property
    def path(self) -> Path:
        return self.context.task_folder(self.index)


class Stage(Protocol):
    """`plan` and `collect` run in the manager and must be light; `run` runs in a job and may be killed anywhere."""

    def ranks(self, settings: Settings) -> int:
        """Processes per task."""

    def plan(self, context: StageContext) -> Sequence[Mapping[str, Any]]:
        """Payloads of the tasks, numbered from 0: pure and deterministic."""

    def run(self, task: TaskContext) -> dict[str, Any]:
        """Do what is still missing of one task; the result becomes its result.json."""

    def collect(self, context: StageContext) -> dict[str, Any]:
        """The stage's product from the tasks' results; may be repeated."""

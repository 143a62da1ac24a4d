"""The one place that knows every file name inside a campaign folder."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from hpcft.errors import UserError
from hpcft.storage.atomic import read_json, reopening

FORMAT = 2
"""Layout of a campaign's folder; it changes when another version could misread it."""

STAGES = ("explore", "select", "label", "train", "probe", "reference", "evaluate")
# Round 0 has no training: it measures the bias of the foundation model itself.
STAGES_OF_ROUND_0 = ("probe", "reference", "evaluate")
# `hpcft label` is round 0 of a kind of its own.
STAGES_OF_LABELS = ("label",)

Kind = Literal["campaign", "label"]
"""What a folder is of: a campaign, or labels alone."""

# A file in a task's folder: the user wants what has failed there, of some causes, to be tried again.
RETRY_FAILURES = "retry-failures.json"


def stages_of(round_: int, kind: Kind = "campaign") -> tuple[str, ...]:
    if kind == "label":
        return STAGES_OF_LABELS
    return STAGES_OF_ROUND_0 if round_ == 0 else STAGES


def _names_in(folder: Path) -> list[str]:
    """Nothing where there is no folder. (A Path for each of tens of thousands, once a second, would cost more.)"""
    try:
        return reopening(lambda: os.listdir(folder))  # noqa: PTH208
    except FileNotFoundError:
        return []


_Content = TypeVar("_Content")

_OUTCOME = re.compile(r"(\d+)\.(result|aside|run|error)(?:-(\d+))?\.json")


@dataclass(frozen=True)
class Outcomes:
    """What the tasks of a stage have left of themselves, from the names of one folder's files."""

    done: frozenset[int] = frozenset()
    set_aside: frozenset[int] = frozenset()
    errors: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Attempts that ended with an error, by task."""
    runs: Mapping[int, int] = field(default_factory=dict)
    """Number of the newest execution, by task."""


@dataclass(frozen=True)
class StageFolder:
    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def product(self) -> Path:
        return self.path / "product.json"

    @property
    def label_table(self) -> Path:
        """Of a finished label stage: what its labels are judged by beside those of later ones."""
        return self.path / "label-table.h5"

    @property
    def provenance(self) -> Path:
        """Of a label stage that has begun: what its files of labels say of the reference."""
        return self.path / "provenance.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    def intent(self, attempt: int) -> Path:
        return self.attempts / f"{attempt:04d}-intent.json"

    def submitted(self, attempt: int) -> Path:
        return self.attempts / f"{attempt:04d}-submitted.json"

    def rejected(self, attempt: int) -> Path:
        return self.attempts / f"{attempt:04d}-rejected.json"

    def unconfirmed(self, attempt: int) -> Path:
        return self.attempts / f"{attempt:04d}-unconfirmed.json"

    def intents(self) -> list[Path]:
        """In the order of their numbers, of which there may be more than four digits."""
        names = [n for n in _names_in(self.attempts) if n.endswith("-intent.json") and n[0].isdigit()]
        return [self.attempts / n for n in sorted(names, key=lambda name: int(name.partition("-")[0]))]

    def endings(self) -> list[Path]:
        """How attempts ended that left no result, as the manager saw it."""
        names = _names_in(self.attempts)
        return sorted(self.attempts / n for n in names if n.startswith("ended-") and n.endswith(".json"))

    def logs(self, attempt: int) -> Path:
        """submitit's folder of one submission: job ids may be used again, folders never."""
        return self.attempts / f"{attempt:04d}-jobs"

    @property
    def outcomes(self) -> Path:
        """Results, errors and executions of all tasks, so that one listing tells what is done."""
        return self.path / "outcomes"

    @property
    def results(self) -> Path:
        """Results of all tasks, a line each, once the stage is finished."""
        return self.path / "results.jsonl"

    @property
    def history(self) -> Path:
        """Attempts, errors and logs, once the stage is finished."""
        return self.path / "history.zip"

    def list_outcomes(self) -> Outcomes:
        done, aside = set(), set()
        errors: dict[int, list[int]] = defaultdict(list)
        runs: dict[int, int] = {}
        for name in _names_in(self.outcomes):
            match = _OUTCOME.fullmatch(name)
            if match is None:  # a temporary file
                continue
            task, kind, number = int(match[1]), match[2], int(match[3] or 0)
            if kind == "result":
                done.add(task)
            elif kind == "aside":
                aside.add(task)
            elif kind == "error":
                errors[task].append(number)
            else:
                runs[task] = max(number, runs.get(task, 0))
        return Outcomes(
            frozenset(done),
            frozenset(aside - done),
            {task: tuple(sorted(numbers)) for task, numbers in errors.items()},
            runs,
        )

    def read_results(self) -> dict[int, dict[str, Any]]:
        """The results of all tasks that are done, before and after the stage was packed, and while it is."""
        return self._read("result", lambda outcomes: outcomes.done, lambda task: dict(read_json(task.result)))

    def read_set_aside(self) -> dict[int, str]:
        """Why tasks were given up, before and after the stage was packed, and while it is."""
        return self._read(
            "set_aside", lambda outcomes: outcomes.set_aside, lambda task: str(read_json(task.aside)["why"])
        )

    def _read(
        self, key: str, which: Callable[[Outcomes], frozenset[int]], read: Callable[[TaskFolder], _Content]
    ) -> dict[int, _Content]:
        if not self.results.exists():
            try:
                found = {task: read(self.task(task)) for task in sorted(which(self.list_outcomes()))}
            except FileNotFoundError:
                if not self.results.exists():
                    raise
            else:
                if not self.results.exists():  # else some may have been gone before they were listed
                    return found
        lines = (json.loads(line) for line in self.results.read_text().splitlines())
        return {line["task"]: line[key] for line in lines if key in line}

    def task(self, index: int) -> TaskFolder:
        return TaskFolder(self.path / "tasks" / f"{index:04d}", self.outcomes / f"{index:04d}")


@dataclass(frozen=True)
class TaskFolder:
    """`path` is for what the task makes; `outcome` begins the names of what it leaves of itself."""

    path: Path
    outcome: Path

    @property
    def index(self) -> int:
        return int(self.path.name)

    @property
    def result(self) -> Path:
        return self._outcome("result")

    @property
    def aside(self) -> Path:
        """The task has been given up, and its stage goes on without it."""
        return self._outcome("aside")

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    def error(self, attempt: int) -> Path:
        return self._outcome(f"error-{attempt:04d}")

    def run(self, number: int) -> Path:
        """Execution `number` has begun; the newest one owns the task."""
        return self._outcome(f"run-{number:04d}")

    def _outcome(self, what: str) -> Path:
        return self.outcome.with_name(f"{self.outcome.name}.{what}.json")


def kind_of(identity: Mapping[str, Any]) -> Kind:
    """What the folder with this campaign.json is of; those of before there was a choice do not say."""
    return "label" if identity.get("kind") == "label" else "campaign"


@dataclass(frozen=True)
class CampaignFolder:
    root: Path

    @property
    def identity(self) -> Path:
        """Name, fingerprint, settings: written once, last, when the folder is complete."""
        return self.root / "campaign.json"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def labels(self) -> Path:
        """Index of every finished shard of labels."""
        return self.root / "label-store"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def resumes(self) -> Path:
        return self.root / "resumes"

    @property
    def controllers(self) -> Path:
        """Controller jobs of a detached campaign."""
        return self.root / "controllers"

    @property
    def log(self) -> Path:
        """What managers without a terminal have said."""
        return self.root / "manager.log"

    @property
    def stopped(self) -> Path:
        """Why the campaign could not go on by itself."""
        return self.root / "stopped.json"

    @property
    def observed(self) -> Path:
        """What the scheduler said last, for readers while it does not answer."""
        return self.root / "observed.json"

    @property
    def exported(self) -> Path:
        """Of labels alone: what the files for people beside it hold."""
        return self.root / "exported.json"

    @property
    def aside(self) -> Path:
        """Stages that a user has rewound: kept, never read by a campaign."""
        return self.root / "aside"

    @property
    def site(self) -> Path:
        return self.root / "site.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def kind(self) -> Kind:
        return kind_of(self.read_identity())

    def places(self) -> list[tuple[int, str]]:
        """Round and name of every stage that there is or will be, in order."""
        identity = self.read_identity()
        rounds, kind = int(identity["rounds"]), kind_of(identity)
        return [(round_, name) for round_ in range(rounds + 1) for name in stages_of(round_, kind)]

    def stage(self, round_: int, name: str) -> StageFolder:
        return StageFolder(self.root / f"round-{round_:03d}" / name)

    def read_identity(self) -> dict[str, Any]:
        if not self.identity.is_file():
            raise UserError(
                f"{self.root} is not a campaign folder (it has no campaign.json); name the folder that "
                "`hpcft run` printed, or start one with: hpcft run CAMPAIGN.yaml"
            )
        identity = dict(read_json(self.identity))
        if identity.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{self.root} was made by hpcft {identity.get('hpcft_version')}, whose folders are laid out otherwise; go on "
                "with that version, or start the campaign again in a new folder"
            )
        return identity

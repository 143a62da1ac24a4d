"""The one place that knows every file name inside a campaign folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.storage.atomic import read_json

STAGES = ("explore", "select", "label", "train", "probe", "reference", "evaluate")
# Round 0 has no training: it measures the bias of the foundation model itself.
STAGES_OF_ROUND_0 = ("probe", "reference", "evaluate")

# A file in a task's folder: the user wants what has failed there to be tried again.
RETRY_FAILURES = "retry-failures.json"


def stages_of(round_: int) -> tuple[str, ...]:
    return STAGES_OF_ROUND_0 if round_ == 0 else STAGES


@dataclass(frozen=True)
class StageFolder:
    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def product(self) -> Path:
        return self.path / "product.json"

    def intent(self, attempt: int) -> Path:
        return self.path / "attempts" / f"{attempt:04d}-intent.json"

    def submitted(self, attempt: int) -> Path:
        return self.path / "attempts" / f"{attempt:04d}-submitted.json"

    def intents(self) -> list[Path]:
        return sorted((self.path / "attempts").glob("*-intent.json"))

    def logs(self, attempt: int) -> Path:
        """submitit's folder of one submission: job ids may be used again, folders never."""
        return self.path / "attempts" / f"{attempt:04d}-jobs"

    def task(self, index: int) -> TaskFolder:
        return TaskFolder(self.path / "tasks" / f"{index:04d}")


@dataclass(frozen=True)
class TaskFolder:
    path: Path

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    def error(self, attempt: int) -> Path:
        return self.path / f"error-{attempt:04d}.json"

    def errors(self) -> list[Path]:
        return sorted(self.path.glob("error-*.json"))


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
    def site(self) -> Path:
        return self.root / "site.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def stage(self, round_: int, name: str) -> StageFolder:
        return StageFolder(self.root / f"round-{round_:03d}" / name)

    def read_identity(self) -> dict[str, Any]:
        if not self.identity.is_file():
            raise UserError(
                f"{self.root} is not a campaign folder (it has no campaign.json); name the folder that "
                "`hpcft run` printed, or start one with: hpcft run CAMPAIGN.yaml"
            )
        return dict(read_json(self.identity))

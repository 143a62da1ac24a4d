"""A scheduler that asks a Slurm whose answers are lines of the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from decisions import attempt

from hpcft.campaign.records import Attempt
from hpcft.campaign.scheduler import Scheduler
from hpcft.config.campaign import Campaign
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder

NAME = "hpcft-0123abcd-r1-label-{}"
SITE: dict[str, Any] = {"name": "cluster", "executor": "slurm", "slurm": {"partition": "cpu"}}
CONFIG: dict[str, Any] = {
    "name": "small",
    "rounds": 1,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10},
    "select": {"frames": 1},
    "train": {"epochs": 1},
    "probe": {"steps": 10, "frames": 1},
}


class Slurm:
    """Answers squeue and sacct with the lines of the test, and remembers every command."""

    def __init__(self) -> None:
        self.queue: tuple[str, ...] = ()
        self.accounts: tuple[str, ...] | None = None
        self.is_down = False
        self.commands: list[list[str]] = []

    def __call__(self, argv: Sequence[str]) -> str:
        self.commands.append(list(argv))
        if self.is_down or (argv[0] == "sacct" and self.accounts is None):
            raise SchedulerUnavailable(f"{argv[0]} failed: Slurm accounting storage is disabled")
        lines = {"squeue": self.queue, "sacct": self.accounts or ()}.get(argv[0], ())
        return "".join(f"{line}\n" for line in lines)

    def asked(self, program: str) -> list[list[str]]:
        return [command for command in self.commands if command[0] == program]


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def new_scheduler(slurm: Slurm, clock: Clock, root: Path, **changes: Any) -> Scheduler:
    folder = CampaignFolder(root)
    write_json(folder.identity, {"id": "0123abcd"})
    site = Site.model_validate({**SITE, "slurm": {**SITE["slurm"], **changes}})
    return Scheduler(folder, Campaign.model_validate(CONFIG), site, slurm, clock)


def submitted(number: int, *tasks: int, ids: Sequence[str] | None = None, packed: int = 1) -> Attempt:
    """An attempt whose jobs have these ids in order; None: nobody knows of any."""
    known = replace(
        attempt(number, *tasks, recorded=False, tasks_per_job=packed), job_name=NAME.format(number)
    )
    return known if ids is None else replace(known, job_ids=known.job_ids_of(list(ids)))


def line(job_id: str, state: str, reason: str = "None", *, number: int = 1, node: str = "") -> str:
    return f"{job_id}|{NAME.format(number)}|{state}|{reason}|{node}"


TWO = submitted(1, 0, 1, ids=["812_0", "812_1"])

"""Programs on PATH that stand for Slurm and remember what they were asked, and a small campaign to drive with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase.build import bulk

from hpcft.campaign.lease import lease
from hpcft.campaign.manager import Manager, Turn
from hpcft.campaign.records import Attempt, StageRecord, read_records
from hpcft.config.campaign import Campaign
from hpcft.config.site import Site
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder
from hpcft.storage.structures import write_structures

CONFIG: dict[str, Any] = {
    "name": "small",
    "rounds": 1,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10},
    "select": {"frames": 1},
    "train": {"epochs": 1},
    "probe": {"steps": 10, "frames": 1, "tasks": 2},
    "max_attempts": 2,
}
SITE: dict[str, Any] = {
    "name": "cluster",
    "executor": "slurm",
    "slurm": {"partition": "cpu", "max_array_size": 10},
    "poll_s": 7.0,
}
NAME = "hpcft-0123abcd-r0-probe-{}"

# Each program notes its arguments and the records that stand at that moment; `fail`, `queue` and `accounts` are files of
# the test.
PROGRAM = """#!/bin/sh
cd "{slurm}"
echo "$(basename "$0") $* [$(ls {attempts} 2>/dev/null | grep json | tr '\\n' ' ')]" >> log
{then}
"""
PROGRAMS = {
    "sbatch": 'n=$(cat next); echo $((n+1)) > next; test -e fail && { cat fail >&2; exit 1; }; echo "Submitted batch job $n"',
    "squeue": "test -e down && { echo 'Unable to contact slurm controller' >&2; exit 1; }; cat queue",
    # What the cluster allows stays unknown.
    "scontrol": 'case "$1" in show) exit 1 ;; esac',
    "sacct": "cat accounts",
    "scancel": "",
    "srun": "",
}
QUESTIONS = ("squeue", "sacct", "scontrol show")


@dataclass
class FakeSlurm:
    """What the programs on PATH read and write."""

    folder: Path

    def log(self) -> list[str]:
        """What has been asked to be done since the last look, each with the records that stood then."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith(QUESTIONS)]

    def commands(self) -> list[str]:
        return [line.split(" [")[0] for line in self.log()]

    def shows(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def accounts(self, *lines: str) -> None:
        (self.folder / "accounts").write_text("".join(f"{line}\n" for line in lines))

    def fails(self, words: str | None) -> None:
        (self.folder / "fail").unlink(missing_ok=True)
        if words is not None:
            (self.folder / "fail").write_text(words)

    def is_down(self, down: bool) -> None:
        (self.folder / "down").unlink(missing_ok=True)
        if down:
            (self.folder / "down").touch()


def install(base: Path, attempts: Path, monkeypatch: Any) -> FakeSlurm:
    """Put the programs on PATH; they list what is in `attempts`."""
    slurm, programs = FakeSlurm(base / "slurm"), base / "bin"
    for path in (slurm.folder, programs):
        path.mkdir()
    for name, then in PROGRAMS.items():
        (programs / name).write_text(PROGRAM.format(slurm=slurm.folder, attempts=attempts, then=then))
        (programs / name).chmod(0o755)
    (slurm.folder / "next").write_text("812")
    slurm.shows()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return slurm


@contextmanager
def small_campaign(root: Path) -> Iterator[CampaignFolder]:
    """A new campaign with four replicas, whose lease this process holds."""
    folder = CampaignFolder(root)
    folder.inputs.mkdir(parents=True)
    config = Campaign.model_validate(CONFIG).model_dump(mode="json")
    write_json(folder.identity, {"id": "0123abcd", "name": "small", "rounds": 1, "config": config})
    write_structures(folder.inputs / "structures.h5", [bulk("Cu")] * 4)
    with lease(folder.leases):
        yield folder


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def new_manager(folder: CampaignFolder, clock: Clock, **slurm: Any) -> Manager:
    """As of a new process on the same clock; `slurm` changes that section of the site."""

    def sleep(seconds: float) -> None:
        clock.now += seconds

    site = Site.model_validate({**SITE, "slurm": {**SITE["slurm"], **slurm}})
    manager = Manager(folder, site, clock=clock, sleep=sleep)
    manager.scheduler._clock = clock
    return manager


def probe(folder: CampaignFolder) -> StageFolder:
    return folder.stage(0, "probe")


def finish(folder: CampaignFolder, *tasks: int) -> None:
    for task in tasks:
        probe(folder).task(task).path.mkdir(parents=True, exist_ok=True)
        write_json(probe(folder).task(task).result, {"to_label": 3, "stopped": {str(task): "exploded"}})


def turns(manager: Manager, count: int) -> list[Turn]:
    return [manager.step() for _ in range(count)]


def current(folder: CampaignFolder) -> StageRecord:
    stage = read_records(folder).current
    assert stage is not None
    return stage


def attempts(folder: CampaignFolder) -> tuple[Attempt, ...]:
    return current(folder).attempts


def lines(*states: str, job: int = 812, number: int = 1) -> list[str]:
    """The elements of one array in the queue."""
    return [f"{job}_{task}|{NAME.format(number)}|{state}|" for task, state in enumerate(states)]


RUNNING, HELD = "RUNNING|None", "PENDING|JobHeldUser"

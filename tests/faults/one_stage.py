"""A campaign that stands before one stage, as if all before it had been run: a test can run that stage alone, for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from slurm_campaign import OnSlurm, _template
from tiny import write_campaign

from hpcft.campaign.create import open_or_create
from hpcft.config.campaign import load_campaign
from hpcft.config.site import default_site
from hpcft.labelling.journal import Journal, Record, journal_path
from hpcft.labelling.label import Label
from hpcft.labelling.shard import finish_shard
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder, stages_of
from hpcft.storage.structures import read_structures, write_structures

# Turns of the real manager with the lease, up to the end of one stage; tasks are jobs of submitit's local executor.
DRIVE = """
import sys, time
from pathlib import Path
from hpcft.campaign.records import read_records
from hpcft.campaign.settings import site_of
from hpcft.cli.drive import managing, opened
folder = opened(Path(sys.argv[1]))
stage = folder.stage(int(sys.argv[2]), sys.argv[3])
with managing(folder, site_of(folder), False, resumed=False) as manager:
    while not stage.product.exists():
        turn = manager.step()
        if turn.is_idle:
            print("idle:", *turn.actions, flush=True)
            time.sleep(0.2)
    manager.tidy_finished(read_records(folder))
"""


def campaign_before(
    base: Path,
    round_: int,
    stage: str,
    changes: Mapping[str, Any] | None = None,
    spoil: Callable[[list[Atoms]], None] | None = None,
) -> CampaignFolder:
    """A new campaign in which all stages before this one have a product and no tasks.

    `spoil` changes the structures in its folder: those of the user are looked at before.
    """
    file = write_campaign(base / "inputs", changes)
    folder = open_or_create(load_campaign(file), file, base / "campaign")
    if spoil is not None:
        structures = read_structures(folder.inputs / "structures.h5")
        spoil(structures)
        write_structures(folder.inputs / "structures.h5", structures)
    for number in range(round_ + 1):
        for name in stages_of(number):
            if (number, name) == (round_, stage):
                return folder
            where = folder.stage(number, name)
            where.path.mkdir(parents=True)
            write_json(where.plan, {"tasks": []})
            write_json(where.product, {"tasks": 0})
    raise AssertionError(f"there is no stage {stage} in round {round_}")


def write_labels(stage: StageFolder, structures: Sequence[Atoms]) -> None:
    """Let a stage `label` that has been passed over have these labels (REF_energy, REF_forces)."""
    task = stage.task(0).path
    task.mkdir(parents=True)
    with Journal(journal_path(task, 1)) as journal:
        for index, atoms in enumerate(structures):
            bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
            label = Label(float(atoms.info["REF_energy"]), "energy", atoms.arrays["REF_forces"], None)
            journal.append(Record(index, f"{index:064x}", "single-point", label, bare, wall_s=0.0))
    finish_shard(task)
    frames = {"first": 0, "stop": len(structures), "step": 1}
    write_json(stage.plan, {"tasks": [{"frames": frames, "relaxations": {**frames, "stop": 0}}]})
    write_json(stage.product, {"tasks": 1})


def drive(
    folder: CampaignFolder,
    round_: int,
    stage: str,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> subprocess.Popen[bytes]:
    """A manager that runs until the stage has its product; what it says is in a file beside the campaign's folder."""
    with (log or folder.root.parent / "driven.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVE, str(folder.root), str(round_), stage],
            stdout=output,
            stderr=output,
            env={**(environment or os.environ), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def drive_to_end(
    folder: CampaignFolder, round_: int, stage: str, environment: Mapping[str, str] | None = None
) -> None:
    manager = drive(folder, round_, stage, environment)
    try:
        assert manager.wait(timeout=120) == 0, said(folder)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the manager hangs: {said(folder)}")
    finally:
        manager.kill()
        manager.wait()


def said(folder: CampaignFolder) -> str:
    return (folder.root.parent / "driven.log").read_text()


def labels_to_do(base: Path, monkeypatch: pytest.MonkeyPatch) -> OnSlurm:
    """The campaign of `slurm_campaign`, but on this machine: before round 0's reference stage, two tasks, eight labels."""
    monkeypatch.setenv("HPCFT_TEST_CALLS", str(base / "calls"))
    shutil.copytree(_template().root, base / "campaign")
    return OnSlurm(CampaignFolder(base / "campaign"), base, default_site())

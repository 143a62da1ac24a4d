"""A campaign whose round 0 is finished, made in a moment: real files of every kind, and nothing was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from tiny import write_campaign

from hpcft.campaign.create import open_or_create
from hpcft.campaign.tidy import tidy
from hpcft.config.campaign import load_campaign
from hpcft.labelling.journal import Journal, Record, journal_path
from hpcft.labelling.label import Label
from hpcft.labelling.shard import finish_shard
from hpcft.labelling.store import LabelStore
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder
from hpcft.storage.structures import write_structures
from hpcft.storage.trajectory import FrameBlock, consolidate, segment_path, write_segment

METRIC = {"value": -12.5, "low": -20.0, "high": -5.0}


def make_round_zero(base: Path, changes: dict[str, Any] | None = None) -> CampaignFolder:
    """The folder `base`/tiny of a campaign that goes on with round 1."""
    file = write_campaign(base / "in", changes)
    folder = open_or_create(load_campaign(file), file, base / "tiny")
    write_json(folder.site, {"name": "local", "executor": "local"})
    probe = [{"replicas": [0], "relaxations": [0]}, {"replicas": [1], "relaxations": []}]
    for task, payload in enumerate(probe):
        _probe(folder.stage(0, "probe").task(task).path, payload)
    _finish(
        folder.stage(0, "probe"),
        probe,
        [{"frames": 3, "to_label": 2, "stopped": {}}] * 2,
        frames=4,
        stopped={},
    )
    reference = folder.stage(0, "reference")
    _label(reference.task(0).path, 4)
    counts = {"items": 4, "done": 4, "failed": 0, "frames_done": 4, "causes": {}}
    _finish(reference, [{"frames": {}, "relaxations": {}}], [counts], **counts, relaxations=0)
    LabelStore(folder.labels).register_below(reference.path)
    metrics = {"metrics": {"energy_bias_meV_per_atom": METRIC}}
    _finish(folder.stage(0, "evaluate"), [{}], [metrics], **metrics)
    return folder


def _finish(stage: StageFolder, plan: list[Any], results: list[Any], **product: Any) -> None:
    stage.attempts.mkdir(parents=True)
    stage.outcomes.mkdir()
    write_json(stage.plan, {"tasks": plan})
    write_json(
        stage.intent(1), {"attempt": 1, "tasks": list(range(len(plan))), "job_name": "hpcft-x", "at": 1.0}
    )
    for task, result in enumerate(results):
        write_json(stage.task(task).result, result)
    write_json(stage.product, {**product, "tasks": len(plan)})
    tidy(stage)


def _probe(task: Path, payload: dict[str, Any]) -> None:
    task.mkdir(parents=True)
    write_segment(segment_path(task, 0), [_block(payload["replicas"][0], 3)], {})
    consolidate([segment_path(task, 0)], task / "trajectory.h5", {})
    segment_path(task, 0).unlink()
    write_structures(task / "frames.h5", [bulk("Cu")] * 2)
    write_structures(task / "relaxed.h5", [bulk("Cu")] * len(payload["relaxations"]))


def _block(replica: int, frames: int) -> FrameBlock:
    random = np.random.default_rng(replica)
    return FrameBlock(
        replica=replica,
        numbers=np.full(4, 29),
        masses=np.full(4, 63.546),
        pbc=np.array([True, True, True]),
        step=np.arange(frames),
        time_fs=np.arange(frames) * 1.0,
        positions=random.normal(size=(frames, 4, 3)),
        velocities=random.normal(size=(frames, 4, 3)),
        forces=random.normal(size=(frames, 4, 3)),
        cell=np.tile(np.eye(3), (frames, 1, 1)),
        potential_energy=random.normal(size=frames),
        temperature_K=random.normal(size=frames),
    )


def _label(task: Path, count: int) -> None:
    task.mkdir(parents=True)
    with Journal(journal_path(task, 1)) as journal:
        for index in range(count):
            atoms: Atoms = bulk("Cu")
            label = Label(-3.0 - index, "total", np.zeros((len(atoms), 3)), None)
            journal.append(Record(index, f"{index:064d}", "single-point", label, atoms, wall_s=0.1))
    finish_shard(task)

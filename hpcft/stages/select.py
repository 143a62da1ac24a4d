"""Select: of the frames that explore has made, those worth a reference calculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.config.campaign import Campaign
from hpcft.selection.farthest import farthest_points, standardise
from hpcft.stages.context import StageContext, TaskContext
from hpcft.storage.structures import read_structures, write_structures
from hpcft.storage.trajectory import Trajectory


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    return [{}]


def run(task: TaskContext) -> dict[str, Any]:
    context, settings = task.context, task.context.campaign.select
    candidates = _candidates(context, settings.exclude_first)
    known = _known(context)
    if settings.method == "random":
        random = np.random.default_rng(context.entropy("select", context.round))
        order = random.permutation(len(candidates))[: settings.frames]
        chosen = sorted(int(i) for i in order)
    else:
        chosen = _farthest(candidates, known, settings.frames)
    task.ensure_owned()
    write_structures(task.path / "selected.h5", [candidates[i] for i in chosen])
    return {"candidates": len(candidates), "selected": len(chosen)}


def _candidates(context: StageContext, exclude_first: float) -> list[Atoms]:
    """All sane frames of this round's trajectories, after the part that `exclude_first` leaves out."""
    found = []
    for task in context.tasks_of("explore"):
        with Trajectory(task.path / "trajectory.h5") as trajectory:
            for replica in trajectory.replicas:
                count = trajectory.num_frames(replica)
                for index in range(int(np.ceil(exclude_first * count)), count):
                    found.append(_bare(trajectory.frame(replica, index), replica, context.round))
    return found


def _bare(frame: Atoms, replica: int, round_: int) -> Atoms:
    """The structure with where it comes from and its descriptor, and nothing of the model that made it."""
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    atoms.info = {
        "replica": replica,
        "round": round_,
        "step": int(frame.info["step"]),
        "descriptor": np.asarray(frame.info["descriptor"]),
    }
    return atoms


def _known(context: StageContext) -> list[Atoms]:
    known: list[Atoms] = []
    for round_ in range(1, context.round):
        known += read_structures(context.folder.stage(round_, "select").task(0).path / "selected.h5")
    return known


def _farthest(candidates: Sequence[Atoms], known: Sequence[Atoms], count: int) -> list[int]:
    if not candidates:
        return []
    everything = np.stack([atoms.info["descriptor"] for atoms in [*candidates, *known]])
    scaled = standardise(everything, everything)
    return farthest_points(scaled[: len(candidates)], count, scaled[len(candidates) :])


def collect(context: StageContext) -> dict[str, Any]:
    return context.results()[0]

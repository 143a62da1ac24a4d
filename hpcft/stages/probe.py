"""Probe: the new model's own MD and relaxations, on which its bias is measured; nothing here is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.config.campaign import Campaign
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.sharing import (
    energy_shifts,
    learned_step_size,
    relaxation_map,
    replay_structures,
    share_out,
    stopped_in,
)
from hpcft.storage.structures import count_structures, read_structures, write_structures
from hpcft.storage.trajectory import Trajectory

_MOST_REPLAYED = 200  # replay structures that are judged, evenly spread over the file


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    """Replicas and test relaxations, both spread over the tasks."""
    count = count_structures(context.folder.inputs / "structures.h5")
    tasks = share_out(count, context.campaign.probe.tasks)
    tests = np.arange(_num_test_relaxations(context))
    for number, task in enumerate(tasks):
        task["relaxations"] = [int(i) for i in tests[number :: len(tasks)]]
    return tasks


def _num_test_relaxations(context: StageContext) -> int:
    if context.campaign.relaxations.test is None:
        return 0
    return count_structures(context.folder.inputs / "relaxations-test.h5")


def run(task: TaskContext) -> dict[str, Any]:
    import torch

    from hpcft.md import Replica, thermal_velocities
    from hpcft.models.files import load_model
    from hpcft.models.protocol import as_module
    from hpcft.stages.dynamics import dynamics_of, run_dynamics
    from hpcft.training.distributed import choose_device

    context, probe = task.context, task.context.campaign.probe
    temperature = context.campaign.probe_temperature_K
    model = context.model(context.round)
    dtype = getattr(torch, context.campaign.explore.precision)
    potential = load_model(model, dtype=dtype, device=choose_device(task.rank, context.device))
    as_module(potential).requires_grad_(False)
    indices = task.payload["replicas"]
    structures = read_structures(context.folder.inputs / "structures.h5", indices)
    replicas = []
    for index, atoms in zip(indices, structures, strict=True):
        random = np.random.default_rng(context.entropy("probe", context.round, index))
        replicas.append(Replica(index, atoms, thermal_velocities(atoms, temperature, random), random))
    summary = run_dynamics(
        task, potential, replicas, dynamics_of(context, temperature), _stretch(context), model
    )
    if not (task.path / "frames.h5").exists():
        frames = _frames(task.path / "trajectory.h5", probe.frames, probe.discard)
        task.ensure_owned()
        write_structures(task.path / "frames.h5", frames)
    if not (task.path / "relaxed.h5").exists():
        relaxed = _relax(task, potential)
        task.ensure_owned()
        write_structures(task.path / "relaxed.h5", relaxed)
    replay = _on_replay(task, potential) if task.index == 0 else None
    return {**summary, "to_label": count_structures(task.path / "frames.h5"), "replay": replay}


def _on_replay(task: TaskContext, potential: Any) -> dict[str, float] | None:
    """What the model has kept of what the foundation knew: its errors on the replay structures."""
    from hpcft.training.measure import measure

    context = task.context
    if not (context.folder.inputs / "replay.h5").exists():
        return None
    shifts = energy_shifts(context, context.round)
    return measure(potential, replay_structures(context, shifts, _MOST_REPLAYED))


def _stretch(context: StageContext) -> Any:
    """Frames often enough that a replica which soon explodes still leaves some to judge."""
    from hpcft.md.committed import Stretch

    probe, explore = context.campaign.probe, context.campaign.explore
    return Stretch(probe.steps, min(probe.frame_every, explore.frame_every), explore.segment_frames)


def _frames(trajectory: Path, count: int, discard: float) -> list[Atoms]:
    """Of each replica `count` frames, evenly spread over the last part of what it ran before it stopped."""
    found = []
    with Trajectory(trajectory) as opened:
        for replica in opened.replicas:
            available = opened.num_frames(replica)
            first = min(int(np.ceil(discard * available)), max(available - count, 0))
            chosen = np.unique(
                np.linspace(first, available - 1, min(count, available - first)).round().astype(int)
            )
            for index in chosen if available else []:
                frame = opened.frame(replica, int(index))
                atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
                atoms.arrays["model_forces"] = np.asarray(frame.get_forces(), dtype=float)
                atoms.info = {
                    "replica": replica,
                    "step": int(frame.info["step"]),
                    "model_energy": float(frame.info["potential_energy"]),
                }
                found.append(atoms)
    return found


def _relax(task: TaskContext, potential: Any) -> list[Atoms]:
    """The test cells relaxed by the model, to be compared with the reference's own relaxations of them.

    Each also carries where it is after the steps of train.relaxation: what BPTT was trained on.
    """
    from hpcft.models.batch_size import atoms_together
    from hpcft.relaxation import relax

    indices = task.payload["relaxations"]
    if not indices:
        return []
    settings = task.context.campaign.relaxations
    starts = read_structures(task.context.folder.inputs / "relaxations-test.h5", indices)
    relaxed = relax(
        potential,
        starts,
        fmax=settings.fmax,
        max_steps=settings.max_steps,
        with_cell=settings.cell,
        max_atoms=atoms_together(potential, starts, stress=settings.cell),
    )
    found = []
    for index, end, after in zip(indices, relaxed, _after_steps(task, potential, starts), strict=True):
        atoms = Atoms(end.atoms.numbers, end.atoms.positions, cell=end.atoms.cell, pbc=end.atoms.pbc)
        atoms.info = {
            "relaxation": index,
            "model_energy": end.energy,
            "converged": int(end.converged),
            "steps": end.num_steps,
        }
        if after is not None:
            atoms.arrays["after_steps"] = after.positions
            atoms.info["after_steps_cell"] = after.cell.array.ravel()
        found.append(atoms)
    return found


def _after_steps(task: TaskContext, potential: Any, starts: list[Atoms]) -> list[Atoms | None]:
    """The structures after the steps of train.relaxation in its map; NaN for one that has diverged, None without it."""
    import torch

    from hpcft.models.graph import build_graph
    from hpcft.models.protocol import device_of, dtype_of
    from hpcft.relaxation import Stop, unroll
    from hpcft.training.schedule import scheduled, value_at

    campaign = task.context.campaign
    settings = campaign.train.relaxation
    if settings is None or settings.engine == "implicit":
        return [None] * len(starts)
    step_size = learned_step_size(task.context, task.context.round)
    map_ = relaxation_map(settings, None if step_size is None else step_size.to(device_of(potential)))
    steps = round(value_at(scheduled(settings.steps), campaign.train.epochs))
    stop = Stop(fmax=settings.fmax or campaign.relaxations.fmax)
    found: list[Atoms | None] = []
    for atoms in starts:  # one by one: few steps, and any number of structures fits
        graph = build_graph([atoms], potential.cutoff, dtype=dtype_of(potential), device=device_of(potential))
        with torch.no_grad():
            end = unroll(potential, graph, map_, steps, stop=stop, with_cell=campaign.relaxations.cell)
        positions = end.positions_n3.cpu().double().numpy()
        if not bool(end.valid_b):
            positions = np.full_like(positions, np.nan)
        cell = end.cell_b33[0].cpu().double().numpy()
        found.append(Atoms(atoms.numbers, positions, cell=cell, pbc=atoms.pbc))
    return found


def collect(context: StageContext) -> dict[str, Any]:
    results = context.results()
    replay = next((result["replay"] for result in results if result.get("replay")), None)
    return {
        "frames": sum(result["to_label"] for result in results),
        "stopped": stopped_in(results),
        "replay": replay,
    }

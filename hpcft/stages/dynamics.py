"""A task's share of MD, in segments that are committed one by one: what explore and probe have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcft import __version__
from hpcft.md import ENSEMBLES, Dynamics, Guards, Observe, Replica, Simulation
from hpcft.md.committed import SegmentTaken, Stretch, run_segments
from hpcft.models.allocator import keep_freed_memory
from hpcft.models.batch_size import atoms_that_fit
from hpcft.models.files import sha256_of
from hpcft.models.protocol import Potential
from hpcft.selection.q_residual import Q_RESIDUAL
from hpcft.stages.context import StageContext, Superseded, TaskContext
from hpcft.storage.trajectory import (
    Trajectory,
    consolidate,
    delete_segments,
    list_segments,
)


def guards_of(context: StageContext, temperature_K: float) -> Guards:
    """Explore's guards; the limit of the temperature in proportion where the thermostat is set higher or lower.

    That of the Q-residual counts where it is observed: in explore, and not in probe, which judges the model as it is.
    """
    explore = context.campaign.explore
    limits = {} if explore.max_q_residual is None else {Q_RESIDUAL: explore.max_q_residual}
    limit = explore.temperature_limit_K * temperature_K / explore.temperature_K
    return Guards(max_temperature_K=limit, min_distance=explore.min_distance, max_observed=limits)


def dynamics_of(context: StageContext, temperature_K: float) -> Dynamics:
    explore = context.campaign.explore
    thermostat, barostat = ENSEMBLES[explore.ensemble]
    return Dynamics(
        temperature_K,
        explore.timestep,
        explore.friction_per_ps,
        thermostat,
        explore.thermostat_fs,
        barostat,
        explore.pressure_GPa,
        explore.barostat_fs,
    )


def run_dynamics(
    task: TaskContext,
    potential: Potential,
    replicas: Sequence[Replica],
    settings: Dynamics,
    stretch: Stretch,
    model: Path,
    observe: Observe | None = None,
    *,
    keep_last: bool = False,
) -> dict[str, Any]:
    """Run what is still missing and leave one `trajectory.h5`; returns counts for the task's result.

    A segment that exists is never run again: the replicas go on from its checkpoint. Raises Superseded when
    another attempt has published the segment that this one has just run.
    """
    keep_freed_memory()
    final = task.path / "trajectory.h5"
    if not final.exists():
        guards = guards_of(task.context, settings.temperature_at(0))
        structures = [replica.atoms for replica in replicas]
        room = atoms_that_fit(potential, structures, stress=settings.barostat != "none")
        simulation = Simulation(
            potential, replicas, settings, guards, observe, max_atoms=room, keep_last=keep_last
        )
        try:
            run_segments(task.path, simulation, stretch)
        except SegmentTaken as error:
            raise Superseded(str(error)) from error
        task.ensure_owned()
        consolidate(list_segments(task.path), final, _provenance(task, model, settings))
    delete_segments(task.path)
    return _summary(final, replicas)


def _provenance(task: TaskContext, model: Path, settings: Dynamics) -> dict[str, Any]:
    context = task.context
    return {
        "campaign": context.campaign.name,
        "round": context.round,
        "stage": context.stage,
        "seed": context.campaign.seed,
        "model_sha256": sha256_of(model),
        "hpcft_version": __version__,
        "temperature_K": settings.temperature_K,
        "timestep_fs": settings.timestep,
    }


def _summary(trajectory: Path, replicas: Sequence[Replica]) -> dict[str, Any]:
    with Trajectory(trajectory) as opened:
        checkpoint = opened.checkpoint()
        frames = sum(opened.num_frames(replica) for replica in opened.replicas)
    stopped = {str(r.index): str(checkpoint[f"{r.index:04d}"]["stopped"]) for r in replicas}
    return {"frames": frames, "stopped": {index: cause for index, cause in stopped.items() if cause}}

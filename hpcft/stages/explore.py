"""Explore: MD with the model of the round before, going on from where the replicas stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcft.config.campaign import Campaign
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.sharing import last_states, share_out
from hpcft.storage.structures import count_structures, read_structures


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    count = count_structures(context.folder.inputs / "structures.h5")
    return share_out(count, context.campaign.explore.tasks)


def run(task: TaskContext) -> dict[str, Any]:
    import torch

    from hpcft.md.committed import Stretch
    from hpcft.models.files import load_model
    from hpcft.models.protocol import as_module
    from hpcft.stages.dynamics import dynamics_of, run_dynamics
    from hpcft.training.distributed import choose_device

    context, explore = task.context, task.context.campaign.explore
    device = choose_device(task.rank, context.device)
    model = context.model(context.round - 1)
    potential = load_model(model, dtype=getattr(torch, explore.precision), device=device)
    as_module(potential).requires_grad_(False)
    replicas = _start(context, task.payload["replicas"])
    return run_dynamics(
        task,
        potential,
        replicas,
        dynamics_of(context, explore.temperature_K),
        Stretch(explore.steps, explore.frame_every, explore.segment_frames),
        model,
        _describe_with_foundation(context, device),
        keep_last=True,  # what the model understands least
    )


def _describe_with_foundation(context: StageContext, device: Any) -> Any:
    """Mean descriptor of each structure under the foundation: one metric for all rounds, whatever the model."""
    import torch

    from hpcft.models.files import load_model
    from hpcft.models.protocol import as_module

    dtype = getattr(torch, context.campaign.explore.precision)
    foundation = load_model(context.model(0), dtype=dtype, device=device)
    as_module(foundation).requires_grad_(False)

    def observe(graph: Any) -> dict[str, np.ndarray]:
        features_nd = foundation.descriptors(graph)
        sums = torch.zeros(graph.num_structures, features_nd.shape[1], dtype=features_nd.dtype, device=device)
        means = sums.index_add(0, graph.structure_n, features_nd) / graph.num_atoms_b[:, None]
        return {"descriptor": means.cpu().double().numpy()}

    return observe


def _start(context: StageContext, indices: Sequence[int]) -> list[Any]:
    """Replicas where the round before left them; one that had exploded begins again from its start structure."""
    from hpcft.md import Replica, thermal_velocities

    explore = context.campaign.explore
    structures = read_structures(context.folder.inputs / "structures.h5", list(indices))
    before = last_states(context) if context.round > 1 else {}
    replicas = []
    for index, atoms in zip(indices, structures, strict=True):
        random = np.random.default_rng(context.entropy("explore", context.round, index))
        replica = Replica(index, atoms, thermal_velocities(atoms, explore.temperature_K, random), random)
        state = before.get(index)
        if state is not None and not state["stopped"]:
            replica.restore(state)
        replicas.append(replica)
    return replicas


def collect(context: StageContext) -> dict[str, Any]:
    results = context.results()
    stopped: dict[str, str] = {}
    for result in results:
        stopped |= result["stopped"]
    return {"frames": sum(result["frames"] for result in results), "stopped": stopped}

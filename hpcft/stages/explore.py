"""Explore: MD with the model of the round before, going on from where the replicas stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcft.config.campaign import Campaign
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.sharing import last_states, replay_structures, share_out, stopped_in
from hpcft.storage.structures import count_structures, read_structures

_MOST_REPLAYED = 200  # replay structures that the Q-residual is measured against, evenly spread over the file


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
        _observer(context, device),
        keep_last=True,  # what the model understands least
    )


def _observer(context: StageContext, device: Any) -> Any:
    """Each structure's mean descriptor under the foundation (one metric for all rounds, whatever the model), and Q-residual."""
    import torch

    from hpcft.models.files import load_model
    from hpcft.models.protocol import as_module
    from hpcft.selection.q_residual import Q_RESIDUAL

    dtype = getattr(torch, context.campaign.explore.precision)
    foundation = load_model(context.model(0), dtype=dtype, device=device)
    as_module(foundation).requires_grad_(False)
    space = _known_space(context, foundation)

    def observe(graph: Any) -> dict[str, np.ndarray]:
        features_nd = foundation.descriptors(graph)
        sums = torch.zeros(graph.num_structures, features_nd.shape[1], dtype=features_nd.dtype, device=device)
        means = sums.index_add(0, graph.structure_n, features_nd) / graph.num_atoms_b[:, None]
        found = {"descriptor": means.cpu().double().numpy()}
        return found if space is None else found | {Q_RESIDUAL: space.largest_b(features_nd, graph)}

    return observe


def _known_space(context: StageContext, foundation: Any) -> Any:
    """Of what the round's model has learned from: labels and replay. None without the guard, or where there is nothing yet."""
    from hpcft.selection.q_residual import space_of_structures
    from hpcft.stages.labels import label_outcomes

    if context.campaign.explore.max_q_residual is None:
        return None
    known: list[Any] = []
    if context.campaign.train.replay is not None:
        known += replay_structures(context, {}, _MOST_REPLAYED)
    for round_ in range(1, context.round):
        known += label_outcomes(context, "label", round_).values()
    return space_of_structures(foundation, known) if known else None


def _start(context: StageContext, indices: Sequence[int]) -> list[Any]:
    """Replicas where the round before left them; one that had exploded begins again from its start structure.

    One that went where the model knew nothing goes on from there: the model has learned since.
    """
    from hpcft.md import Replica, thermal_velocities
    from hpcft.selection.q_residual import Q_RESIDUAL

    explore = context.campaign.explore
    structures = read_structures(context.folder.inputs / "structures.h5", list(indices))
    before = last_states(context) if context.round > 1 else {}
    replicas = []
    for index, atoms in zip(indices, structures, strict=True):
        random = np.random.default_rng(context.entropy("explore", context.round, index))
        replica = Replica(index, atoms, thermal_velocities(atoms, explore.temperature_K, random), random)
        state = before.get(index)
        if state is not None and state["stopped"] in ("", Q_RESIDUAL):
            replica.restore({**state, "stopped": ""})
        replicas.append(replica)
    return replicas


def collect(context: StageContext) -> dict[str, Any]:
    results = context.results()
    return {"frames": sum(result["frames"] for result in results), "stopped": stopped_in(results)}

"""Evaluate: the bias of the round's model on its own fresh frames, and Delta Q of what it relaxes."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcft.bias import FramePair, Interval, bias_metrics, interval_of_mean
from hpcft.config.campaign import Campaign
from hpcft.errors import CampaignStopped
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.labels import label_outcomes, relaxation_pairs_by_index
from hpcft.stages.sharing import probe_frames
from hpcft.storage.structures import read_structures

MAX_BIAS_MEV = 3000.0
"""meV/atom. Wrong MD of a foundation has shown up to 0.5 eV/atom; another zero of energy is tens of eV/atom."""


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    return [{}]


def run(task: TaskContext) -> dict[str, Any]:
    context, settings = task.context, task.context.campaign.evaluate
    options: dict[str, Any] = {
        "samples": settings.bootstrap,
        "confidence": settings.confidence,
        "seed": context.campaign.seed,
    }
    pairs = _frame_pairs(context)
    metrics: dict[str, Interval] = bias_metrics(pairs, **options) if pairs else {}
    distances, unconverged = _delta_q(context)
    if distances:
        metrics["delta_q"] = interval_of_mean(distances, **options)
    return {
        "round": context.round,
        "metrics": {name: vars(interval) for name, interval in metrics.items()},
        "frames": len(pairs),
        "relaxations": len(distances),
        "relaxations_unconverged": unconverged,
        "delta_q_each": distances,
    }


def _frame_pairs(context: StageContext) -> list[FramePair]:
    """The probe's frames under the model, beside their reference labels (those that failed are missing)."""
    outcomes = label_outcomes(context, "reference")
    pairs = []
    for index, frame in enumerate(probe_frames(context)):
        label = outcomes.get(index)
        if label is None:
            continue
        pairs.append(
            FramePair(
                group=int(frame.info["replica"]),
                predicted_energy=float(frame.info["model_energy"]),
                reference_energy=float(label.info["REF_energy"]),
                predicted_forces=np.asarray(frame.arrays["model_forces"]),
                reference_forces=np.asarray(label.arrays["REF_forces"]),
            )
        )
    return pairs


def _delta_q(context: StageContext) -> tuple[list[float], int]:
    """Delta Q of each test cell, and how many of the model's relaxations ended without convergence."""
    targets = relaxation_pairs_by_index(context, "reference", 0)
    ends = [
        atoms for task in context.tasks_of("probe") for atoms in read_structures(task.path / "relaxed.h5")
    ]
    ends = [atoms for atoms in ends if int(atoms.info["relaxation"]) in targets]
    if not ends:
        return [], 0
    import torch

    from hpcft.models.graph import build_graph
    from hpcft.relaxation import delta_q

    graph = build_graph(ends, cutoff=0.1)
    wanted = [targets[int(atoms.info["relaxation"])][1].get_positions() for atoms in ends]
    distance_b = delta_q(graph.positions_n3, torch.as_tensor(np.concatenate(wanted)), graph)
    unconverged = sum(1 for atoms in ends if not int(atoms.info["converged"]))
    return [float(d) for d in distance_b], unconverged


def collect(context: StageContext) -> dict[str, Any]:
    """The metrics; stops before round 1 when foundation and reference do not share a zero of energy."""
    result = context.results()[0]
    bias = result["metrics"].get("energy_bias_meV_per_atom")
    if context.round == 0 and bias is not None and abs(bias["value"]) > MAX_BIAS_MEV:
        raise CampaignStopped(
            f"the foundation's energies are {bias['value'] / 1e3:.1f} eV/atom away from the reference's. That is no bias but "
            "another zero of energy (other pseudopotentials or isolated-atom energies), and training would be spent on it. "
            "Use a reference with the foundation's zero: hpcft does not align them yet."
        )
    return result

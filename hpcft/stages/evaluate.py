"""Evaluate: the bias of the round's model on its own fresh frames, and Delta Q of what it relaxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.bias import FramePair, Interval, bias_metrics, interval_of_mean
from hpcft.config.campaign import Campaign
from hpcft.errors import CampaignStopped, UserError
from hpcft.labelling.label import Relaxation
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.labels import label_outcomes, relaxation_results_by_index
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
    ends, targets, refused = _relaxations(context)
    judged = _judged(ends, targets) if ends else {}
    for name, all_values in judged.items():
        if values := [value for value in all_values if np.isfinite(value)]:
            metrics[name] = interval_of_mean(values, **options)
    distances = judged.get("delta_q", [])
    for name, value in (context.product("probe").get("replay") or {}).items():
        metrics[f"replay_{name}"] = Interval(value, float("nan"), float("nan"))
    return {
        "round": context.round,
        "metrics": {name: vars(interval) for name, interval in metrics.items()},
        "frames": len(pairs),
        "relaxations": len(distances),
        "relaxations_unconverged": sum(1 for atoms in ends if not int(atoms.info["converged"])),
        "relaxations_refused": refused,
        "relaxations_diverged": len(distances) - len(judged.get("delta_q_steps", distances)),
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


def _relaxations(context: StageContext) -> tuple[list[Atoms], list[Relaxation], list[str]]:
    """Where the model's relaxations of the test cells ended, where the reference's did, and what is no target and why."""
    from hpcft.relaxation import RelaxationPair, check_pair

    targets = relaxation_results_by_index(context, "reference", 0)
    ends, wanted, refused = [], [], {}
    for task in context.tasks_of("probe"):
        for atoms in read_structures(task.path / "relaxed.h5"):
            number = int(atoms.info["relaxation"])
            target = targets.get(number)
            if target is None:
                continue
            try:
                pair = RelaxationPair(target.start, target.relaxed)
                check_pair(pair, f"relaxation {number}", with_cell=context.campaign.relaxations.cell)
            except UserError as error:
                refused[number] = str(error)
                continue
            ends.append(atoms)
            wanted.append(target)
    return ends, wanted, list(refused.values())


def _judged(ends: Sequence[Atoms], wanted: Sequence[Relaxation]) -> dict[str, list[float]]:
    """What the model's relaxations are worth, each.

    Delta Q, RMSD and the distance of cells where they have ended, converged or not, Delta Q after the steps of train.relaxation,
    and by how much the energy of the end is off (meV/atom).
    """
    judged = _distances(ends, wanted)
    judged["relaxed_energy_error"] = [
        1e3 * (float(atoms.info["model_energy"]) - target.energy_relaxed) / len(atoms)
        for atoms, target in zip(ends, wanted, strict=True)
    ]
    after = [
        (
            Atoms(
                a.numbers, a.arrays["after_steps"], cell=a.info["after_steps_cell"].reshape(3, 3), pbc=a.pbc
            ),
            target,
        )
        for a, target in zip(ends, wanted, strict=True)
        if "after_steps" in a.arrays and np.isfinite(a.arrays["after_steps"]).all()  # else it has diverged
    ]
    if after:
        structures, aims = zip(*after, strict=True)
        judged["delta_q_steps"] = _distances(structures, aims)["delta_q"]
    return judged


def _distances(structures: Sequence[Atoms], targets: Sequence[Relaxation]) -> dict[str, list[float]]:
    """Delta Q (amu^1/2 Å) and RMSD (Å) from the reference's relaxed structures; where cells relax, their distance as well."""
    import torch

    from hpcft.models.graph import build_graph
    from hpcft.relaxation import cell_distance, delta_q, rmsd

    graph = build_graph([target.relaxed for target in targets], cutoff=1.0)
    here = torch.as_tensor(np.concatenate([atoms.get_positions() for atoms in structures]))
    cells = torch.as_tensor(np.stack([atoms.cell.array for atoms in structures]))
    if torch.equal(cells, graph.cell_b33):
        return {
            "delta_q": delta_q(here, graph.positions_n3, graph).tolist(),
            "rmsd": rmsd(here, graph.positions_n3, graph).tolist(),
        }
    return {
        "delta_q": delta_q(here, graph.positions_n3, graph, final_cell_b33=cells).tolist(),
        "rmsd": rmsd(here, graph.positions_n3, graph, final_cell_b33=cells).tolist(),
        "cell_distance": cell_distance(cells, graph).tolist(),
    }


def collect(context: StageContext) -> dict[str, Any]:
    """The metrics; stops before round 1 when foundation and reference do not share a zero of energy."""
    result = context.results()[0]
    bias = result["metrics"].get("energy_bias_meV_per_atom")
    kept = context.campaign.train.energy_zero == "keep"
    if context.round == 0 and kept and bias is not None and abs(bias["value"]) > MAX_BIAS_MEV:
        raise CampaignStopped(
            f"the foundation's energies are {bias['value'] / 1e3:.1f} eV/atom away from the reference's. That is no bias but "
            "another zero of energy (other pseudopotentials or isolated-atom energies), and training would be spent on it. "
            "Set train.energy_zero to fit, or to the reference's energies of isolated atoms, in a new campaign."
        )
    return result

"""Foundation, fine-tuning and judgement of one model in the relaxation study."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from study_systems import (
    ReferenceRelaxation,
    System,
    isolated_energies,
    pristine_crystals,
    reference_relaxations,
    relax_by_reference,
)

from hpcft.models.files import load_model, save_model
from hpcft.models.graph import build_graph
from hpcft.models.mace import build_mace
from hpcft.models.protocol import Potential
from hpcft.relaxation import Descent, RelaxationMap, Stop, cell_distance, delta_q, relax, with_cells
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Unrolling, Weights
from hpcft.training.measure import measure
from hpcft.training.schedule import scheduled
from hpcft.training.trainer import BpttSettings, ReplaySettings, Trainer, TrainingData, TrainingSettings

METHODS = ("none", "forces", "forces-long", "bptt", "combined")
# Of a relaxation that is to converge, by L-BFGS to eV/Å and eV/Å^3.
MOST_STEPS, TIGHT, TIGHT_STRESS = 600, 0.002, 1e-4
# A reference relaxation from the model's end that ends further than this from the target (amu^1/2 Å) is in another minimum.
OTHER_MINIMUM = 0.3


# What all models are judged with, and trained through unless a row says otherwise.
MOMENTUM, STEPS = 0.7, 25
# Steps of an unroll that are differentiated: earlier ones hardly matter where the map converges.
LAST = 8


@dataclass(frozen=True)
class Sizes:
    """How much of everything: relaxations to learn from and to judge on, optimiser steps, the map that is trained through."""

    per_crystal: int = 40
    pretraining_steps: int = 1000
    num_train: int = 20
    num_test: int = 20
    force_steps: int = 400
    force_steps_first: int = 150
    force_steps_long: int = 1600
    bptt_steps: int = 50
    steps: int = STEPS
    step_size_factor: float = 1.0
    learning_rate: float = 1e-2
    bptt_weight: float = 1.0
    bptt_every: int = 4
    replay_batch: int = 2
    replay_weight: float = 1.0
    energy_weight: float = 20.0


@dataclass(frozen=True)
class Problem:
    """All that one seed of one system has: the foundation and its data, relaxations to learn from and to judge on."""

    system: System
    seed: int
    foundation: Path
    replay: list[Atoms]
    pristine_test: list[Atoms]
    train: list[ReferenceRelaxation]
    test: list[ReferenceRelaxation]


def problem_of(system: System, seed: int, sizes: Sizes, cache: Path) -> Problem:
    """Made, or found in `cache`."""
    pristine = pristine_crystals(system, sizes.per_crystal, (seed, 0), cache)
    order = np.random.default_rng([seed, 1]).permutation(len(pristine))
    held_out = max(1, len(pristine) // 8)
    replay = [pristine[i] for i in order[held_out:]]
    name = f"{system.name}-{seed}-{sizes.per_crystal}-{sizes.pretraining_steps}.pt"
    foundation = cache / name
    if not foundation.exists():
        save_model(foundation, pretrained(system, seed, replay, sizes))
    return Problem(
        system,
        seed,
        foundation,
        replay,
        [pristine[i] for i in order[:held_out]],
        reference_relaxations(system, sizes.num_train, (seed, 2), cache),
        reference_relaxations(system, sizes.num_test, (seed, 3), cache),
    )


# ---- models --------------------------------------------------------------------------------------------------------


def pretrained(system: System, seed: int, structures: Sequence[Atoms], sizes: Sizes) -> Potential:
    """A small MACE that knows pristine crystals only."""
    torch.manual_seed(seed)
    potential = build_mace(_configuration(system, structures), torch.float32)
    settings = TrainingSettings(
        epochs=sizes.pretraining_steps,
        batch_size=4,
        steps_per_epoch=1,
        learning_rate=1e-2,
        weights=Weights(energy=20.0, stress=100.0),
        checkpoint_every_epochs=sizes.pretraining_steps,
        seed=(seed,),
    )
    _train(potential, TrainingData(_labels(potential, structures)), settings)
    return potential


def _configuration(system: System, structures: Sequence[Atoms]) -> dict[str, Any]:
    energies = isolated_energies(system)
    isolated = {atomic_numbers[symbol]: energy for symbol, energy in energies.items()}
    # From the mean cohesive energy a thousand steps are enough; without it most of them go into finding it.
    cohesive = [
        (atoms.info["REF_energy"] - sum(energies[symbol] for symbol in atoms.symbols)) / len(atoms)
        for atoms in structures
    ]
    graph = build_graph(list(structures[:32]), system.cutoff)
    forces = np.concatenate([atoms.arrays["REF_forces"] for atoms in structures])
    return {
        "r_max": system.cutoff,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5.0,
        "max_ell": 2,
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "num_interactions": 2,
        "num_elements": len(isolated),
        "hidden_irreps": "16x0e",
        "MLP_irreps": "16x0e",
        "gate": "silu",
        "readout_cls": "NonLinearReadoutBlock",
        "atomic_energies": [[isolated[number] for number in sorted(isolated)]],
        "avg_num_neighbors": len(graph.senders_e) / len(graph.numbers_n),
        "atomic_numbers": sorted(isolated),
        "correlation": 2,
        "radial_type": "bessel",
        "radial_MLP": [32, 32],
        "atomic_inter_scale": float(np.sqrt((forces**2).mean())),
        "atomic_inter_shift": float(np.mean(cohesive)),
        "heads": ["Default"],
    }


def _labels(potential: Potential, structures: Sequence[Atoms]) -> LabelledSet:
    return LabelledSet(structures, potential.cutoff, torch.float32)


def _train(potential: Potential, data: TrainingData, settings: TrainingSettings) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(potential, data, settings).run(Path(folder))


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def map_of(system: System, sizes: Sizes) -> RelaxationMap:
    return Descent(system.step_size * sizes.step_size_factor, momentum=MOMENTUM)


def settings_of(method: str, system: System, sizes: Sizes, seed: int) -> TrainingSettings:
    """How each method trains; `combined` is the default that the study recommends.

    There BPTT comes after a part of the force training, when relaxations already end nearer to the target, and counts 1 per
    amu^1/2 Å beside (eV/Å)^2: with 0.02 it hardly showed, and alone it ruins energies and all that is out of the domain.
    """
    unrolling = Unrolling(map_of(system, sizes), stop=Stop(fmax=0.02), last=LAST, with_cell=system.with_cell)
    if method == "bptt":
        return TrainingSettings(
            epochs=sizes.bptt_steps,
            batch_size=1,
            steps_per_epoch=1,
            learning_rate=3e-3,
            weights=Weights(0.0, 0.0, 0.0),
            relaxation=BpttSettings(1.0, batch_size=2, steps=sizes.steps, unrolling=unrolling),
            checkpoint_every_epochs=sizes.bptt_steps,
            seed=(seed,),
        )
    steps = sizes.force_steps_long if method == "forces-long" else sizes.force_steps
    forces = TrainingSettings(
        epochs=steps,
        batch_size=2,
        steps_per_epoch=1,
        learning_rate=sizes.learning_rate,
        weights=Weights(sizes.energy_weight, stress=100.0 if system.with_cell else 0.0),
        replay=ReplaySettings(sizes.replay_batch, sizes.replay_weight),
        checkpoint_every_epochs=steps,
        seed=(seed,),
    )
    if method != "combined":
        return forces
    first = sizes.force_steps_first
    weight = scheduled([[first, 0], [first + 5, sizes.bptt_weight]])
    bptt = BpttSettings(weight, every=sizes.bptt_every, batch_size=2, steps=sizes.steps, unrolling=unrolling)
    return replace(forces, relaxation=bptt)


def fine_tuned(problem: Problem, method: str, sizes: Sizes) -> Potential:
    potential = load_model(problem.foundation, dtype=torch.float32)
    if method == "none":
        return potential
    train = problem.train[: sizes.num_train]
    labels = _labels(potential, [frame for relaxation in train for frame in relaxation.frames])
    pairs = [relaxation.pair for relaxation in train]
    data = TrainingData(labels, _labels(potential, problem.replay), pairs)
    _train(potential, data, settings_of(method, problem.system, sizes, problem.seed))
    return potential


# ---- judgement -----------------------------------------------------------------------------------------------------


def judged(potential: Potential, problem: Problem) -> dict[str, Any]:
    """Where relaxations by the model end, and how wrong its energies and forces are in and out of the domain."""
    system, test = problem.system, problem.test
    starts, targets = [r.frames[0] for r in test], [r.frames[-1] for r in test]
    map_, cell = Descent(system.step_size, momentum=MOMENTUM), system.with_cell
    truncated = relax(potential, starts, fmax=1e-9, max_steps=STEPS, optimiser=map_, with_cell=cell)
    converged = relax(
        potential,
        starts,
        fmax=TIGHT,
        max_stress=TIGHT_STRESS,
        max_steps=MOST_STEPS,
        optimiser="lbfgs",
        with_cell=cell,
    )
    ends = [relaxed.atoms for relaxed in converged]
    inside = measure(potential, [frame for r in test for frame in _some(r.frames, 6)])
    outside = measure(potential, problem.pristine_test)
    after_k = distances([relaxed.atoms for relaxed in truncated], targets, system.with_cell)
    at_rest = distances(ends, targets, system.with_cell)
    return {
        "delta_q_k": float(np.mean(after_k)),
        "delta_q_converged": float(np.mean(at_rest)),
        "delta_q_k_each": after_k,
        "delta_q_converged_each": at_rest,
        "force_mae": inside["force_mae_meV_per_A"],
        "energy_mae": inside["energy_mae_meV_per_atom"],
        "force_mae_out": outside["force_mae_meV_per_A"],
        "energy_mae_out": outside["energy_mae_meV_per_atom"],
        "wrong_minimum": float(
            np.mean([wrong(system, *ends_at) for ends_at in zip(ends, targets, strict=True)])
        ),
        "unconverged": float(np.mean([not relaxed.converged for relaxed in converged])),
    }


def distances(ends: Sequence[Atoms], targets: Sequence[Atoms], with_cell: bool) -> list[float]:
    """Delta Q of each, in amu^1/2 Å; plus what the cells differ by where they relax too, as in the loss."""
    graph = build_graph(list(ends), 1.0)
    target = torch.from_numpy(np.concatenate([atoms.positions for atoms in targets]))
    anchored = torch.tensor([bool(atoms.constraints) for atoms in targets])
    if not with_cell:
        found = delta_q(graph.positions_n3, target, graph, anchored_b=anchored)
        return [float(d) for d in found]
    cells = torch.from_numpy(np.stack([atoms.cell.array for atoms in targets]))
    of_target = with_cells(graph, cells)
    found = delta_q(graph.positions_n3, target, of_target, final_cell_b33=graph.cell_b33)
    return [float(d) for d in found + cell_distance(graph.cell_b33, of_target)]


def wrong(system: System, end: Atoms, target: Atoms) -> bool:
    """Whether the reference, from where the model ended, comes to another minimum than the target."""
    frames = relax_by_reference(system, end, MOST_STEPS)
    return frames is None or distances(frames[-1:], [target], system.with_cell)[0] > OTHER_MINIMUM


def _some(frames: Sequence[Atoms], number: int) -> list[Atoms]:
    chosen = np.unique(np.linspace(0, len(frames) - 1, number).round().astype(int))
    return [frames[i] for i in chosen]

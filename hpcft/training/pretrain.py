"""Pretraining of a small universal MACE from a recipe: crystals, labels, isolated-atom energies, training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers

from hpcft.config.pretrain import Recipe
from hpcft.errors import UserError
from hpcft.labelling.label import compute_label, with_label
from hpcft.labelling.reference import build_calculator, reference_from, unknown_elements
from hpcft.models.graph import build_graph
from hpcft.models.mace import MacePotential, build_mace
from hpcft.models.protocol import Potential
from hpcft.training.crystals import at_equilibrium, crystals, disturbed
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Weights
from hpcft.training.measure import measure
from hpcft.training.schedule import scheduled
from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings


@dataclass(frozen=True)
class Pretrained:
    """The model, how good it is on structures it has not seen, and those it has (for replay)."""

    potential: MacePotential
    validation: dict[str, float]
    training_set: list[Atoms]


def pretrain(recipe: Recipe, progress: Callable[[str], None] = print) -> Pretrained:
    """Make, label and learn the crystals of `recipe`; the same recipe gives the same model on the same machine."""
    reference = reference_from(recipe.reference)
    unknown = unknown_elements(reference, [atomic_numbers[symbol] for symbol in recipe.elements])
    if unknown:
        raise UserError(
            f"{recipe.reference.calculator} does not know {', '.join(unknown)}; take them out of elements"
        )
    if recipe.train.ranks != 1:
        raise UserError("pretraining runs on one rank; leave train.ranks out of the recipe")
    with tempfile.TemporaryDirectory() as scratch:
        calculator = build_calculator(reference, Path(scratch))
        structures = labelled_crystals(recipe, calculator)
        isolated = {symbol: _isolated_energy(symbol, calculator) for symbol in recipe.elements}
    progress(f"{len(structures)} labelled crystals; isolated atoms {isolated}")
    order = np.random.default_rng([recipe.seed, 1]).permutation(len(structures))
    held_out = int(len(structures) * recipe.data.validation)
    validation = [structures[i] for i in order[:held_out]]
    training = [structures[i] for i in order[held_out:]]
    torch.manual_seed(recipe.seed)
    potential = build_mace(_configuration(recipe, isolated, training), torch.float32)
    _train(recipe, potential, training, progress)
    return Pretrained(potential, measure(potential, validation or training), training)


def labelled_crystals(recipe: Recipe, calculator: Calculator) -> list[Atoms]:
    """Every crystal of the recipe several times over, strained and rattled, in supercells and single cells by turns."""
    random = np.random.default_rng([recipe.seed, 0])
    data, found = recipe.data, []
    for _, crystal in crystals(recipe.elements, data.crystals):
        equilibrium = at_equilibrium(crystal, calculator)
        for number in range(data.structures_per_crystal):
            repeat = data.repeat if number % 2 == 0 else 1
            atoms = disturbed(equilibrium, repeat, data.max_strain, data.rattle, random)
            found.append(with_label(atoms, compute_label(atoms, calculator)))
    return found


def _isolated_energy(symbol: str, calculator: Calculator) -> float:
    atom = Atoms(symbol, cell=[20.0] * 3, pbc=True)
    return float(compute_label(atom, calculator).energy)


def _configuration(recipe: Recipe, isolated: dict[str, float], training: Sequence[Atoms]) -> dict[str, Any]:
    """MACE's settings. An atom alone has exactly its isolated-atom energy: no shift, no residual in the first layer."""
    numbers = sorted(atomic_numbers[symbol] for symbol in recipe.elements)
    by_number = {atomic_numbers[symbol]: energy for symbol, energy in isolated.items()}
    forces = np.concatenate([atoms.arrays["REF_forces"] for atoms in training])
    graph = build_graph(list(training[:64]), recipe.model.cutoff)
    return {
        "r_max": recipe.model.cutoff,
        "num_bessel": recipe.model.radial_features,
        "num_polynomial_cutoff": 5.0,
        "max_ell": recipe.model.max_ell,
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "num_interactions": recipe.model.num_layers,
        "num_elements": len(numbers),
        "hidden_irreps": recipe.model.hidden_irreps,
        "MLP_irreps": "16x0e",
        "gate": "silu",
        "readout_cls": "NonLinearReadoutBlock",
        "atomic_energies": [[by_number[number] for number in numbers]],
        "avg_num_neighbors": len(graph.senders_e) / len(graph.numbers_n),
        "atomic_numbers": numbers,
        "correlation": recipe.model.correlation,
        "radial_type": "bessel",
        "radial_MLP": [32, 32, 32],
        "atomic_inter_scale": float(np.sqrt((forces**2).mean())),
        "atomic_inter_shift": 0.0,
        "heads": ["Default"],
    }


def _train(
    recipe: Recipe, potential: Potential, training: Sequence[Atoms], progress: Callable[[str], None]
) -> None:
    wishes = recipe.train
    settings = TrainingSettings(
        epochs=wishes.epochs,
        batch_size=wishes.batch_size,
        learning_rate=wishes.learning_rate,
        weights=Weights(
            *(scheduled(w) for w in (wishes.weights.energy, wishes.weights.forces, wishes.weights.stress))
        ),
        checkpoint_every_epochs=max(1, wishes.epochs // 10),
        seed=(recipe.seed, 2),
    )
    data = TrainingData(LabelledSet(training, potential.cutoff, torch.float32, "the pretraining crystals"))

    def on_epoch(row: dict[str, float]) -> None:
        progress(f"epoch {row['epoch']:.0f} of {wishes.epochs}: loss {row['loss']:.5f}")

    with tempfile.TemporaryDirectory() as folder:
        Trainer(potential, data, settings).run(Path(folder), on_epoch)

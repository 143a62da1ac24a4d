"""What the benchmark of training trains, and on what: a small foundation, and labelled cells of Cu-Ag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read, write

from hpcft.models.files import export_mace, load_model, save_model
from hpcft.models.graph import build_graph
from hpcft.models.mace import MacePotential, build_mace
from hpcft.models.protocol import Potential
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Weights
from hpcft.training.measure import errors_of
from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings

CUTOFF = 5.0
BATCH_SIZE, LEARNING_RATE, EMA = 4, 1e-3, 0.99
WEIGHTS = Weights(energy=10.0, forces=1.0)
# As hpcft does; mace has an option for it.
VALIDATED_TOGETHER = 8
ELEMENTS = (29, 47)
# Written after each epoch.
CHECKPOINTS = 5
# Of the starting model's errors: both programs compute in double precision, but sum and round in their own order.
SAME = 1e-6


@dataclass(frozen=True)
class Size:
    """How large, and how often. `num_train` is a multiple of the batch size: mace drops what is left over."""

    hidden_irreps: str
    max_ell: int
    radial_MLP: int
    num_train: int
    num_valid: int
    num_pretrain: int
    pretraining_steps: int
    epochs: int
    repetitions: int
    device: str = "cpu"


FULL = Size("32x0e", 3, 32, 200, 40, 40, 60, 5, 3)
QUICK = Size("4x0e", 1, 8, 8, 8, 4, 4, 3, 1)


def cells(number: int, seed: int) -> list[Atoms]:
    """fcc cells of 32 Cu and Ag atoms at random sites, strained, rattled and labelled."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        is_silver = random.random(32) < random.uniform(0.2, 0.8)
        lattice = 3.61 + 0.47 * is_silver.mean()  # Å, after Vegard
        atoms = bulk("Cu", a=lattice, cubic=True).repeat(2)
        atoms.numbers[is_silver] = 47
        strain = random.uniform(-0.03, 0.03, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
        atoms.positions += random.normal(0, 0.12, atoms.positions.shape)
        found.append(labelled(atoms))
    return found


def labelled(atoms: Atoms) -> Atoms:
    reference = atoms.copy()
    reference.calc = EMT()
    atoms.info["REF_energy"] = reference.get_potential_energy()
    atoms.info["REF_stress"] = reference.get_stress()
    atoms.arrays["REF_forces"] = reference.get_forces()
    return atoms


def prepare(folder: Path, size: Size) -> None:
    """Both sets of labels, and the foundation in hpcft's format and in mace's."""
    torch.set_num_threads(1)
    write(folder / "train.extxyz", cells(size.num_train, 1))
    write(folder / "valid.extxyz", cells(size.num_valid, 2))
    seen = cells(size.num_pretrain, 3)
    torch.manual_seed(0)
    potential = build_mace(configuration(size, seen), torch.float64)
    settings = TrainingSettings(
        epochs=1,
        steps_per_epoch=size.pretraining_steps,
        batch_size=BATCH_SIZE,
        learning_rate=1e-2,
        weights=WEIGHTS,
    )
    data = TrainingData(LabelledSet(seen, CUTOFF, torch.float64))
    Trainer(potential, data, settings).run(folder / "pretraining")
    save_model(folder / "foundation.pt", potential)
    export_mace(potential, folder / "foundation.model")


def configuration(size: Size, seen: Sequence[Atoms]) -> dict[str, Any]:
    isolated = {number: labelled(Atoms([number], cell=[20.0] * 3)).info["REF_energy"] for number in ELEMENTS}
    cohesive = [
        (atoms.info["REF_energy"] - sum(isolated[n] for n in atoms.numbers)) / len(atoms) for atoms in seen
    ]
    forces = np.concatenate([atoms.arrays["REF_forces"] for atoms in seen])
    graph = build_graph(list(seen), CUTOFF)
    return {
        "r_max": CUTOFF,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5.0,
        "max_ell": size.max_ell,
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "num_interactions": 2,
        "num_elements": len(ELEMENTS),
        "hidden_irreps": size.hidden_irreps,
        "MLP_irreps": "16x0e",
        "gate": "silu",
        "readout_cls": "NonLinearReadoutBlock",
        "atomic_energies": [list(isolated.values())],
        "avg_num_neighbors": len(graph.senders_e) / len(graph.numbers_n),
        "atomic_numbers": list(ELEMENTS),
        "correlation": 2,
        "radial_type": "bessel",
        "radial_MLP": [size.radial_MLP] * 3,
        "atomic_inter_scale": float(np.sqrt((forces**2).mean())),
        "atomic_inter_shift": float(np.mean(cohesive)),
        "heads": ["Default"],
    }


def labels_of(folder: Path, name: str, dtype: torch.dtype = torch.float64) -> LabelledSet:
    return LabelledSet(read(folder / f"{name}.extxyz", ":"), CUTOFF, dtype)


def errors_on_validation(folder: Path, model: Path) -> dict[str, float]:
    """By hpcft's own code, whoever wrote the model."""
    torch.set_num_threads(1)
    potential: Potential
    if model.suffix == ".pt":
        potential = load_model(model)
    else:  # a pickle, but one that we have made
        potential = MacePotential(torch.load(model, map_location="cpu", weights_only=False))
    return errors_of(potential, labels_of(folder, "valid"), weights=WEIGHTS)

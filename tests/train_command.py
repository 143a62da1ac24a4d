"""`hpcft train` as a user types it, on a problem of a second."""

from __future__ import annotations

import sys
from pathlib import Path

from ase import Atoms
from ase.build import bulk
from ase.io import write

from hpcft.models.files import save_model
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate

OPTIONS = (
    "--model",
    "morse.pt",
    "--data",
    "a.extxyz",
    "--data",
    "b.extxyz",
    "--valid",
    "valid.extxyz",
    "-o",
    "out",
)


def labelled(number: int, first: int) -> list[Atoms]:
    teacher = MorsePotential([13, 29], cutoff=4.0, length=2.6).double()
    found = []
    for seed in range(first, first + number):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.numbers[seed % 4] = 13
        atoms.rattle(0.15, seed=seed)
        result = evaluate(teacher, build_graph([atoms], 4.0))
        atoms.info["REF_energy"] = float(result.energies_b[0])
        atoms.arrays["REF_forces"] = result.forces_n3.numpy()
        found.append(atoms)
    return found


def write_files(folder: Path) -> None:
    """A Morse potential, structures that another one has labelled, and settings."""
    save_model(folder / "morse.pt", MorsePotential([13, 29], cutoff=4.0, length=2.8).double())
    write(folder / "a.extxyz", labelled(6, 0))
    write(folder / "b.extxyz", labelled(3, 6))
    write(folder / "valid.extxyz", labelled(4, 20))
    (folder / "train.yaml").write_text(
        "learning_rate: 0.02\nprecision: float64\nweights: {energy: 1}\nema: 0.8\nbatch_size: 3\n"
    )


def command(*options: str) -> list[str]:
    """Without options: six epochs on all of `write_files`."""
    default = (*OPTIONS, "--config", "train.yaml", "--epochs", "6")
    return [sys.executable, "-m", "hpcft", "train", *(options or default)]

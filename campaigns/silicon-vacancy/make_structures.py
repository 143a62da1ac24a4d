"""Made the structures of the silicon campaign: python campaigns/silicon-vacancy/make_structures.py

Cubic cells of 8 sites, whole or with one vacancy, so small that a plane-wave calculation takes seconds: start.extxyz for MD,
and vacancy-train.extxyz and vacancy-test.extxyz for relaxations (atoms displaced by 0.1 Å, so that there is a way to go).
"""

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import write

HERE = Path(__file__).parent
LATTICE_CONSTANT = 5.43  # Å


def silicon(random: np.random.Generator, num_vacancies: int, displacement: float) -> Atoms:
    atoms = bulk("Si", "diamond", a=LATTICE_CONSTANT, cubic=True)
    del atoms[sorted(random.choice(len(atoms), num_vacancies, replace=False).tolist())]
    atoms.positions += random.normal(0.0, displacement, atoms.positions.shape)
    return atoms


def main() -> None:
    random = np.random.default_rng(20260310)
    write(HERE / "start.extxyz", [silicon(random, i % 2, 0.0) for i in range(4)])
    write(HERE / "vacancy-train.extxyz", silicon(random, 1, 0.1))
    write(HERE / "vacancy-test.extxyz", silicon(random, 1, 0.1))


if __name__ == "__main__":
    main()

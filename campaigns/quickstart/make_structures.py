"""Made the structures of the quickstart campaign: python campaigns/quickstart/make_structures.py

Disordered Al-Cu on an fcc lattice with one to three vacancies, 29 to 31 atoms: start.extxyz for MD, and
vacancies-train.extxyz and vacancies-test.extxyz for relaxations (atoms displaced by 0.1 Å, so that there is a way to go).
"""

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import write

HERE = Path(__file__).parent
LATTICE_CONSTANT = 3.82  # Å, of ordered AlCu under EMT


def alloy(random: np.random.Generator, num_vacancies: int, rattle: float) -> Atoms:
    """Half Al, half Cu at random on 32 sites, then vacancies."""
    atoms = bulk("Al", "fcc", a=LATTICE_CONSTANT, cubic=True).repeat(2)
    symbols = np.array(["Al"] * 16 + ["Cu"] * 16)
    random.shuffle(symbols)
    atoms.set_chemical_symbols(list(symbols))
    del atoms[sorted(random.choice(len(atoms), num_vacancies, replace=False).tolist())]
    atoms.positions += random.normal(0.0, rattle, atoms.positions.shape)
    return atoms


def main() -> None:
    random = np.random.default_rng(20260310)
    write(HERE / "start.extxyz", [alloy(random, 1 + i % 3, 0.0) for i in range(8)])
    write(HERE / "vacancies-train.extxyz", [alloy(random, 1 + i % 2, 0.1) for i in range(12)])
    write(HERE / "vacancies-test.extxyz", [alloy(random, 1 + i % 2, 0.1) for i in range(6)])


if __name__ == "__main__":
    main()

"""Near-equilibrium crystals for pretraining: elements and ordered binary alloys, strained and rattled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers, covalent_radii

PROTOTYPES = ("fcc", "L1_0", "L1_2")
"""Close-packed ones, of metals."""


def crystals(elements: Sequence[str], prototypes: Sequence[str]) -> Iterator[tuple[str, Atoms]]:
    """Each crystal once, as a name and its cubic cell (diamond 8 atoms, all others 4) at a rough lattice constant."""
    for prototype in prototypes:
        if prototype == "diamond":
            for symbol in elements:
                bond = 2 * covalent_radii[atomic_numbers[symbol]]
                yield f"diamond-{symbol}8", bulk(symbol, "diamond", a=4 / np.sqrt(3) * bond, cubic=True)
            continue
        if prototype == "fcc":
            occupations = [(a, a, a, a) for a in elements]
        elif prototype == "L1_0":
            occupations = [(a, a, b, b) for a, b in combinations(elements, 2)]
        else:
            occupations = [(a, b, b, b) for a, b in permutations(elements, 2)]
        for symbols in occupations:
            radius = np.mean([covalent_radii[atomic_numbers[s]] for s in symbols])
            atoms = bulk("Cu", "fcc", a=2 * np.sqrt(2) * radius, cubic=True)
            atoms.set_chemical_symbols(list(symbols))
            yield f"{prototype}-{atoms.get_chemical_formula()}", atoms


def at_equilibrium(atoms: Atoms, calculator: Calculator) -> Atoms:
    """The same crystal at the volume of lowest energy under `calculator`, its shape kept cubic."""
    scales = np.linspace(0.85, 1.15, 31)
    energies = []
    for scale in scales:
        trial = atoms.copy()
        trial.set_cell(atoms.cell * scale, scale_atoms=True)
        trial.calc = calculator
        energies.append(trial.get_potential_energy())
    best = int(np.clip(np.argmin(energies), 1, len(scales) - 2))
    a, b, _ = np.polyfit(scales[best - 1 : best + 2], energies[best - 1 : best + 2], 2)
    relaxed = atoms.copy()
    relaxed.set_cell(atoms.cell * (-b / (2 * a)), scale_atoms=True)
    return relaxed


def disturbed(
    atoms: Atoms, repeat: int, max_strain: float, rattle: float, random: np.random.Generator
) -> Atoms:
    """A supercell under a random strain of up to `max_strain` per component, atoms moved by `rattle` Å (s.d.)."""
    cell = atoms.repeat(repeat)
    strain = random.uniform(-max_strain, max_strain, (3, 3))
    strain = 0.5 * (strain + strain.T)
    np.fill_diagonal(strain, strain.diagonal() + random.uniform(-max_strain, max_strain))
    cell.set_cell(cell.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    cell.positions += random.normal(0.0, rattle * random.uniform(0.2, 1.0), cell.positions.shape)
    return cell

"""The systems of the relaxation study: what their foundation has seen, what is relaxed, and the reference relaxations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.optimize import BFGS
from matscipy.calculators.manybody import Manybody
from matscipy.calculators.manybody.explicit_forms import TersoffBrenner
from matscipy.calculators.manybody.explicit_forms.tersoff_brenner import Tersoff_PRB_39_5566_Si_C

from hpcft.labelling.label import compute_label
from hpcft.relaxation import RelaxationPair
from hpcft.training.crystals import PROTOTYPES, at_equilibrium, crystals, disturbed

# Of the reference's relaxations. At 0.01 eV/Å alloys whose cell relaxes end up to 0.9 amu^1/2 Å apart from different starts, at
# 0.001 up to 0.07: a target must be sharper than what it is to measure.
FMAX, MAX_STEPS = 0.001, 600


@dataclass(frozen=True)
class System:
    """`crystals`: the equilibrium crystals that the foundation knows. `start`: draws a structure that is to be relaxed.

    `step_size` (Å^2/eV) of the heavy-ball map that is trained through.
    """

    name: str
    elements: tuple[str, ...]
    reference: Callable[[], Calculator]
    crystals: Callable[[], list[Atoms]]
    start: Callable[[np.random.Generator], Atoms]
    cutoff: float
    step_size: float
    with_cell: bool = False


class Tersoff(Manybody):  # type: ignore[misc]  # matscipy has no types
    """Silicon after Tersoff (PRB 39, 5566, 1989), without numpy's warnings about what matscipy masks afterwards."""

    def __init__(self) -> None:
        super().__init__(**TersoffBrenner(Tersoff_PRB_39_5566_Si_C))

    def calculate(
        self, atoms: Atoms, properties: Sequence[str], system_changes: Sequence[str] = all_changes
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().calculate(atoms, properties, system_changes)


# ---- what the foundations know -------------------------------------------------------------------------------------


def metal_crystals(*elements: str) -> list[Atoms]:
    """fcc, L1_0 and L1_2 of two metals."""
    return [at_equilibrium(atoms, EMT()) for _, atoms in crystals(elements, PROTOTYPES)]


def silicon_crystals() -> list[Atoms]:
    """Diamond, in its cubic cell and in the primitive one."""
    cells = [bulk("Si", "diamond", a=5.43, cubic=True), bulk("Si", "diamond", a=5.43)]
    return [at_equilibrium(atoms, Tersoff()) for atoms in cells]


# ---- what is relaxed -----------------------------------------------------------------------------------------------

# fcc lattice constants under EMT, Å.
_LATTICE = {"Cu": 3.59, "Pd": 3.88, "Ag": 4.06, "Au": 4.06}


def random_alloy(a: str, b: str, cell: Callable[[float], Atoms], random: np.random.Generator) -> Atoms:
    """`cell(lattice constant)` with 20 to 80 % of `b` at random sites, the lattice constant after Vegard."""
    share = random.uniform(0.2, 0.8)
    atoms = cell((1 - share) * _LATTICE[a] + share * _LATTICE[b])
    symbols = np.array([a] * len(atoms), dtype="<U2")
    symbols[random.permutation(len(atoms))[: round(share * len(atoms))]] = b
    atoms.set_chemical_symbols(list(symbols))
    return atoms


def without(atoms: Atoms, number: int, random: np.random.Generator, among: Sequence[int] = ()) -> Atoms:
    """The same with some vacancies."""
    sites = random.choice(list(among) or len(atoms), number, replace=False)
    left: Atoms = atoms[[i for i in range(len(atoms)) if i not in sites]]
    return left


def fcc_block(lattice: float) -> Atoms:
    return bulk("Cu", "fcc", a=lattice, cubic=True).repeat(2)


def metal_vacancies(random: np.random.Generator) -> Atoms:
    """A Cu-Ag solid solution of 30 atoms and two vacancies."""
    atoms = without(random_alloy("Cu", "Ag", fcc_block, random), 2, random)
    return disturbed(atoms, 1, 0.0, 0.08, random)


def strained_cell(random: np.random.Generator) -> Atoms:
    """A Cu-Au solid solution of 31 atoms and a vacancy, in a cell strained by up to 3 %."""
    atoms = without(random_alloy("Cu", "Au", fcc_block, random), 1, random)
    return disturbed(atoms, 1, 0.03, 0.08, random)


def silicon_defect(random: np.random.Generator) -> Atoms:
    """A cell of 32 sites, strained by up to 2 %, with one vacancy, two, or an interstitial."""
    edge = 5.432 / np.sqrt(2)
    basis = [[0, 0, 0], [0.5, 0, 0.25], [0.5, 0.5, 0.5], [0, 0.5, 0.75]]
    atoms = Atoms("Si4", scaled_positions=basis, cell=[edge, edge, 5.432], pbc=True).repeat(2)
    kind = int(random.integers(3))
    if kind < 2:
        atoms = without(atoms, kind + 1, random)
    else:
        # From an atom away from one of its neighbours: the tetrahedral site.
        i = int(random.integers(len(atoms)))
        near = [j for j in range(len(atoms)) if 0 < atoms.get_distance(i, j, mic=True) < 2.6]
        away = -atoms.get_distance(i, int(random.choice(near)), mic=True, vector=True)
        atoms.append("Si")
        atoms.positions[-1] = atoms.positions[i] + away
    return disturbed(atoms, 1, 0.02, 0.1, random)


def alloy_surface(random: np.random.Generator) -> Atoms:
    """A Pd-Ag (111) slab of four layers, the lowest fixed, with an adatom and a vacancy in the topmost."""

    def slab(lattice: float) -> Atoms:
        atoms = fcc111("Cu", (2, 4, 4), a=lattice, vacuum=6.0, orthogonal=True)
        atoms.pbc = (True, True, False)
        return atoms

    atoms = random_alloy("Pd", "Ag", slab, random)
    layers = atoms.get_tags()
    top = np.flatnonzero(layers == 1)
    a, b, c = _triangle(atoms, top, random)
    height = 0.8 * np.ptp(atoms.positions[:, 2]) / 3
    hollow = atoms.positions[a] + (b + c) / 3 + [0, 0, height]
    removable = [int(i) for i in top if atoms.get_distances([i], a, mic=True)[0] > 4.0]
    atoms.append(str(random.choice(["Pd", "Ag"])))
    atoms.positions[-1] = hollow
    lowest = atoms.positions[:, 2].min()
    atoms = without(atoms, 1, random, removable)
    fixed = atoms.positions[:, 2] < lowest + 0.1
    random_moves = random.normal(0.0, 0.08, atoms.positions.shape)
    atoms.positions[~fixed] += random_moves[~fixed]
    atoms.set_constraint(FixAtoms(mask=fixed))
    atoms.set_tags(None)
    return atoms


def _triangle(
    atoms: Atoms, top: np.ndarray, random: np.random.Generator
) -> tuple[int, np.ndarray, np.ndarray]:
    """An atom of the top layer, and the ways to two neighbours of it that are neighbours of each other."""
    a = int(random.choice(top))
    ways = [atoms.get_distance(a, int(i), mic=True, vector=True) for i in top if i != a]
    nearest = min(float(np.linalg.norm(way)) for way in ways)
    ways = [way for way in ways if np.linalg.norm(way) < 1.1 * nearest]
    pairs = [(v, w) for v in ways for w in ways if 0 < np.linalg.norm(v - w) < 1.1 * nearest]
    b, c = pairs[int(random.integers(len(pairs)))]
    return a, b, c


SYSTEMS = {
    system.name: system
    for system in (
        System(
            "cu-ag-vacancies",
            ("Cu", "Ag"),
            EMT,
            lambda: metal_crystals("Cu", "Ag"),
            metal_vacancies,
            5.0,
            0.05,
        ),
        System("si-defects", ("Si",), Tersoff, silicon_crystals, silicon_defect, 4.0, 0.03),
        System(
            "cu-au-cell",
            ("Cu", "Au"),
            EMT,
            lambda: metal_crystals("Cu", "Au"),
            strained_cell,
            5.0,
            0.05,
            True,
        ),
        System(
            "pd-ag-surface", ("Pd", "Ag"), EMT, lambda: metal_crystals("Pd", "Ag"), alloy_surface, 5.0, 0.05
        ),
    )
}


# ---- labels and reference relaxations ------------------------------------------------------------------------------


def labelled(atoms: Atoms, calculator: Any) -> Atoms:
    """A copy with REF_energy, REF_forces and REF_stress."""
    label, atoms = compute_label(atoms, calculator), atoms.copy()
    atoms.info["REF_energy"] = label.energy
    atoms.arrays["REF_forces"] = label.forces_n3
    if label.stress_6 is not None:
        atoms.info["REF_stress"] = label.stress_6
    return atoms


def relax_by_reference(system: System, start: Atoms, max_steps: int = MAX_STEPS) -> list[Atoms] | None:
    """Every structure of a reference relaxation, not labelled; None when it does not converge."""
    moving = start.copy()
    moving.calc = system.reference()
    frames: list[Atoms] = []
    optimiser = BFGS(FrechetCellFilter(moving) if system.with_cell else moving, logfile=None, maxstep=0.1)
    at_rest = False
    for converged in optimiser.irun(fmax=FMAX, steps=max_steps):
        at_rest = bool(converged)
        frames.append(moving.copy())
    return frames if at_rest else None


@dataclass(frozen=True)
class ReferenceRelaxation:
    """All frames with their labels; the last is where it ends."""

    frames: list[Atoms]

    @property
    def pair(self) -> RelaxationPair:
        return RelaxationPair(self.frames[0], self.frames[-1], len(self.frames) - 1)


def reference_relaxations(
    system: System, number: int, seed: Sequence[int], cache: Path
) -> list[ReferenceRelaxation]:
    """So many relaxations; the first ones are the same for any number. Kept in `cache`."""
    found = []
    for index in range(number):
        path = cache / f"{system.name}-{'-'.join(map(str, seed))}-{index:03d}.extxyz"
        if not path.exists():
            _write(path, _relaxation(system, np.random.default_rng([*seed, index])))
        found.append(ReferenceRelaxation(read(path, ":")))
    return found


def _relaxation(system: System, random: np.random.Generator) -> list[Atoms]:
    while True:
        frames = relax_by_reference(system, system.start(random))
        if frames is not None:
            return [labelled(frame, system.reference()) for frame in frames]


def pristine_crystals(system: System, per_crystal: int, seed: Sequence[int], cache: Path) -> list[Atoms]:
    """The crystals of the foundation, each several times over, strained, rattled and labelled. Kept in `cache`."""
    path = cache / f"{system.name}-pristine-{per_crystal}-{'-'.join(map(str, seed))}.extxyz"
    if not path.exists():
        random, calculator = np.random.default_rng([*seed, 0]), system.reference()
        cells = [
            disturbed(c, 1 + n % 2, 0.04, 0.1, random) for c in system.crystals() for n in range(per_crystal)
        ]
        _write(path, [labelled(atoms, calculator) for atoms in cells])
    frames: list[Atoms] = read(path, ":")
    return frames


def isolated_energies(system: System) -> dict[str, float]:
    """Energy of each element's atom alone, eV; zero by construction for a bond-order potential."""
    if system.reference is Tersoff:
        return dict.fromkeys(system.elements, 0.0)
    atoms = {symbol: Atoms(symbol, cell=[20.0] * 3, pbc=True) for symbol in system.elements}
    return {symbol: compute_label(atom, system.reference()).energy for symbol, atom in atoms.items()}


def _write(path: Path, frames: list[Atoms]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    write(temporary, frames, format="extxyz")
    temporary.replace(path)

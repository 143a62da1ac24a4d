"""Whether structures can start a run: what is wrong with each, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from hpcft.errors import UserError
from hpcft.md.replica import fixed_indices
from hpcft.md.settings import Dynamics, Guards
from hpcft.models.graph import find_edges

# fs; a C-H stretch has a period of 11 fs.
_LONGEST_WITH_HYDROGEN = 1.0


def check_starts(
    structures: Sequence[Atoms], elements: Sequence[int], dynamics: Dynamics, guards: Guards
) -> None:
    """UserError that names every structure with something wrong, and what."""
    found = []
    for number, atoms in enumerate(structures):
        found += [
            f"structure {number}: {problem}" for problem in _problems(atoms, elements, dynamics, guards)
        ]
    if found:
        more = f" (and {len(found) - 10} more)" if len(found) > 10 else ""
        raise UserError(f"{'; '.join(found[:10])}{more}. Mend these structures, or leave them out.")


def warnings_of(structures: Sequence[Atoms], dynamics: Dynamics) -> list[str]:
    """What is allowed, and hardly meant."""
    if dynamics.timestep > _LONGEST_WITH_HYDROGEN and any((atoms.numbers == 1).any() for atoms in structures):
        return [
            f"a time step of {dynamics.timestep:g} fs is long for hydrogen, whose bonds vibrate within 10 fs: "
            "energies will drift; 0.5 fs is usual"
        ]
    return []


def _problems(atoms: Atoms, elements: Sequence[int], dynamics: Dynamics, guards: Guards) -> list[str]:
    found = []
    if unknown := sorted(set(map(int, atoms.numbers)) - set(elements)):
        names = ", ".join(chemical_symbols[number] for number in unknown)
        found.append(f"holds {names}, which the model does not know")
    if not np.isfinite(atoms.get_positions()).all():
        return [*found, "has positions that are no numbers"]
    cell_problem = _cell_problem(atoms, dynamics)
    if cell_problem:
        return [*found, cell_problem]
    other = [c for c in atoms.constraints if type(c).__name__ != "FixAtoms"]
    if other:
        found.append(f"has a constraint {type(other[0]).__name__}, and only FixAtoms is kept")
    if len(fixed_indices(atoms)) and dynamics.barostat != "none":
        found.append("has fixed atoms, which cannot stand still in a cell that moves")
    if guards.min_distance > 0 and (pair := _closest(atoms, guards.min_distance)) is not None:
        i, j, distance = pair
        found.append(f"atoms {i} and {j} are {distance:.2f} Å apart, closer than {guards.min_distance:g} Å")
    return found


def _cell_problem(atoms: Atoms, dynamics: Dynamics) -> str:
    volume = float(np.linalg.det(atoms.cell.array))
    if dynamics.barostat != "none" and not atoms.pbc.all():
        return "is not periodic in all directions, which a barostat needs"
    if any(periodic and not axis.any() for periodic, axis in zip(atoms.pbc, atoms.cell.array, strict=True)):
        return "is periodic along a cell vector of no length"
    if atoms.pbc.all() and abs(volume) < 1e-6:
        return "is periodic, but its cell has no volume"
    if dynamics.barostat != "none" and volume < 0:
        return "has a left-handed cell; exchange two of its vectors"
    return ""


def _closest(atoms: Atoms, distance: float) -> tuple[int, int, float] | None:
    """The closest pair of atoms within `distance` (Å), images included."""
    senders, receivers, shifts = find_edges(atoms.get_positions(), atoms.cell.array, atoms.pbc, distance)
    if len(senders) == 0:
        return None
    vectors = atoms.positions[receivers] - atoms.positions[senders] + shifts @ atoms.cell.array
    lengths = np.linalg.norm(vectors, axis=1)
    nearest = int(lengths.argmin())
    return int(senders[nearest]), int(receivers[nearest]), float(lengths[nearest])

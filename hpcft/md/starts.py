"""Whether structures can start a run: what is wrong with each, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from ase import Atoms
from ase.data import chemical_symbols

from hpcft.errors import UserError
from hpcft.md.replica import fixed_indices
from hpcft.md.settings import Dynamics, Guards
from hpcft.models.geometry import geometry_problems

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
    other = [c for c in atoms.constraints if type(c).__name__ != "FixAtoms"]
    if other:
        found.append(f"has a constraint {type(other[0]).__name__}, and only FixAtoms is kept")
    cell_moves = dynamics.barostat != "none"
    if len(fixed_indices(atoms)) and cell_moves:
        found.append("has fixed atoms, which cannot stand still in a cell that moves")
    return found + geometry_problems(atoms, cell_moves=cell_moves, min_distance=guards.min_distance)

"""What keeps a structure from being computed or moved at all: told without a model, and without torch."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list


def geometry_problems(atoms: Atoms, *, cell_moves: bool, min_distance: float) -> list[str]:
    """What is wrong with positions and cell, each as the end of a sentence about the structure.

    `cell_moves`: under a barostat. Atoms, and images of theirs, have to be `min_distance` (Å) apart; 0: any distance will do.
    """
    if not np.isfinite(atoms.get_positions()).all():
        return ["has positions that are no numbers"]
    if problem := _cell_problem(atoms, cell_moves):
        return [problem]
    if min_distance > 0 and (pair := _closest(atoms, min_distance)) is not None:
        i, j, distance = pair
        return [f"atoms {i} and {j} are {distance:.2f} Å apart, closer than {min_distance:g} Å"]
    return []


def _cell_problem(atoms: Atoms, cell_moves: bool) -> str:
    volume = float(np.linalg.det(atoms.cell.array))
    if cell_moves and not atoms.pbc.all():
        return "is not periodic in all directions, which a barostat needs"
    if any(periodic and not axis.any() for periodic, axis in zip(atoms.pbc, atoms.cell.array, strict=True)):
        return "is periodic along a cell vector of no length"
    if atoms.pbc.all() and abs(volume) < 1e-6:
        return "is periodic, but its cell has no volume"
    if cell_moves and volume < 0:
        return "has a left-handed cell; exchange two of its vectors"
    return ""


def _closest(atoms: Atoms, distance: float) -> tuple[int, int, float] | None:
    """The closest pair of atoms within `distance` (Å), images included."""
    senders, receivers, lengths = neighbor_list("ijd", atoms, distance)
    if len(lengths) == 0:
        return None
    nearest = int(lengths.argmin())
    return int(senders[nearest]), int(receivers[nearest]), float(lengths[nearest])

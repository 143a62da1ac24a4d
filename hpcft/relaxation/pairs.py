"""Reference relaxations as training targets, and what is refused as one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

from hpcft.errors import UserError

# Of the width of the cell: an atom that moved further may as well have gone the other way round,
_FURTHEST = 0.5
# unless its nearest image is so near that it has only been wrapped back into the cell.
_WRAPPED = 0.25


@dataclass(frozen=True)
class RelaxationPair:
    """Where a relaxation starts and where the reference ends it, with the same atoms in the same order.

    `num_steps`: how many the reference took, which says what the relaxation will cost us.
    """

    start: Atoms
    relaxed: Atoms
    num_steps: int | None = None


def check_pair(pair: RelaxationPair, name: str, *, with_cell: bool = False) -> None:
    """UserError for a pair that is no target: other atoms, another cell, or a way that is not unique.

    An atom's way is told by the nearest image, once what all atoms have in common is taken off: atoms that were wrapped back
    into the cell are welcome. From half of the cell's width on it is ambiguous.
    """
    start, relaxed = pair.start, pair.relaxed
    if len(start) != len(relaxed):
        raise UserError(
            f"{name} starts with {len(start)} atoms and ends with {len(relaxed)}; a target needs the same atoms"
        )
    different = np.flatnonzero(start.numbers != relaxed.numbers)
    if len(different):
        i = int(different[0])
        raise UserError(
            f"{name} starts with {start.symbols[i]} as atom {i} and ends with {relaxed.symbols[i]}; a target needs the same "
            "elements in the same order"
        )
    if (start.pbc != relaxed.pbc).any():
        raise UserError(
            f"{name} starts with pbc {start.pbc.tolist()} and ends with {relaxed.pbc.tolist()}; make them the same"
        )
    for what, atoms in (("start", start), ("end", relaxed)):
        if not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
            raise UserError(f"{name}: its {what} holds positions or cell vectors that are no numbers")
    same_cell = np.allclose(start.cell.array, relaxed.cell.array, rtol=0, atol=1e-6)
    if not with_cell and not same_cell:
        raise UserError(
            f"{name} ends in another cell than it starts in; relax at fixed cell, or train with the cell (with_cell)"
        )
    if start.pbc.any():
        _refuse_ambiguous(pair, name)


def _refuse_ambiguous(pair: RelaxationPair, name: str) -> None:
    cell, pbc = pair.relaxed.cell, pair.relaxed.pbc
    fractions = pair.start.cell.scaled_positions(pair.start.positions) if pair.start.cell.rank == 3 else None
    begin = pair.start.positions if fractions is None else cell.cartesian_positions(fractions)
    way = pair.relaxed.positions - begin
    nearest = find_mic(way, cell, pbc)[0]
    if pbc.all():
        masses = pair.start.get_masses()[:, None]
        drift = (masses * nearest).sum(axis=0) / masses.sum()
        way, nearest = way - drift, nearest - drift
    reciprocal = np.asarray(cell.reciprocal())
    width = min(1 / np.linalg.norm(reciprocal[axis]) for axis in range(3) if pbc[axis])
    length = np.linalg.norm(way, axis=1)
    ambiguous = (length >= _FURTHEST * width) & (np.linalg.norm(nearest, axis=1) >= _WRAPPED * width)
    if ambiguous.any():
        furthest = int((length * ambiguous).argmax())
        raise UserError(
            f"{name}: atom {furthest} moves by {length[furthest]:.2f} Å, half of the cell's width of {width:.2f} Å or more, so "
            "that its nearest image is ambiguous; use a larger cell, unwrapped positions, or leave this structure out"
        )

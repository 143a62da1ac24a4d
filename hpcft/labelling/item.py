"""One unit of labelling work, and the key under which its result is found again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.reference import Reference
from hpcft.storage.structures import StructureFile, read_structures

Kind = Literal["single-point", "relaxation"]

# What a reference calculation may depend on besides numbers, positions, cell and periodicity.
_BLOCK = 1_000  # structures that are read at once
OPTIONAL_ARRAYS = ("initial_magmoms", "initial_charges")


@dataclass(frozen=True, eq=False)
class Item:
    """A structure to label, or to relax to forces below `fmax` (eV/Å) within `max_steps`, at fixed cell or `with_cell`."""

    kind: Kind
    atoms: Atoms
    fmax: float | None = None
    max_steps: int | None = None
    with_cell: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "atoms", _checked(self.atoms, self.kind))
        if self.kind == "single-point":
            if self.fmax is not None or self.max_steps is not None or self.with_cell:
                raise UserError(
                    "A single-point has neither fmax nor max_steps nor a cell to relax; use Item.relaxation for a relaxation."
                )
        elif self.kind == "relaxation":
            if self.fmax is None or not (math.isfinite(self.fmax) and self.fmax > 0):
                raise UserError(f"The fmax of a relaxation is {self.fmax}; give a positive force in eV/Å.")
            if self.max_steps is None or self.max_steps < 1:
                raise UserError(f"The max_steps of a relaxation is {self.max_steps}; give at least 1.")
            if self.with_cell and not (self.atoms.pbc.all() and self.atoms.cell.rank == 3):
                raise UserError(
                    f"The cell of {self.atoms.get_chemical_formula()} is to relax, but it is not periodic in all directions; "
                    "relax it at fixed cell."
                )
        else:
            raise UserError(f"There is no item kind {self.kind!r}; it is 'single-point' or 'relaxation'.")

    @classmethod
    def single_point(cls, atoms: Atoms) -> Item:
        """Energy, forces and stress of a structure as it stands."""
        return cls("single-point", atoms)

    @classmethod
    def relaxation(cls, atoms: Atoms, *, fmax: float, max_steps: int, with_cell: bool = False) -> Item:
        """The structure that all atoms together relax to in a fixed cell, or with their cell at zero pressure."""
        return cls("relaxation", atoms, fmax, max_steps, with_cell)


class StoredItems(Sequence[Item]):
    """Items whose structures lie in a file of `write_structures` and are read when they are used.

    `numbers` are those of the structures wanted; `make` turns one into its item.
    """

    def __init__(self, path: Path, numbers: Sequence[int], make: Callable[[Atoms], Item]) -> None:
        self._path, self._numbers, self._make = path, numbers, make
        self._file = StructureFile(path, verify=False)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return StoredItems(self._path, self._numbers[index], self._make)
        number = self._numbers[index]
        return self._make(self._file.read(number, number + 1)[0])

    def __iter__(self) -> Iterator[Item]:
        for first in range(0, len(self), _BLOCK):
            yield from map(self._make, read_structures(self._path, self._numbers[first : first + _BLOCK]))


def plain_structure(atoms: Atoms) -> Atoms:
    """A copy with nothing but what decides a label.

    That is numbers, positions, cell and pbc, and initial magnetic moments and charges if any is not 0.
    """
    plain = Atoms(
        numbers=atoms.numbers,
        positions=np.asarray(atoms.positions, dtype=np.float64)
        + 0.0,  # -0.0 becomes 0.0: the same structure has one key
        cell=np.asarray(atoms.cell.array, dtype=np.float64) + 0.0,
        pbc=atoms.pbc,
    )
    for name in OPTIONAL_ARRAYS:
        if name in atoms.arrays and np.any(atoms.arrays[name]):
            plain.set_array(name, np.asarray(atoms.arrays[name], dtype=np.float64) + 0.0)
    return plain


def item_key(item: Item, reference: Reference) -> str:
    """SHA-256 over the exact structure, the kind of work and the reference's settings.

    The same in every process and on every machine.
    """
    header = {
        "format": 1,
        "kind": item.kind,
        "fmax": None if item.fmax is None else float(item.fmax),
        "max_steps": None if item.max_steps is None else int(item.max_steps),
        "reference": reference.fingerprint(),
    }
    if item.with_cell:  # only then, so that labels of before keep their keys
        header["with_cell"] = True
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    atoms = item.atoms
    arrays = {
        "numbers": atoms.numbers.astype("<i8"),
        "positions": atoms.positions.astype("<f8"),
        "cell": atoms.cell.array.astype("<f8"),
        "pbc": atoms.pbc.astype("u1"),
    }
    arrays |= {name: atoms.arrays[name].astype("<f8") for name in OPTIONAL_ARRAYS if name in atoms.arrays}
    for name, array in arrays.items():
        digest.update(f"{name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _checked(atoms: Atoms, kind: str) -> Atoms:
    if kind == "relaxation" and atoms.constraints:
        raise UserError(
            f"{atoms.get_chemical_formula()} carries constraints, but a reference relaxation moves "
            "every atom; remove them first."
        )
    return plain_structure(atoms)

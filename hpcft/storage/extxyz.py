"""Extended XYZ with every digit: ASE's own writer keeps eight decimals, which loses small forces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io.extxyz import key_val_dict_to_str
from numpy.typing import NDArray

from hpcft.errors import UserError
from hpcft.storage.atomic import write_text

_MOST_NUMBERS = 9  # of an entry of info: a cell or a stress as a matrix, but no descriptor

# By kind of dtype: the letter of the format, and how to write one value.
_TYPES = {
    "f": ("R", "{:.17g}"),
    "i": ("I", "{:d}"),
    "u": ("I", "{:d}"),
    "b": ("L", "{!s:.1}"),
    "U": ("S", "{}"),
    "O": ("S", "{}"),
}


def write_extxyz(path: Path, atoms_list: Sequence[Atoms]) -> None:
    """Write structures for people and other programs, floats exact; results of a calculator are left out (`with_results`).

    ASE's reader moves `energy`, `forces` and `stress` into a calculator, so labels must be named REF_energy,
    REF_forces and REF_stress.
    """
    write_text(path, "".join(extxyz_frame(atoms, f"frame {index}") for index, atoms in enumerate(atoms_list)))


def with_results(atoms: Atoms, **about: Any) -> Atoms:
    """A copy that `write_extxyz` writes so that ASE reads energy and forces back as a calculator's results.

    `about` stands first in its info, for people.
    """
    plain = atoms.copy()
    plain.info = {**about, **atoms.info}
    if atoms.calc is not None:
        if "energy" in atoms.calc.results:
            plain.info["energy"] = atoms.calc.results["energy"]
        if "forces" in atoms.calc.results:
            plain.arrays["forces"] = atoms.calc.results["forces"]
    return plain


def without_long_info(atoms_list: Sequence[Atoms]) -> tuple[list[Atoms], dict[str, int]]:
    """Without what would fill comment lines: entries of info of many numbers, which come back by name with how many."""
    left_out: dict[str, int] = {}
    shorter = []
    for atoms in atoms_list:
        long = {name: np.size(value) for name, value in atoms.info.items() if np.size(value) > _MOST_NUMBERS}
        left_out |= long
        shorter.append(atoms.copy() if long else atoms)
        shorter[-1].info = {name: value for name, value in atoms.info.items() if name not in long}
    return shorter, left_out


def fixed_mask(atoms: Atoms, which: str) -> NDArray[np.bool_]:
    """The atoms that ASE's FixAtoms holds; UserError, naming `which` structure, for any other constraint."""
    mask = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise UserError(
                f"{which} has a constraint {type(constraint).__name__}, but only FixAtoms can be stored; "
                "remove it, or use FixAtoms."
            )
        mask[constraint.index] = True
    return mask


def extxyz_frame(atoms: Atoms, which: str) -> str:
    """The lines of one structure, for who writes more of them than memory holds; `which` names it in a UserError."""
    columns: dict[str, Any] = {
        "species": np.array(atoms.get_chemical_symbols(), dtype=str),
        "pos": atoms.positions,
    }
    columns |= {name: values for name, values in atoms.arrays.items() if name not in ("numbers", "positions")}
    if (fixed := fixed_mask(atoms, which)).any():
        columns["move_mask"] = ~fixed
    properties: list[str] = []
    formats: list[str] = []
    cells: list[list[Any]] = []
    for name, values in columns.items():
        rows = values.reshape(len(values), math.prod(values.shape[1:]))
        letter, form = _TYPES[values.dtype.kind]
        properties.append(f"{name}:{letter}:{rows.shape[1]}")
        formats += [form] * rows.shape[1]
        cells += rows.T.tolist()
    header = {"Properties": ":".join(properties), **atoms.info, "pbc": atoms.pbc}
    if atoms.cell.any():
        header = {"Lattice": " ".join(map(repr, atoms.cell.array.ravel().tolist())), **header}
    line = " ".join(formats)
    body = "".join(line.format(*row) + "\n" for row in zip(*cells, strict=True))
    return f"{len(atoms)}\n{key_val_dict_to_str(header)}\n{body}"

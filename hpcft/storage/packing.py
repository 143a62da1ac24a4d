"""From the dictionaries of many ASE structures to one array per key, with complaints about what is unlike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.storage.extxyz import fixed_mask
from hpcft.storage.tree import Array

FIXED = "fixed"
_FAMILIES = {"b": "booleans", "i": "numbers", "u": "numbers", "f": "numbers", "c": "numbers", "U": "text"}


def pack_info(atoms_list: Sequence[Atoms]) -> tuple[dict[str, Array], dict[str, Array]]:
    """One row per structure for each `info` key; and for keys of strings, which structures have none."""
    columns: dict[str, Array] = {}
    missing: dict[str, Array] = {}
    for key in dict.fromkeys(key for atoms in atoms_list for key in atoms.info):
        if not isinstance(key, str) or not key:
            raise UserError(f"The info key {key!r} cannot be stored; use a non-empty string.")
        absent = [index for index, atoms in enumerate(atoms_list) if key not in atoms.info]
        is_text = all(isinstance(atoms.info.get(key, ""), str) for atoms in atoms_list)
        if absent and not is_text:
            raise UserError(
                f"Frame {absent[0]} has no info {key!r}, but others have; give it to all frames or to none."
            )
        if absent:
            missing[key] = np.array(absent, dtype=np.int64)
        rows = [np.asarray(atoms.info.get(key, ""))[None] for atoms in atoms_list]
        columns[key] = _concatenate_alike(rows, f"info {key!r}")
    return columns, missing


def pack_arrays(atoms_list: Sequence[Atoms]) -> dict[str, Array]:
    """One row per atom for each of `arrays` but numbers and positions, and which are fixed if any are."""
    columns: dict[str, Array] = {}
    for key in dict.fromkeys(key for atoms in atoms_list for key in atoms.arrays):
        if key in ("numbers", "positions"):
            continue
        if key == FIXED:
            raise UserError(
                f"An array {FIXED!r} would be read back as a constraint; rename it, or use ASE's FixAtoms."
            )
        for index, atoms in enumerate(atoms_list):
            if key not in atoms.arrays:
                raise UserError(
                    f"Frame {index} has no array {key!r}, but others have; give it to all frames or to none."
                )
        columns[key] = _concatenate_alike([atoms.arrays[key] for atoms in atoms_list], f"array {key!r}")
    fixed = [fixed_mask(atoms, f"Frame {index}") for index, atoms in enumerate(atoms_list)]
    if any(mask.any() for mask in fixed):
        columns[FIXED] = np.concatenate(fixed)
    return columns


def concatenate(rows: list[Array], row_shape: tuple[int, ...], dtype: type) -> Array:
    """np.concatenate that knows the result for no rows at all."""
    return np.concatenate([np.empty((0, *row_shape), dtype=dtype), *rows])


def _concatenate_alike(rows: list[Array], what: str) -> Array:
    families = [_family(values, f"{what} of frame {index}") for index, values in enumerate(rows)]
    for index, values in enumerate(rows):
        kind, first = (families[index], *values.shape[1:]), (families[0], *rows[0].shape[1:])
        if kind != first:
            raise UserError(
                f"{what} is {first} in frame 0 but {kind} in frame {index}; make type and shape the same."
            )
    joined = np.concatenate(rows)
    return joined.astype(object) if families[0] == "text" else joined


def _family(values: Array, what: str) -> str:
    if values.dtype == object and all(isinstance(value, str) for value in values.flat):
        return "text"  # as extended XYZ comes from ASE
    if values.dtype.kind not in _FAMILIES:
        raise UserError(
            f"{what} cannot be stored (NumPy type {values.dtype}); remove it, or make it numbers or text."
        )
    return _FAMILIES[values.dtype.kind]

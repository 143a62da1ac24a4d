"""HDF5 files of `mace_prepare_data`, read without MACE.

    config_batch_<i>/config_<j>/     atomic_numbers (n,), positions (n,3), cell (3,3), pbc (3,), weight, config_type
        properties/<name>, property_weights/<name>       energy, forces, stress, virials, ...
        <name>, <name>_weight                            the same, up to MACE 0.3.10

What is absent is the string "None"; in the older layout also zeros of weight 0. (MACE 0.3.16: mace/data/utils.py,
save_configurations_as_HDF5. Its attribute drop_last says nothing about the structures in the file.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.labelled_frame import Frame
from hpcft.storage.hdf5 import open_file
from hpcft.storage.lazy_hdf5 import LazyFile

_BATCH, _CONFIG = "config_batch_", "config_"
_LABELS = ("energy", "forces", "stress", "virials")


class MaceFile:
    """A file of `mace_prepare_data` of any size; it holds no structure. May be used after fork and may be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as file:
            names = list(file)
            self._batches = sorted(
                (name for name in names if name.startswith(_BATCH)),
                key=lambda name: (len(name), name),
            )
            if not self._batches:
                raise UserError(f"{path} is an HDF5 file, but {_what_it_holds(names)}")
            self._ends = np.cumsum([len(file[name]) for name in self._batches])
        self._file = LazyFile(path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def frames(self) -> Iterator[Frame]:
        return map(self.frame, range(len(self)))

    def frame(self, index: int) -> Frame:
        """Structure `index`; UserError if it is not stored as MACE stores one."""
        batch = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[batch - 1]) if batch else 0)
        place = f"{self._batches[batch]}/{_CONFIG}{within}"
        try:
            return _read_frame(self._file.read_once(place))
        except (KeyError, ValueError, OSError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"frame {index} of {self.path} ({place}) cannot be read ({error}): the file is damaged, or no version of "
                "MACE has written it that hpcft knows. Write it again with mace_prepare_data, or give the extended XYZ file."
            ) from error


def _read_frame(group: Any) -> Frame:
    is_new = "properties" in group
    labels, label_weights = (group["properties"], group["property_weights"]) if is_new else (group, group)
    suffix = "" if is_new else "_weight"
    found = {name: _value(labels, name) for name in _LABELS}
    weights = {name: _value(label_weights, name + suffix) for name in _LABELS}
    if not is_new:
        found = {
            name: None if weights[name] == 0 and not np.any(value) else value for name, value in found.items()
        }
    named = {"config_weight": _value(group, "weight")} | {
        f"config_{name}_weight": weights[name] for name in _LABELS if found[name] is not None
    }
    cell, pbc = _value(group, "cell"), _value(group, "pbc")
    structure = Atoms(
        numbers=group["atomic_numbers"][()], positions=group["positions"][()], cell=cell, pbc=pbc
    )
    return Frame(
        structure=structure,
        **found,
        weights={name: weight for name, weight in named.items() if weight is not None},
        config_type=_value(group, "config_type") or "",
    )


def _value(group: Any, name: str) -> Any:
    if name not in group:
        return None
    value = group[name][()]
    if isinstance(value, bytes):
        value = value.decode()
        return None if value == "None" else value
    return value


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5 by its content."""
    return bool(h5py.is_hdf5(path))


def _what_it_holds(names: list[str]) -> str:
    if f"{_CONFIG}0" in names:
        return (
            "of MACE's graphs, which do not say which elements they are made of. Give the structures that they were "
            "made from, or a file of mace_prepare_data."
        )
    held = f"holds {', '.join(names[:5])}" if names else "is empty"
    return (
        f"{held}: neither a structure file of hpcft nor one of mace_prepare_data (config_batch_0, ...). Give one of these, "
        "or extended XYZ."
    )

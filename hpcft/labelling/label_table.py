"""What tells wrong labels from right ones, of a hundred thousand labels as columns.

It stands in each task's shard.json, made where the labels are, and for a finished stage in one HDF5 file:

    keys (S,), shards_s (S,), ... (S,)    the columns of LabelTable, of S labels
    numbers_k (K,), counts_sk (S,K)       K elements

Units: eV, Å, eV/Å³. Shape suffixes: s labels, n atoms of all of them, k elements.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.structures import read_columns, read_outline
from hpcft.storage.tree import write_array

Array = NDArray[Any]

_KIND = "labeltable"


@dataclass(frozen=True, eq=False)
class LabelTable:
    """What the tests need of many labels, as columns: labels of one reference, whose `keys` are equal for equal structures."""

    keys: Sequence[str]
    shards_s: Array
    """Number of the shard; 0 for labels of one shard alone."""
    items_s: Array
    """Number of the item in its shard."""
    steps_s: Array
    """Step on the way of a relaxation, -1 for a label that was asked for as such."""
    energies_s: Array
    max_forces_s: Array
    mean_forces_s: Array
    max_stresses_s: Array
    """Largest component; 0 for a label without stress."""
    num_periodic_s: Array
    """In how many directions a structure repeats itself."""
    volumes_s: Array
    """Å³ per atom; 1 for what is not periodic in all directions and has none."""
    numbers_k: Array
    counts_sk: Array
    """How many atoms of which element."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, keys: Sequence[str], structures: Sequence[Atoms]) -> LabelTable:
        """The table of structures with REF_energy and REF_forces, as a shard's files have them."""
        none_6 = np.zeros(6)
        return cls._from_columns(
            keys,
            np.array([atoms.info.get("index", row) for row, atoms in enumerate(structures)], dtype=int),
            np.array([atoms.info.get("step", -1) for atoms in structures], dtype=int),
            np.array([atoms.info["REF_energy"] for atoms in structures], dtype=float),
            np.concatenate([np.empty((0, 3)), *(atoms.arrays["REF_forces"] for atoms in structures)]),
            np.concatenate([np.empty(0, int), *(atoms.numbers for atoms in structures)]),
            np.cumsum([0, *map(len, structures)]),
            np.array([atoms.info.get("REF_stress", none_6) for atoms in structures]).reshape(-1, 6),
            np.array([atoms.cell.array for atoms in structures]).reshape(-1, 3, 3),
            np.array([atoms.pbc for atoms in structures], dtype=bool).reshape(-1, 3),
        )

    @classmethod
    def read(cls, path: Path) -> LabelTable:
        """The table of a shard's labels.h5 or relaxation-frames.h5, without making a structure of any of them.

        Not compared with its seal, which whoever learns from it does: of ten thousand tasks this would read all twice.
        """
        wanted = ("info/key", "info/REF_energy", "arrays/REF_forces", "numbers", "offsets")
        keys, energies_s, forces_n3, numbers_n, offsets = read_columns(path, wanted, verify=False)
        outline = read_outline(path, ("REF_stress", "index", "step"))
        stress_s6 = outline.info.get("REF_stress", np.zeros((len(keys), 6)))
        return cls._from_columns(
            keys.tolist(),
            outline.info.get("index", np.arange(len(keys))),
            outline.info.get("step", np.full(len(keys), -1)),
            energies_s,
            forces_n3,
            numbers_n,
            offsets,
            stress_s6,
            outline.cell_s33,
            outline.pbc_s3,
        )

    @classmethod
    def _from_columns(
        cls,
        keys: Sequence[str],
        items_s: Array,
        steps_s: Array,
        energies_s: Array,
        forces_n3: Array,
        numbers_n: Array,
        offsets: Array,
        stress_s6: Array,
        cell_s33: Array,
        pbc_s3: Array,
    ) -> LabelTable:
        numbers_k, elements_n = np.unique(numbers_n, return_inverse=True)
        sizes = np.diff(offsets)
        rows_n = np.repeat(np.arange(len(sizes)), sizes)
        counts_sk = np.zeros((len(sizes), len(numbers_k)), dtype=int)
        np.add.at(counts_sk, (rows_n, elements_n), 1)
        magnitudes_n = np.linalg.norm(forces_n3, axis=1)
        largest_s, sums_s = np.zeros(len(sizes)), np.zeros(len(sizes))
        np.maximum.at(largest_s, rows_n, magnitudes_n)
        np.add.at(sums_s, rows_n, magnitudes_n)
        sizes = np.maximum(sizes, 1)
        return cls(
            list(keys),
            np.zeros(len(sizes), dtype=int),
            items_s,
            steps_s,
            energies_s,
            largest_s,
            sums_s / sizes,
            np.abs(np.nan_to_num(stress_s6)).max(axis=1, initial=0.0),  # a row of NaN stands for none
            pbc_s3.sum(axis=1),
            np.where(pbc_s3.all(axis=1), np.abs(np.linalg.det(cell_s33)) / sizes, 1.0),
            numbers_k,
            counts_sk,
        )

    @classmethod
    def joined(cls, tables: Sequence[LabelTable]) -> LabelTable:
        """One table of several, in their order."""
        tables = [_NONE, *tables]
        numbers_k = np.unique(np.concatenate([table.numbers_k for table in tables]))
        counts = []
        for table in tables:
            counts_sk = np.zeros((len(table), len(numbers_k)), dtype=int)
            counts_sk[:, np.searchsorted(numbers_k, table.numbers_k)] = table.counts_sk
            counts.append(counts_sk)
        return cls(
            keys=[key for table in tables for key in table.keys],
            numbers_k=numbers_k,
            counts_sk=np.concatenate(counts),
            **{name: np.concatenate([getattr(table, name) for table in tables]) for name in _PER_LABEL},
        )

    def of_shard(self, number: int) -> LabelTable:
        """The same labels, said to be of that shard."""
        return replace(self, shards_s=np.full(len(self), number))

    def as_json(self) -> dict[str, str]:
        """All but the keys, for a shard's record: each column in base64, for digits would take more memory than the labels."""
        return {name: b64encode(getattr(self, name).astype(_TYPES[name])).decode() for name in _COLUMNS}

    @classmethod
    def from_json(cls, keys: Sequence[str], columns: Mapping[str, str]) -> LabelTable:
        """What `as_json` gave."""
        arrays = {name: np.frombuffer(b64decode(columns[name]), dtype=_TYPES[name]) for name in _COLUMNS}
        arrays["counts_sk"] = arrays["counts_sk"].reshape(len(keys), len(arrays["numbers_k"]))
        return cls(list(keys), **arrays)

    def write(self, path: Path) -> None:
        """Replace a file by one of this table."""

        def fill(file: Any) -> None:
            write_array(file, "keys", np.array([key.encode() for key in self.keys], dtype=bytes))
            for name in _COLUMNS:
                write_array(file, name, getattr(self, name))

        write_file(path, _KIND, fill)

    @classmethod
    def read_file(cls, path: Path) -> LabelTable:
        """What `write` wrote; UserError where there is no such file, or it is damaged or of another version."""
        with open_file(path, _KIND, verify=True) as file:
            keys = [key.decode() for key in file["keys"][:].tolist()]
            return cls(keys, **{name: file[name][:] for name in _COLUMNS})


_COLUMNS = tuple(field.name for field in fields(LabelTable) if field.name != "keys")
_PER_LABEL = tuple(name for name in _COLUMNS if name.endswith("_s"))
_NONE = LabelTable.of([], [])
_TYPES = {name: np.dtype("<f8" if getattr(_NONE, name).dtype.kind == "f" else "<i8") for name in _COLUMNS}

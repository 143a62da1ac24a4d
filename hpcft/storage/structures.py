"""Lists of structures of any sizes in one HDF5 file, exact to the last bit; and reading what else ASE reads.

    offsets (S+1,), cell (S,3,3), pbc (S,3)     S structures
    numbers (N,), positions (N,3)               N atoms in all
    info/<key> (S,...)      numbers or strings per structure: REF_energy, REF_stress (6, Voigt), ...
    arrays/<key> (N,...)    numbers or strings per atom: REF_forces, momenta, fixed (ASE's FixAtoms), ...
    missing/<key> (M,)      indices of the structures without this string

Results of a calculator are not stored: a label is what stands under REF_*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from hpcft.errors import UserError
from hpcft.storage.extxyz import write_extxyz
from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.lazy_hdf5 import LazyFile
from hpcft.storage.packing import FIXED, concatenate, pack_arrays, pack_info
from hpcft.storage.tree import (
    Array,
    StreamedDataset,
    decode_name,
    encode_name,
    holds_text,
    read_attributes,
    write_array,
    write_attributes,
)

__all__ = [
    "Outline",
    "StructureFile",
    "count_structures",
    "evenly_spread",
    "read_any",
    "read_columns",
    "read_outline",
    "read_provenance",
    "read_structures",
    "read_texts",
    "write_extxyz",
    "write_structures",
    "write_structures_in_blocks",
]


# Structures that lie further apart than this on average are read one by one.
_SPARSE = 8


def write_structures(
    path: Path, atoms_list: Sequence[Atoms], attributes: Mapping[str, Any] | None = None
) -> None:
    """Write structures, and `attributes` as their provenance, in one step.

    Raises UserError unless all have the same keys in `info` and `arrays`, of the same shape; only a string in
    `info` may be missing.
    """
    columns = _columns(atoms_list)

    def fill(file: Any) -> None:
        for group in _GROUPS:
            file.create_group(group, track_order=True)  # or HDF5 sorts the keys
        for name, values in columns.items():
            write_array(file, name, values, unit=_UNITS.get(name))
        write_attributes(file.create_group("provenance"), attributes or {})

    write_file(path, "structures", fill)


def write_structures_in_blocks(
    path: Path,
    blocks: Iterable[Sequence[Atoms]],
    num_structures: int,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """`write_structures` of more than should be in memory at once; no string in `info` may be missing.

    Raises UserError unless each block has the keys and shapes of the first.
    """

    def fill(file: Any) -> None:
        for group in _GROUPS:
            file.create_group(group, track_order=True)
        streams: dict[str, StreamedDataset] = {}
        num_atoms = 0
        for block in blocks:
            columns = _columns(block)
            if any(name.startswith("missing/") for name in columns) or (
                streams and columns.keys() != streams.keys()
            ):
                raise UserError(
                    f"{path} cannot be written: structures of one file must have the same keys in info and arrays, but some "
                    f"have {', '.join(sorted(columns.keys() ^ (streams.keys() or columns.keys())))} and others not."
                )
            columns["offsets"] = columns["offsets"][bool(streams) :] + num_atoms
            num_atoms = int(columns["offsets"][-1])
            for name, values in columns.items():
                if name not in streams:
                    streams[name] = StreamedDataset(file, name, values, num_structures, unit=_UNITS.get(name))
                streams[name].append(values)
        write_attributes(file.create_group("provenance"), attributes or {})

    write_file(path, "structures", fill)


_GROUPS = ("info", "arrays", "missing")
_UNITS = {"positions": "Angstrom", "cell": "Angstrom"}


def _columns(atoms_list: Sequence[Atoms]) -> dict[str, Array]:
    """Every dataset of a file of these structures, by its name."""
    info, missing = pack_info(atoms_list)
    columns = {
        "numbers": concatenate([atoms.numbers for atoms in atoms_list], (), int),
        "positions": concatenate([atoms.positions for atoms in atoms_list], (3,), float),
        "offsets": np.cumsum([0, *(len(atoms) for atoms in atoms_list)], dtype=np.int64),
        "cell": concatenate([atoms.cell.array[None] for atoms in atoms_list], (3, 3), float),
        "pbc": concatenate([atoms.pbc[None] for atoms in atoms_list], (3,), bool),
    }
    for group, values in {"info": info, "arrays": pack_arrays(atoms_list), "missing": missing}.items():
        columns |= {f"{group}/{encode_name(key)}": column for key, column in values.items()}
    return columns


def read_structures(path: Path, indices: slice | Sequence[int] | None = None) -> list[Atoms]:
    """All structures, or those of a slice or a list of indices (negative from the end)."""
    with open_file(path, "structures", verify=indices is None) as file:
        offsets = file["offsets"][()].tolist()
        wanted = _resolve(indices, len(offsets) - 1, path)
        if not wanted:
            return []
        # A share of every hundredth structure must not read, and hold, a hundred times its size.
        is_dense = max(wanted) - min(wanted) < _SPARSE * len(wanted)
        groups = [wanted] if is_dense else [[index] for index in wanted]
        missing = {decode_name(name): set(node[()].tolist()) for name, node in file["missing"].items()}
        return [atoms for group in groups for atoms in _read_span(file, offsets, missing, group)]


def _read_span(
    file: Any, offsets: Sequence[int], missing: Mapping[str, set[int]], wanted: Sequence[int]
) -> list[Atoms]:
    """The wanted structures, out of one read of all from the first to the last of them."""
    start, stop = min(wanted), max(wanted) + 1
    per_structure = _read_rows({name: file[name] for name in ("cell", "pbc")}, start, stop)
    info = _read_rows(file["info"], start, stop)
    nodes = {**file["arrays"], "numbers": file["numbers"], "positions": file["positions"]}
    per_atom = _read_rows(nodes, offsets[start], offsets[stop])
    structures = []
    for index in wanted:
        rows = slice(offsets[index] - offsets[start], offsets[index + 1] - offsets[start])
        keys = [key for key in info if index not in missing.get(key, ())]
        structures.append(
            _build(
                {key: values[index - start] for key, values in per_structure.items()},
                {key: values[rows] for key, values in per_atom.items()},
                {key: info[key][index - start] for key in keys},
            )
        )
    return structures


class StructureFile:
    """A file of `write_structures` of any size, read in pieces: it holds the sizes of the structures, not the structures.

    The whole file is compared with its seal here (DamagedFile), once, unless `verify` is False: of many tasks that read a
    share each, none must read it all. It may be used after fork and may be pickled; see LazyFile.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        with open_file(path, "structures", verify=verify) as file:
            self._offsets = file["offsets"][()]
            self._missing = {decode_name(name): node[()] for name, node in file["missing"].items()}
            self.info_keys = frozenset(map(decode_name, file["info"]))
            self.array_keys = frozenset(map(decode_name, file["arrays"]))
        self._file = LazyFile(path)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_atoms_each(self) -> Array:
        """[S]"""
        return np.diff(self._offsets)

    def read(self, start: int, stop: int, keys: Collection[str] | None = None) -> list[Atoms]:
        """Structures `start` to `stop` (not included), with those of `info` and `arrays` that `keys` names, or with all."""
        assert 0 <= start < stop <= len(self)
        datasets = {name: self._file[name] for name in ("cell", "pbc", "numbers", "positions")}
        for group, known in {"info": self.info_keys, "arrays": self.array_keys}.items():
            names = [encode_name(key) for key in known if keys is None or key in keys]
            datasets[group] = {name: self._file[f"{group}/{name}"] for name in names}
        missing = {
            key: set(indices[slice(*np.searchsorted(indices, (start, stop)))].tolist())
            for key, indices in self._missing.items()
        }
        return _read_span(datasets, self._offsets, missing, range(start, stop))


def evenly_spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 to count - 1, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


@dataclass(frozen=True)
class Outline:
    """What one row per structure tells, without a single atom; S structures."""

    num_atoms_s: Array
    cell_s33: Array
    pbc_s3: Array
    info: Mapping[str, Array]
    """Those of the wanted columns of numbers that the file has."""


def read_outline(path: Path, info: Sequence[str] = ()) -> Outline:
    """Sizes, cells and the columns `info` of all structures of a file of `write_structures`."""
    with open_file(path, "structures") as file:
        columns = {name: encode_name(name) for name in info}
        return Outline(
            num_atoms_s=np.diff(file["offsets"][()]),
            cell_s33=file["cell"][()],
            pbc_s3=file["pbc"][()],
            info={name: file["info"][key][()] for name, key in columns.items() if key in file["info"]},
        )


def read_first_equals(path: Path) -> Array:
    """For each structure of a file of `write_structures` the number of the first that has the same atoms, cell and arrays. [S]"""
    with open_file(path, "structures") as file:
        offsets = file["offsets"][()]
        per_atom = [node[()] for node in (file["numbers"], file["positions"], *file["arrays"].values())]
        per_structure = [file[name][()] for name in ("cell", "pbc")]
    first: dict[bytes, int] = {}
    found = np.arange(len(offsets) - 1)
    for index, (start, stop) in enumerate(pairwise(offsets.tolist())):
        rows = [*(values[start:stop] for values in per_atom), *(values[index] for values in per_structure)]
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(row).tobytes() for row in rows)).digest()
        found[index] = first.setdefault(digest, index)
    return found


def read_texts(path: Path) -> list[dict[str, str]]:
    """The strings in `info` of each structure of a file of `write_structures`, without a single atom."""
    with open_file(path, "structures") as file:
        texts: list[dict[str, str]] = [{} for _ in range(len(file["offsets"]) - 1)]
        for name, node in file["info"].items():
            absent = set(file["missing"][name][()].tolist()) if name in file["missing"] else set()
            if holds_text(node):
                for index, text in enumerate(node.asstr()[()]):
                    if index not in absent:
                        texts[index][decode_name(name)] = str(text)
    return texts


def count_structures(path: Path) -> int:
    """Number of structures in a file of `write_structures`."""
    with open_file(path, "structures") as file:
        return len(file["offsets"]) - 1


def read_columns(path: Path, names: Sequence[str], *, verify: bool = True) -> list[Array]:
    """Datasets of a file of `write_structures` as they are, such as `info/REF_energy` and `numbers`: no structure is made."""
    with open_file(path, "structures", verify=verify) as file:
        columns = []
        for name in names:
            group, _, key = name.rpartition("/")
            dataset = (file[group] if group else file)[encode_name(key)]
            columns.append(dataset.asstr()[:].astype(str) if holds_text(dataset) else dataset[:])
        return columns


def read_provenance(path: Path) -> dict[str, Any]:
    """The attributes that were given to `write_structures`."""
    with open_file(path, "structures") as file:
        return read_attributes(file["provenance"])


def read_any(path: Path) -> list[Atoms]:
    """All structures of a file, at least one: our own HDF5 (`.h5`, `.hdf5`) or any format that ASE knows.

    Raises UserError if it is missing, empty or unreadable.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; check the name.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with at least one structure.")
    if path.suffix in (".h5", ".hdf5"):
        structures = read_structures(path)
    else:
        structures = _read_by_ase(path)
    if not structures:
        raise UserError(f"{path} holds no structure; give a file with at least one.")
    return structures


def _read_by_ase(path: Path) -> list[Atoms]:
    try:
        return list(ase.io.read(path, ":"))
    except Exception as error:  # each of ASE's many readers fails in its own way
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read by ASE ({cause}). Check that the suffix fits the content; extended XYZ "
            "(.extxyz) is the safest format."
        ) from error


def _resolve(indices: slice | Sequence[int] | None, count: int, path: Path) -> list[int]:
    if indices is None:
        return list(range(count))
    if isinstance(indices, slice):
        return list(range(*indices.indices(count)))
    for index in indices:
        if not -count <= index < count:
            raise UserError(f"{path} holds {count} structures, so there is no structure {index}.")
    return [int(index) % count for index in indices]


def _read_rows(datasets: Mapping[str, Any], first: int, last: int) -> dict[str, Array]:
    return {
        decode_name(name): dataset.asstr()[first:last].astype(str)
        if holds_text(dataset)
        else dataset[first:last]
        for name, dataset in datasets.items()
    }


def _build(per_structure: dict[str, Any], per_atom: dict[str, Array], info: dict[str, Any]) -> Atoms:
    atoms = Atoms(numbers=per_atom.pop("numbers"), positions=per_atom.pop("positions"), **per_structure)
    fixed = per_atom.pop(FIXED, None)
    for key, values in per_atom.items():
        atoms.set_array(key, values)  # copies; not set_momenta, which would zero those of fixed atoms
    for key, value in info.items():
        atoms.info[key] = value.item() if np.ndim(value) == 0 else value.copy()
    if fixed is not None and fixed.any():
        atoms.set_constraint(FixAtoms(mask=fixed))
    return atoms

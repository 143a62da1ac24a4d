"""Which files hold the labelled structures that a path stands for, and how each is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.labelled_frame import (
    STRESS_WEIGHT,
    VIRIALS_KEY,
    VIRIALS_WEIGHT,
    WEIGHTS,
    Frame,
    LabelKeys,
    calculator_results,
    frame_of,
)
from hpcft.labelling.shard import LABELS_FILE, SHARD_FILE
from hpcft.storage.atomic import read_json
from hpcft.storage.hdf5 import kind_of
from hpcft.storage.structures import StructureFile, read_any
from hpcft.training.mace_hdf5 import MaceFile, is_hdf5

_CHUNK_ATOMS = 20_000


class SourceFile(Protocol):
    """A file of labelled structures; `path` names it to the user."""

    path: Path

    def __len__(self) -> int: ...

    def frames(self) -> Iterator[Frame]:
        """All structures in order, read in pieces."""

    def frame(self, index: int) -> Frame: ...


def find_files(path: Path, keys: LabelKeys) -> list[SourceFile]:
    """The files that hold what `path` names: a file, a folder of HDF5 files, or label shards below a folder.

    Formats are told apart by content. UserError where there is nothing to train on, or it cannot be read.
    """
    if path.is_dir():
        shards = sorted(found.parent for found in path.rglob(SHARD_FILE))
        return _shards(path, shards) if shards else _folder(path, keys)
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the name of the training data.")
    return [_file(path, keys)]


def _file(path: Path, keys: LabelKeys) -> SourceFile:
    if kind_of(path) != "other":
        return HpcftFile(path, keys)
    return MaceFile(path) if is_hdf5(path) else AseFile(path, keys)


def _folder(path: Path, keys: LabelKeys) -> list[SourceFile]:
    files = [found for found in path.iterdir() if found.is_file() and is_hdf5(found)]
    if not files:
        raise UserError(
            f"{path} is a folder without HDF5 files and without label shards of hpcft ({SHARD_FILE}) below it; name the "
            "files themselves, or the folder that holds them (of mace_prepare_data: its train or val)."
        )
    return [_file(found, keys) for found in sorted(files, key=lambda found: (len(found.name), found.name))]


def _shards(path: Path, shards: Sequence[Path]) -> list[SourceFile]:
    """Published labels only: what a shard's journals hold beyond them is not finished."""
    parents = sorted({str(shard.parent.relative_to(path)) for shard in shards if shard != path})
    if len(parents) > 1:
        raise UserError(
            f"{path} holds label shards in {len(parents)} folders ({', '.join(parents[:4])}{', ...' * (len(parents) > 4)}), "
            "and labels of a campaign's reference stages are for judging models, not for training. Name the folders to "
            "train on one by one, such as round-001/label."
        )
    return [_shard(shard) for shard in shards if read_json(shard / SHARD_FILE)["labels"]]


def _shard(folder: Path) -> SourceFile:
    file = HpcftFile(folder / LABELS_FILE, LabelKeys())
    if not set(read_json(folder / SHARD_FILE)["labels"]) <= file.values_of("key"):
        raise UserError(
            f"{file.path} lacks labels that {folder / SHARD_FILE} lists; restore it from a backup, or have the label "
            "task run again."
        )
    return file


class AseFile:
    """Any file that ASE reads; its structures stay in memory."""

    def __init__(self, path: Path, keys: LabelKeys) -> None:
        self.path = path
        structures = read_any(path)
        self._frames = [replace(frame_of(atoms, keys), structure=_bare(atoms)) for atoms in structures]
        has_energy = any(frame.energy is not None for frame in self._frames)
        has_forces = any(frame.forces is not None for frame in self._frames)
        if not (has_energy and has_forces):
            raise _no_labels(
                path,
                keys,
                (has_energy, has_forces),
                info={key for atoms in structures for key in atoms.info},
                arrays={key for atoms in structures for key in atoms.arrays} - {"numbers", "positions"},
                results={key for atoms in structures for key in calculator_results(atoms)},
            )

    def __len__(self) -> int:
        return len(self._frames)

    def frames(self) -> Iterator[Frame]:
        return iter(self._frames)

    def frame(self, index: int) -> Frame:
        return self._frames[index]


class HpcftFile:
    """A file of `write_structures`; holds no structure. REF_* where it does not have the keys that were asked for."""

    def __init__(self, path: Path, keys: LabelKeys) -> None:
        self.path = path
        self._file = StructureFile(path)
        info, arrays = self._file.info_keys, self._file.array_keys
        self._keys = keys if keys.energy in info or keys.forces in arrays else LabelKeys()
        has = (self._keys.energy in info, self._keys.forces in arrays)
        if not all(has):
            raise _no_labels(path, keys, has, info, arrays, ())
        self._read = {
            *vars(self._keys).values(),
            VIRIALS_KEY,
            *WEIGHTS,
            STRESS_WEIGHT,
            VIRIALS_WEIGHT,
            "config_type",
        }

    def __len__(self) -> int:
        return len(self._file)

    def frames(self) -> Iterator[Frame]:
        for start, stop in self._pieces():
            for atoms in self._file.read(start, stop, self._read):
                yield frame_of(atoms, self._keys)

    def frame(self, index: int) -> Frame:
        return frame_of(self._file.read(index, index + 1, self._read)[0], self._keys)

    def values_of(self, key: str) -> set[Any]:
        """What stands under an info key, over all structures."""
        pieces = (self._file.read(start, stop, {key}) for start, stop in self._pieces())
        return {atoms.info.get(key) for piece in pieces for atoms in piece}

    def _pieces(self) -> Iterator[tuple[int, int]]:
        ends = np.cumsum(self._file.num_atoms_each)
        start, done = 0, 0
        while start < len(self):
            stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK_ATOMS, side="right")))
            yield start, stop
            start, done = stop, int(ends[stop - 1])


def _bare(atoms: Atoms) -> Atoms:
    """Without all else that a file may hold, which would stay in memory."""
    return Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def _no_labels(
    path: Path,
    keys: LabelKeys,
    has: tuple[bool, bool],
    info: Collection[str],
    arrays: Collection[str],
    results: Collection[str],
) -> UserError:
    wanted = (("energy", keys.energy), ("forces", keys.forces))
    absent = " and ".join(
        f"{name} ({key})" for (name, key), present in zip(wanted, has, strict=True) if not present
    )
    held = {"per structure": info, "per atom": arrays, "results that ASE put into a calculator": results}
    listed = "; ".join(f"{what}: {', '.join(sorted(found))}" for what, found in held.items() if found)
    if {"energy", "forces"} <= set(results):
        options = [f"--{name}-key {name}" for name in ("energy", "forces", "stress") if name in results]
        remedy = f"To train on the results give {' '.join(options)}, or rename them in the file to REF_energy, REF_forces"
    else:
        remedy = (
            "Name what it has with --energy-key and --forces-key, or rename it to REF_energy and REF_forces"
        )
    return UserError(
        f"{path} has no {absent} in any frame, so there is nothing to train on. It holds {listed or 'bare structures'}. "
        f"{remedy}."
    )

"""The frames of a replica as a sequence of ASE structures, each read when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_masses

from hpcft.storage.frames import FrameBlock
from hpcft.storage.replica_reader import ReplicaReader
from hpcft.storage.tree import Array, blank

# Frames that lie further apart are read one by one.
_SPARSE = 8


class ReplicaFrames(Sequence[Atoms]):
    """For whatever takes a sequence of Atoms, while the trajectory is open; slices are such sequences again.

    Nothing is kept: each access reads the frame, and iteration some hundred kB ahead. DamagedFile if a frame is not
    what was written.
    """

    def __init__(self, reader: Callable[[], ReplicaReader], indices: range | None = None) -> None:
        self._reader = reader
        self._indices = range(reader().num_frames) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Atoms: ...
    @overload
    def __getitem__(self, index: slice) -> ReplicaFrames: ...
    def __getitem__(self, index: int | slice) -> Atoms | ReplicaFrames:
        if isinstance(index, slice):
            return ReplicaFrames(self._reader, self._indices[index])
        reader = self._reader()
        try:
            frame = self._indices[index]
        except IndexError:
            raise IndexError(
                f"{reader.path}: these are {len(self)} frames of replica {reader.replica}, "
                f"so there is no frame {index}."
            ) from None
        return atoms_of(reader.block(frame, frame + 1), 0)

    def __iter__(self) -> Iterator[Atoms]:
        distance = abs(self._indices.step)
        at_once = max(1, self._reader().frames_at_once // distance) if distance < _SPARSE else 1
        for first in range(0, len(self), at_once):
            wanted = self._indices[first : first + at_once]
            start = min(wanted)
            block = self._reader().block(start, max(wanted) + 1)
            for frame in wanted:
                yield atoms_of(block, frame - start)


def atoms_of(block: FrameBlock, index: int) -> Atoms:
    """One frame with velocities, and energy and forces as results of a calculator, where it has them.

    In `info`: step, time_fs, potential_energy, temperature_K and the observables.
    """
    atoms = Atoms(
        numbers=block.numbers, positions=block.positions[index], cell=block.cell[index], pbc=block.pbc
    )
    if not np.array_equal(block.masses, atomic_masses[block.numbers]):
        atoms.set_masses(block.masses)
    if not _is_missing(block.velocities[index]):
        atoms.set_velocities(block.velocities[index].astype(np.float64) / units.fs)
    scalars = ("step", "time_fs", "potential_energy", "temperature_K")
    for name, values in ({name: getattr(block, name) for name in scalars} | block.observables).items():
        value = values[index]
        atoms.info[name] = value.item() if np.ndim(value) == 0 else value.copy()
    results: dict[str, Any] = {"energy": float(block.potential_energy[index])}
    if not _is_missing(block.forces[index]):
        results["forces"] = block.forces[index]
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _is_missing(rows: Array) -> bool:
    return bool(blank(rows[None])[0])

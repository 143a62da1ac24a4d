"""Trajectories of many replicas: the whole public face of writing and reading them.

While a run goes on, `write_segment` commits frames and a checkpoint, and `list_segments` finds what is
committed; in the end `consolidate` makes one H5MD file of it, which `Trajectory` reads and `write_h5md_view`
shows to other programs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from ase import Atoms, units
from ase.data import atomic_masses

from hpcft.errors import UserError
from hpcft.storage import layout
from hpcft.storage.consolidation import consolidate
from hpcft.storage.frames import PER_FRAME, STATIC, FrameBlock
from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.segments import (
    delete_segments,
    list_segments,
    read_segment,
    segment_path,
    set_aside_uncommitted,
    write_segment,
)
from hpcft.storage.tree import Array, decode_name, read_attributes, read_tree

__all__ = [
    "FrameBlock",
    "Trajectory",
    "consolidate",
    "delete_segments",
    "list_segments",
    "read_segment",
    "segment_path",
    "set_aside_uncommitted",
    "write_h5md_view",
    "write_segment",
]


class Trajectory:
    """Reader of a consolidated trajectory, for a `with` statement; UserError for what the file has not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._file = self._stack.enter_context(open_file(path, "trajectory"))
        self.replicas: list[int] = sorted(int(name) for name in self._file.get("replicas", ()))
        self.provenance: dict[str, Any] = read_attributes(self._file["provenance"])
        self._static: dict[int, dict[str, Array]] = {}
        self._datasets: dict[tuple[int, str], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not handed on to `open_file`: the errors of a `with` body say nothing about this file.
        self.close()

    def close(self) -> None:
        self._stack.close()

    def num_frames(self, replica: int) -> int:
        return len(self._dataset(replica, "step"))

    def observable_names(self, replica: int) -> list[str]:
        """Names of the replica's observables for `array`, besides energy and temperature."""
        group = self._root(replica)[layout.OBSERVABLES]
        own = {path for path, _ in layout.PER_FRAME.values()}
        return [decode_name(name) for name in group if f"{layout.OBSERVABLES}/{name}" not in own]

    def array(self, replica: int, name: str) -> Array:
        """All frames of one quantity: a field of FrameBlock or the name of an observable."""
        dataset = self._dataset(replica, name)
        return np.asarray(dataset[0] if name in STATIC and len(dataset) else dataset[()])

    def frame(self, replica: int, index: int) -> Atoms:
        """One frame (negative from the end) with velocities.

        In `info`: step, time_fs, potential_energy, temperature_K and the observables.
        """
        count = self.num_frames(replica)
        if not -count <= index < count:
            raise UserError(
                f"{self.path}: replica {replica} has {count} frames, so there is no frame {index}."
            )
        if replica not in self._static:
            self._static[replica] = {name: self.array(replica, name) for name in STATIC}
        static = self._static[replica]

        def value(name: str) -> Any:
            return self._dataset(replica, name)[index % count]

        atoms = Atoms(
            numbers=static["numbers"], positions=value("positions"), cell=value("cell"), pbc=static["pbc"]
        )
        if not np.array_equal(static["masses"], atomic_masses[static["numbers"]]):
            atoms.set_masses(static["masses"])
        atoms.set_velocities(value("velocities").astype(np.float64) / units.fs)
        for name in ("step", "time_fs", "potential_energy", "temperature_K", *self.observable_names(replica)):
            item = value(name)
            atoms.info[name] = item.item() if np.ndim(item) == 0 else item
        return atoms

    def frames(self, replica: int, indices: slice = slice(None)) -> Iterator[Atoms]:
        """The frames of a slice, each read when its turn comes."""
        for index in range(*indices.indices(self.num_frames(replica))):
            yield self.frame(replica, index)

    def checkpoint(self) -> dict[str, Any]:
        """The state after the last frame, as the run that wrote it laid it down."""
        return read_tree(self._file["checkpoint"])

    def _root(self, replica: int) -> Any:
        if replica not in self.replicas:
            some = f"{self.replicas[0]} to {self.replicas[-1]}" if self.replicas else "none"
            raise UserError(
                f"{self.path} has no replica {replica}; it holds {len(self.replicas)} replicas ({some})."
            )
        return self._file[layout.replica_path(replica)]

    def _dataset(self, replica: int, name: str) -> Any:
        if (replica, name) not in self._datasets:
            root, path = self._root(replica), layout.dataset_path(name)
            if path not in root:
                known = [*STATIC, *PER_FRAME, *self.observable_names(replica)]
                raise UserError(f"{self.path}: replica {replica} has no {name!r}; it has {', '.join(known)}.")
            self._datasets[replica, name] = root[path]
        return self._datasets[replica, name]


def write_h5md_view(trajectory_path: Path, replica: int, out: Path) -> None:
    """Write a small file that shows one replica as an ordinary H5MD trajectory to other programs.

    Name it `.h5md` for MDAnalysis, `.h5` for ASE with znh5md. It holds relative external links, so the two
    files must move together. MDAnalysis refuses forces in eV/Å as `ts.forces`, but has `ts.data["forces"]`.
    """
    with Trajectory(trajectory_path) as trajectory:
        trajectory.num_frames(replica)  # complains if there is no such replica
    target = os.path.relpath(trajectory_path.resolve(), out.parent.resolve())
    root = layout.replica_path(replica)

    def fill(file: Any) -> None:
        for name in ("h5md", "particles", layout.OBSERVABLES):
            file[name] = h5py.ExternalLink(target, f"{root}/{name}")
        file["observables/forces"] = h5py.ExternalLink(target, f"{root}/{layout.PARTICLES}/forces")

    write_file(out, "view", fill)

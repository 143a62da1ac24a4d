"""Trajectories of many replicas: the whole public face of writing and reading them.

While a run goes on, `write_segment` commits frames and a checkpoint, and `list_segments` finds what is
committed; in the end `consolidate` makes one H5MD file of it, which `Trajectory` reads and `write_h5md_view`
shows to other programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
from ase import Atoms

from hpcft.errors import UserError
from hpcft.storage import layout
from hpcft.storage.consolidation import consolidate
from hpcft.storage.frame_digests import has_digests, is_proven
from hpcft.storage.frames import FrameBlock
from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.replica_frames import ReplicaFrames
from hpcft.storage.replica_reader import ReplicaReader
from hpcft.storage.seal import DamagedFile
from hpcft.storage.segments import (
    delete_segments,
    list_segments,
    read_segment,
    segment_path,
    set_aside_uncommitted,
    write_segment,
)
from hpcft.storage.tree import Array, read_attributes, read_tree

__all__ = [
    "FrameBlock",
    "ReplicaFrames",
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


# Of replicas read in turns: to open one's dozen datasets takes six times as long as a frame (5 ms), and 0.6 MB while it is open.
_MOST_READERS = 256


class Trajectory:
    """Reader of a consolidated trajectory, for a `with` statement; UserError for what the file has not.

    `trajectory[replica]` is a sequence of ASE structures of which nothing is in memory, so there may be millions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._readers: dict[int, ReplicaReader] = {}
        with ExitStack() as stack:
            self._file = stack.enter_context(open_file(path, "trajectory"))
            self.replicas: list[int] = sorted(int(name) for name in self._file.get("replicas", ()))
            self.provenance: dict[str, Any] = self._compared("provenance", read_attributes)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not handed on to `open_file`: the errors of a `with` body say nothing about this file.
        self.close()

    def close(self) -> None:
        self._readers.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[int]:
        """The replicas, as a dictionary's keys."""
        return iter(self.replicas)

    def __getitem__(self, replica: int) -> ReplicaFrames:
        """All frames of a replica, read one by one when they are used; a slice of them is lazy too."""
        return ReplicaFrames(partial(self._reader, replica))

    def num_frames(self, replica: int) -> int:
        return self._reader(replica).num_frames

    def observable_names(self, replica: int) -> list[str]:
        """Names of the replica's observables for `array`, besides energy and temperature."""
        return list(self._reader(replica).observable_names)

    def array(self, replica: int, name: str, frames: slice = slice(None)) -> Array:
        """One quantity of the frames of a slice, or of all: a field of FrameBlock or the name of an observable.

        What all frames share (numbers, masses, pbc) comes once. DamagedFile if bytes have changed.
        """
        return self._reader(replica).array(name, frames)

    def frame(self, replica: int, index: int) -> Atoms:
        """One frame (negative from the end) with velocities, and energy and forces from `calc`; see `atoms_of`."""
        frames = self[replica]
        if not -len(frames) <= index < len(frames):
            raise UserError(
                f"{self.path}: replica {replica} has {len(frames)} frames, so there is no frame {index}."
            )
        return frames[index]

    def frames(self, replica: int, indices: slice = slice(None)) -> Iterator[Atoms]:
        """The frames of a slice, each read when its turn comes."""
        return iter(self[replica][indices])

    def checkpoint(self) -> dict[str, Any]:
        """The state after the last frame, as the run that wrote it laid it down."""
        return self._compared("checkpoint", read_tree)

    def _compared(self, name: str, read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        tree = read(self._file[name])
        if has_digests(self._file) and not is_proven(self._file, name, tree):
            raise DamagedFile(
                f"{self.path} is damaged: its {name} is not what was written. Restore it from a backup, or let "
                f"hpcft verify {self.path} --repair OUT write a new file of what can be proven."
            )
        return tree

    def _reader(self, replica: int) -> ReplicaReader:
        if not self._file:
            raise UserError(f"{self.path} has been closed; read its frames inside the `with` statement.")
        if replica not in self.replicas:
            some = f"{self.replicas[0]} to {self.replicas[-1]}" if self.replicas else "none"
            raise UserError(
                f"{self.path} has no replica {replica}; it holds {len(self.replicas)} replicas ({some})."
            )
        reader = self._readers.pop(replica, None) or ReplicaReader(self.path, self._file, replica)
        if len(self._readers) == _MOST_READERS:
            del self._readers[next(iter(self._readers))]  # the one that was not used for longest
        self._readers[replica] = reader
        return reader


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

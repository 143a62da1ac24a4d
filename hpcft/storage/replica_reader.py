"""One replica of an open trajectory file: its frames as blocks and arrays, compared with what proves them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcft.errors import UserError
from hpcft.storage import layout
from hpcft.storage.frame_digests import digest_frames, digests_path, has_digests
from hpcft.storage.frames import PER_FRAME, STATIC, FrameBlock
from hpcft.storage.seal import DamagedFile
from hpcft.storage.tree import Array, blank, decode_name

# For each dataset, of which there are a dozen in each replica: one chunk as `consolidate` makes them. HDF5's default is 8 MiB.
_CACHE_BYTES = 1 << 16

_MOST_BYTES_AT_ONCE, _MOST_FRAMES_AT_ONCE = 1 << 20, 1024


class ReplicaReader:
    """Reads from `file` while that is open; UserError for what it has not, DamagedFile for what was altered in it.

    `path` is for messages.
    """

    def __init__(self, path: Path, file: Any, replica: int) -> None:
        self.path = path
        self.replica = replica
        self._datasets: dict[str, Any] = {}
        with self._reading("what tells where they are", "all frames"):
            self._root = file[layout.replica_path(replica)]
            self._digests = file[digests_path(replica)] if has_digests(file) else None
            self.num_frames: int = len(self._dataset("step"))

    @cached_property
    def observable_names(self) -> list[str]:
        """Besides energy and temperature."""
        own = {path for path, _ in layout.PER_FRAME.values()}
        group = self._root[layout.OBSERVABLES]
        return [decode_name(name) for name in group if f"{layout.OBSERVABLES}/{name}" not in own]

    @cached_property
    def frames_at_once(self) -> int:
        """As many as may be read together without much memory."""
        datasets = [self._dataset(name) for name in (*PER_FRAME, *self.observable_names)]
        num_bytes: int = sum(dataset.dtype.itemsize * math.prod(dataset.shape[1:]) for dataset in datasets)
        return max(1, min(_MOST_FRAMES_AT_ONCE, _MOST_BYTES_AT_ONCE // num_bytes))

    def array(self, name: str, frames: slice = slice(None)) -> Array:
        """One quantity in the frames of a slice [f,...]; what all frames share comes once and as it is.

        Checked by HDF5's checksums, and where these are blind as `block` does.
        """
        if name in STATIC:
            return self._static[name].copy()
        rows = range(*frames.indices(self.num_frames))
        rising = rows if rows.step > 0 else rows[::-1]  # as HDF5 wants it
        values = self._read(name, slice(rising.start, rising.stop, rising.step) if rising else slice(0))
        self._check_lost(values, rising)
        return values if rising is rows else values[::-1]

    def block(self, start: int, stop: int) -> FrameBlock:
        """Frames `start` to `stop` (not included); DamagedFile if one of them is not bit for bit what was written."""
        rows = {name: self._read(name, slice(start, stop)) for name in (*PER_FRAME, *self.observable_names)}
        fields = {name: rows.pop(name) for name in PER_FRAME}
        static = self._static  # outside of the `try`: what is damaged there has said so already
        try:
            block = FrameBlock(replica=self.replica, **static, **fields, observables=rows)
        except ValueError as error:
            raise self._damaged(_named(start, stop), str(error)) from error
        if self._digests is not None:
            wrong = (digest_frames(block) != self._digests[start:stop]).any(axis=1)
            if wrong.any():
                first = start + int(wrong.argmax())
                raise self._damaged(f"frame {first}", "its SHA-256 is not the one that was written with it")
        return block

    def _check_lost(self, values: Array, frames: range) -> None:
        """Compare all of a frame whose row here is only zeros, or only ones: fletcher32 is blind to such chunks.

        Or only NaN: so reads a chunk that is not there, whether it never was or the way to it is lost.
        """
        if self._digests is None or not values.size:
            return
        raw = values.reshape(len(values), -1).view(np.uint8)
        suspects = np.flatnonzero((raw[:, 0] == 0) | (raw[:, 0] == 255))
        same = suspects[(raw[suspects] == raw[suspects, :1]).all(axis=1)]
        indices = frames.start + frames.step * np.union1d(same, np.flatnonzero(blank(values)))
        for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
            for first in range(0, len(run), self.frames_at_once):
                some = run[first : first + self.frames_at_once]
                self.block(int(some[0]), int(some[-1]) + 1)

    @cached_property
    def _static(self) -> dict[str, Array]:
        return {name: self._read(name, 0) for name in STATIC}

    def _read(self, name: str, rows: slice | int) -> Array:
        dataset = self._dataset(name)
        start, stop, _ = rows.indices(len(dataset)) if isinstance(rows, slice) else (rows, rows + 1, 1)
        with self._reading(name, _named(start, stop)):
            return np.asarray(dataset[rows])

    @contextmanager
    def _reading(self, what: str, which: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError) as error:
            # An errno means a lock or a failing disk: the content may be sound for all we know.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(which, f"{what} cannot be read: {error}") from error

    def _damaged(self, which: str, why: str) -> DamagedFile:
        return DamagedFile(
            f"{self.path} is damaged in {which} of replica {self.replica} ({why}). Restore it from a backup; or "
            f"hpcft verify {self.path} --repair OUT writes a new file of the frames before the damage."
        )

    def _dataset(self, name: str) -> Any:
        if name not in self._datasets:
            path = layout.dataset_path(name)
            if path not in self._root:
                known = ", ".join([*STATIC, *PER_FRAME, *self.observable_names])
                raise UserError(f"{self.path}: replica {self.replica} has no {name!r}; it has {known}.")
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            access.set_chunk_cache(521, _CACHE_BYTES, 0.75)
            self._datasets[name] = h5py.Dataset(h5py.h5d.open(self._root.id, path.encode(), access))
        return self._datasets[name]


def _named(start: int, stop: int) -> str:
    return f"frame {start}" if stop == start + 1 else f"frames {start} to {stop - 1}"

"""HDF5 files that are read for hours, one piece at a time, by one process or by many."""

from __future__ import annotations

import os
import weakref
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import h5py

from hpcft.errors import UserError

# A folder may hold more shards than a process may open files (1024 on most machines).
_MOST_OPEN = 128


class LazyFile:
    """An HDF5 file that is opened when it is first used, once in each process: it survives fork and pickling.

    The newest 128 of a process stay open, and any other is opened anew when it is used again. For one thread.
    """

    _opened: ClassVar[deque[weakref.ref[LazyFile]]] = deque()

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._file: Any = None
        self._nodes: dict[str, Any] = {}
        self._process = 0

    def __getitem__(self, name: str) -> Any:
        """A dataset or group, not to be kept by the caller; KeyError if there is none. Finding one is dear, so they are kept."""
        file = self._open()
        if name not in self._nodes:
            self._nodes[name] = file[name]
        return self._nodes[name]

    def read_once(self, name: str) -> Any:
        """A dataset or group of which there are too many to be kept."""
        return self._open()[name]

    def _open(self) -> Any:
        if self._file is None or self._process != os.getpid():
            self.close()  # or HDF5 would find it open and go on with the descriptor of the parent process
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise UserError(
                    f"{self.path} could be read before, but not any more ({error}). Restore it and start again."
                ) from error
            self._process = os.getpid()
            self._opened.append(weakref.ref(self))
            if len(self._opened) > _MOST_OPEN and (oldest := self._opened.popleft()()) not in (None, self):
                assert oldest is not None
                oldest.close()
        return self._file

    def close(self) -> None:
        self._nodes = {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None, "_nodes": {}}

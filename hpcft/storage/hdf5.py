"""HDF5 files of ours: written whole, sealed, published in one step; opened with errors that name the remedy."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from hpcft.errors import UserError
from hpcft.storage.atomic import errors_naming, publish, publish_once, temporary_beside
from hpcft.storage.seal import SEAL_BYTES, DamagedFile, check_seal, expect_seal, read_seal, write_seal

# Readable since HDF5 1.10; groups and chunk indices take a third of the space of the oldest format, and
# attributes have no limit of 64 kB.
_LIBRARY_VERSIONS = ("v110", "v110")


def write_file(path: Path, kind: str, fill: Callable[[Any], None], *, once: bool = False) -> bool:
    """Let `fill` write a new HDF5 file and publish it as `path`; with `once`, False if that exists already.

    Raises OSError on a full disk or an exceeded quota; then `path` is as it was before.
    """
    temporary = temporary_beside(path)
    try:
        sink = _Sink(temporary)
        try:
            with h5py.File(sink, "w", libver=_LIBRARY_VERSIONS, userblock_size=SEAL_BYTES) as file:
                fill(file)
        finally:
            with errors_naming(path):
                sink.finish()
        with errors_naming(path):
            write_seal(temporary, kind)
        if once:
            return publish_once(temporary, path)
        publish(temporary, path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def open_file(path: Path, *kinds: str, verify: bool = False) -> Iterator[Any]:
    """The h5py.File for reading; UserError if there is none or it is not of `kinds` (any HDF5 if none are given).

    With `verify`, DamagedFile if the file is not bit for bit what was written; else only its length is compared.
    """
    if read_seal(path) is not None or kinds:
        kind = expect_seal(path).kind
        if kinds and kind not in kinds:
            raise UserError(
                f"{path} is of kind {kind}, but {' or '.join(kinds)} is needed here; give such a file."
            )
        if verify:
            check_seal(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        # An errno means no access, a lock or a failing disk: the content may be sound for all we know.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFile(
            f"{path} is damaged or is no HDF5 file ({error}). It cannot be repaired: restore it from a backup, "
            "or set it aside and let hpcft write it again."
        ) from error


def kind_of(path: Path) -> str:
    """'trajectory', 'segment', 'structures' or 'view' for our own files, otherwise 'other'."""
    seal = read_seal(path)
    return "other" if seal is None else seal.kind


class _Sink(io.RawIOBase):
    """A new file that keeps the first failed write for `finish` and tells HDF5 that all went well.

    HDF5 2.0 cannot close a file whose writes fail: it keeps half-freed objects, and the process dies of SIGSEGV
    when it ends (seen on a full disk with h5py 3.16).
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = os.fstat(self._descriptor).st_size
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = os.preadv(self._descriptor, [view], self._position)
        view[done:] = bytes(len(view) - done)  # bytes lost to a failed write must not be left to chance
        self._position += len(view)
        return len(view)

    def write(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, done = self._position, 0
        self._position += len(view)
        try:
            while done < len(view) and self._error is None:
                done += os.pwrite(self._descriptor, view[done:], start + done)
        except OSError as error:
            self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._error = error
        return size

    def finish(self) -> None:
        """Close, and raise what any write met."""
        os.close(self._descriptor)
        self.close()
        if self._error is not None:
            raise self._error

"""The process that reads a damaged trajectory, because HDF5 may loop for ever or crash on what it finds there.

What is proven it commits as segments in a folder, so that it may be killed at any moment. It tells its parent what
it begins and what it has, as pairs of a word and a value:

    opened     the parts to be read: replicas, then `checkpoint` and `provenance`
    begin      one of these parts
    frames     how many the replica had
    kept       so many more of them are committed
    checkpoint it is proven, and this; the same for provenance
    lost       why the part that was begun ends here
    end        all parts have been read
    unreadable why nothing can be read
    failed     the OSError that kept it from writing
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py

from hpcft.errors import UserError
from hpcft.storage.frame_digests import has_digests, is_proven
from hpcft.storage.frames import FrameBlock
from hpcft.storage.replica_reader import ReplicaReader
from hpcft.storage.seal import read_seal
from hpcft.storage.segments import segment_files, segment_path, write_segment
from hpcft.storage.tree import read_attributes, read_tree

Part = int | str

# What h5py and we say of a damaged file; with an errno too, for here the disk may be what is damaged.
_DAMAGE = (
    UserError, OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError,
    OverflowError, MemoryError,
)  # fmt: skip

_NOT_WHAT_WAS_WRITTEN = ("lost", "it is not what was written")

_READS_PER_SEGMENT = 32
_PR_SET_PDEATHSIG = 1


def main(descriptor: int, damaged: str, folder: str, done: Collection[Part]) -> None:
    """Read all parts but those that are `done`, and commit what is proven to `folder`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a loop in HDF5 would outlive a killed parent
    connection = Connection(descriptor, readable=False)
    try:
        read_damaged(Path(damaged), Path(folder), done, lambda *message: connection.send(message))
    except OSError as error:
        connection.send(("failed", error))


def read_damaged(
    damaged: Path, folder: Path, done: Collection[Part], say: Callable[[str, Any], None]
) -> None:
    """The same, in this process; raises only the OSError of a write."""
    try:
        file = h5py.File(PaddedFile(damaged), "r")
        if not has_digests(file):
            say(
                "unreadable",
                "hpcft wrote it before it kept a checksum of each frame, so no frame can be proven",
            )
            return
        parts: list[Part] = sorted(int(name) for name in file["replicas"])
    except _DAMAGE as error:
        say("unreadable", f"what HDF5 needs to find anything in it is destroyed ({error})")
        return
    parts += ["checkpoint", "provenance"]
    say("opened", parts)
    number = len(segment_files(folder))
    for part in parts:
        if part in done:
            continue
        say("begin", part)
        for word, value in _read(file, damaged, part):
            if word == "commit":
                write_segment(segment_path(folder, number), [value], {})
                number += 1
                word, value = "kept", value.num_frames
            say(word, value)
    say("end", None)


class PaddedFile(io.RawIOBase):
    """A file for reading that was cut off, with zeros up to the length it was sealed with: HDF5 opens no shorter one."""

    def __init__(self, path: Path) -> None:
        seal = read_seal(path)
        self._file = path.open("rb", buffering=0)
        self._size = max(path.stat().st_size, 0 if seal is None else seal.num_bytes)
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = start[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = os.preadv(self._file.fileno(), [view], self._position)
        view[done:] = bytes(len(view) - done)
        self._position += len(view)
        return len(view)


def _read(file: Any, path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    """What there is to say of one part; `commit` and a block that shall become a segment."""
    try:
        if part == "checkpoint":
            tree = read_tree(file["checkpoint"])
            yield ("checkpoint", tree) if is_proven(file, part, tree) else _NOT_WHAT_WAS_WRITTEN
        elif part == "provenance":
            attributes = read_attributes(file["provenance"])
            yield ("provenance", attributes) if is_proven(file, part, attributes) else _NOT_WHAT_WAS_WRITTEN
        else:
            reader = ReplicaReader(path, file, int(part))
            yield "frames", reader.num_frames
            for block in _sound_blocks(reader):
                yield "commit", block
    except _DAMAGE as error:
        yield "lost", str(error)


def _sound_blocks(reader: ReplicaReader) -> Iterator[FrameBlock]:
    """The longest prefix of frames that are proven, in blocks; then what _DAMAGE lists, if it is not all of them."""
    at_once = _READS_PER_SEGMENT * reader.frames_at_once
    for start in range(0, reader.num_frames, at_once):
        stop = min(start + at_once, reader.num_frames)
        try:
            yield reader.block(start, stop)
        except _DAMAGE:
            num_sound = _count_sound(reader, start, stop)
            if num_sound:
                yield reader.block(start, start + num_sound)
            raise


def _count_sound(reader: ReplicaReader, start: int, stop: int) -> int:
    """How many of these frames stand before the first that is damaged, which there is."""
    low, high = start, stop
    while high - low > 1:
        middle = (low + high) // 2
        try:
            reader.block(low, middle)
            low = middle
        except _DAMAGE:
            high = middle
    return low - start

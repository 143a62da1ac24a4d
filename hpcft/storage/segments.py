"""Segments: all replicas' frames between two checkpoints, and the checkpoint to go on from, in one HDF5 file.

A segment appears under its name complete and sealed, or not at all, and never changes again. What stands in a
folder as segment 0, 1, ... without a gap and with seals unbroken is the committed prefix of the trajectory.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcft.storage.frames import FrameBlock
from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.packed_tree import read_packed, write_packed
from hpcft.storage.seal import DamagedFile, check_seal, read_seal
from hpcft.storage.tree import Array, blank

_SEGMENT_NAME = re.compile(r"segment-(\d{4,})\.h5")


def segment_folders(run: Path) -> list[Path]:
    """In the folder of a run, those that hold the segments of its ranks."""
    return sorted(path for path in run.glob("segments-*") if path.is_dir())


def segment_path(folder: Path, number: int) -> Path:
    """Where segment `number` (from 0) belongs."""
    return folder / f"segment-{number:04d}.h5"


def write_segment(path: Path, blocks: Sequence[FrameBlock], checkpoint: Mapping[str, Any]) -> bool:
    """Commit new frames and the checkpoint after them; False, with nothing changed, if `path` exists already.

    The checkpoint may nest dictionaries of arrays, numbers, strings and what JSON takes. Raises OSError on a
    full disk.
    """
    replicas = [block.replica for block in blocks]
    if len(set(replicas)) != len(replicas):
        raise ValueError(
            f"{path.name} would get two blocks of one replica; join the frames of each of {replicas}"
        )

    def fill(file: Any) -> None:
        write_packed(file.create_group("frames"), {f"{block.replica:04d}": _pack(block) for block in blocks})
        write_packed(file.create_group("checkpoint"), checkpoint)

    return write_file(path, "segment", fill, once=True)


def read_segment(path: Path, *, frames: bool = True) -> tuple[list[FrameBlock], dict[str, Any]]:
    """The blocks by rising replica (none with `frames=False`), and the checkpoint; DamagedFile if altered."""
    with open_file(path, "segment", verify=True) as file:
        checkpoint = read_packed(file, "checkpoint")
        stored = read_packed(file, "frames") if frames else {}
    blocks = [_unpack(int(name), tree) for name, tree in stored.items()]
    return sorted(blocks, key=lambda block: block.replica), checkpoint


def steps_in_segment(path: Path) -> dict[int, Array]:
    """The steps of the frames of each replica that has a block in a segment; nothing else is read."""
    with open_file(path, "segment") as file:
        stored = read_packed(file, "frames", only=["frames/step"])
    return {int(name): tree["frames"]["step"] for name, tree in stored.items()}


def list_segments(folder: Path) -> list[Path]:
    """The committed prefix: segments 0, 1, ... before the first that is missing or damaged.

    Compares the lengths of all and the checksum of the last; `read_segment` compares the others' when it is their
    turn.
    """
    prefix: list[Path] = []
    while _has_its_length(path := segment_path(folder, len(prefix))):
        prefix.append(path)
    while prefix and not _is_intact(prefix[-1]):
        prefix.pop()
    return prefix


def list_proven_segments(folder: Path) -> list[Path]:
    """As `list_segments`, but the checksums of all are compared, so all of them can be read."""
    prefix: list[Path] = []
    while _has_its_length(path := segment_path(folder, len(prefix))) and _is_intact(path):
        prefix.append(path)
    return prefix


def set_aside_uncommitted(folder: Path) -> list[Path]:
    """Rename the first damaged segment, which is looked for in full, and all after it or after a gap.

    For the sole writer of `folder`, before it resumes: a name that is taken could not be written again. Returns the
    new names, `segment-0007.h5.set-aside-<token>`.
    """
    prefix = set(list_proven_segments(folder))
    return [
        path.rename(path.with_name(f"{path.name}.set-aside-{secrets.token_hex(4)}"))
        for path in segment_files(folder)
        if path not in prefix
    ]


def delete_segments(folder: Path) -> None:
    """Delete all segments after their consolidation, the last first, so that a kill in between leaves a prefix."""
    for path in reversed(segment_files(folder)):
        path.unlink()


def segment_files(folder: Path) -> list[Path]:
    """All that have the name of a segment, by rising number, committed or not."""
    names = [
        (int(found[1]), path) for path in folder.iterdir() if (found := _SEGMENT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(names)]


def _pack(block: FrameBlock) -> dict[str, Any]:
    """Without the frames of a quantity that were not taken down: `taken` [f] says of such a quantity which were."""
    frames = block.per_frame()
    taken = {name: ~empty for name, rows in frames.items() if (empty := blank(rows)).any()}
    frames |= {name: frames[name][mask] for name, mask in taken.items()}
    return {"static": block.static(), "frames": frames, "observables": block.observables, "taken": taken}


def _unpack(replica: int, tree: dict[str, Any]) -> FrameBlock:
    frames = tree["frames"]
    for name, mask in tree["taken"].items():
        rows = np.full((len(mask), *frames[name].shape[1:]), np.nan, frames[name].dtype)
        rows[mask] = frames[name]
        frames[name] = rows
    return FrameBlock(replica=replica, **tree["static"], **frames, observables=tree["observables"])


def _has_its_length(path: Path) -> bool:
    return path.is_file() and (seal := read_seal(path)) is not None and seal.has_length_of(path)


def _is_intact(path: Path) -> bool:
    try:
        return check_seal(path).kind == "segment"
    except DamagedFile:
        return False

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

from hpcft.storage.frames import FrameBlock
from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.seal import DamagedFile, check_seal, read_seal
from hpcft.storage.tree import StreamedDataset, blank, read_tree, write_tree

_SEGMENT_NAME = re.compile(r"segment-(\d{4,})\.h5")


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
        group = file.create_group("replicas")
        for block in blocks:
            frames = block.per_frame()
            sparse = {name: frames.pop(name) for name, rows in block.per_frame().items() if blank(rows).any()}
            tree = {"static": block.static(), "frames": frames, "observables": block.observables}
            write_tree(own := group.create_group(f"{block.replica:04d}"), tree)
            for name, rows in sparse.items():
                StreamedDataset(own["frames"], name, rows, len(rows), sparse=True).append(rows)
        write_tree(file.create_group("checkpoint"), checkpoint)

    return write_file(path, "segment", fill, once=True)


def read_segment(path: Path, *, frames: bool = True) -> tuple[list[FrameBlock], dict[str, Any]]:
    """The blocks by rising replica (none with `frames=False`), and the checkpoint; DamagedFile if altered."""
    with open_file(path, "segment", verify=True) as file:
        checkpoint = read_tree(file["checkpoint"])
        stored = read_tree(file["replicas"]) if frames else {}
    blocks = [
        FrameBlock(replica=int(name), **tree["static"], **tree["frames"], observables=tree["observables"])
        for name, tree in stored.items()
    ]
    return sorted(blocks, key=lambda block: block.replica), checkpoint


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


def _has_its_length(path: Path) -> bool:
    return path.is_file() and (seal := read_seal(path)) is not None and seal.has_length_of(path)


def _is_intact(path: Path) -> bool:
    try:
        return check_seal(path).kind == "segment"
    except DamagedFile:
        return False

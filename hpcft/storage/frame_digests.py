"""SHA-256 of each frame, written beside the frames: what proves a frame when the file around it is damaged.

HDF5's own checksum of a chunk (fletcher32) is no proof: a chunk that became zeros, checksum and all, passes, and
nothing tells which frames a chunk belongs to. A frame's digest is over its replica, the names, types and shapes of
all that it consists of, and every bit of that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcft.storage.frames import FrameBlock
from hpcft.storage.tree import Array

DIGEST_BYTES = 32

DIGESTS = "digests"
"""The group of them: a dataset for each replica, and those of the groups `provenance` and `checkpoint` as attributes."""


def digests_path(replica: int) -> str:
    """The dataset [f,32] with the digests of a replica's frames."""
    return f"/{DIGESTS}/{replica:04d}"


def digest_frames(block: FrameBlock) -> Array:
    """[f,32] uint8: a digest of each frame, the static arrays and the observables included."""
    static, rows = block.static(), block.per_frame() | block.observables
    layout = {name: [values.dtype.str, values.shape[1:]] for name, values in rows.items()}
    layout |= {name: [values.dtype.str, values.shape] for name, values in static.items()}
    common = hashlib.sha256(json.dumps([block.replica, layout], sort_keys=True).encode())
    for name in sorted(static):
        common.update(np.ascontiguousarray(static[name]).data)
    # Side by side first: one update for each frame instead of a dozen.
    frames = np.concatenate([_bytes_of(rows[name]) for name in sorted(rows)], axis=1)
    digests = np.empty((block.num_frames, DIGEST_BYTES), dtype=np.uint8)
    for digest, frame in zip(digests, frames, strict=True):
        own = common.copy()
        own.update(frame)
        digest[:] = np.frombuffer(own.digest(), np.uint8)
    return digests


def digest_tree(tree: Mapping[str, Any]) -> Array:
    """[32] uint8: a digest of what `read_tree` or `read_attributes` returned."""
    digest = hashlib.sha256()
    _feed(digest, tree)
    return np.frombuffer(digest.digest(), np.uint8)


def has_digests(file: Any) -> bool:
    """Whether a trajectory file has them: older ones have not. An error of HDF5's if that cannot be known."""
    return DIGESTS in list(file)  # `in file` says no to what cannot be read


def is_proven(file: Any, name: str, tree: Mapping[str, Any]) -> bool:
    """Whether this is what was written into the group `name` of a trajectory file that has digests."""
    return np.array_equal(file[DIGESTS].attrs[name], digest_tree(tree))


def _bytes_of(rows: Array) -> Array:
    """[f,...] of any type as [f,bytes of a row]."""
    return np.ascontiguousarray(rows).reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint8)


def _feed(digest: Any, tree: Mapping[str, Any]) -> None:
    digest.update(f"{len(tree)} keys".encode())
    for key, value in sorted(tree.items()):
        if isinstance(value, np.ndarray):
            what: Any = [key, value.dtype.str, value.shape]
        else:
            what = [key, "tree"] if isinstance(value, Mapping) else [key, "json", value]
        digest.update(json.dumps(what, sort_keys=True).encode())
        if isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).data)
        elif isinstance(value, Mapping):
            _feed(digest, value)

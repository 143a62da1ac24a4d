"""From the segments of a finished run to one H5MD 1.1 file.

What a damaged file gives back depends on how it was laid down, so: all groups first, or their headers go on at the
end, which a cut takes away; some segments flushed before the next, so that the file grows in the order of time; and
all of a replica's quantities in blocks of the same frames, so that what is lost is lost for the same few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcft import __version__
from hpcft.errors import UserError
from hpcft.storage import layout
from hpcft.storage.frame_digests import DIGEST_BYTES, DIGESTS, digest_frames, digest_tree, digests_path
from hpcft.storage.frames import FrameBlock
from hpcft.storage.hdf5 import write_file
from hpcft.storage.segments import read_segment
from hpcft.storage.tree import (
    Array,
    StreamedDataset,
    blank,
    read_attributes,
    read_tree,
    write_attributes,
    write_tree,
)

# Frames of more have a chunk of their own, smaller ones share one.
_CHUNK_BYTES = 1 << 16

# To append to a dataset costs 0.2 ms, however little it is; but what is written at once stands replica by replica.
_BYTES_AT_ONCE = 1 << 25
_SHARE_AT_ONCE = 1 / 16

# Each chunk is compared when it is read, by whatever program. The cache is for the chunk that is being filled:
# HDF5's own default is 8 MiB for each of thousands of datasets.
_CHECKED: dict[str, Any] = {"fletcher32": True, "rdcc_nbytes": 1 << 19}


def consolidate(segments: Sequence[Path], final: Path, provenance: Mapping[str, Any]) -> None:
    """Write all frames of `segments`, in their order, and the last checkpoint into one H5MD file.

    Each replica that has a frame is an H5MD root of its own under /replicas/NNNN. Few segments are in memory at a
    time (32 MiB, a sixteenth of all, or one), and all are left for the caller to delete, so this is safe to repeat.
    Raises UserError if they do not fit together, OSError on a full disk.
    """
    if not segments:
        raise UserError(f"There is no segment to make {final} from; the run committed nothing yet.")

    def fill(file: Any) -> None:
        h5md = _write_h5md_group(file, str(provenance.get("author", "unknown")))
        about, state, digests = (file.create_group(name) for name in ("provenance", "checkpoint", DIGESTS))
        write_attributes(about, provenance)
        digests.attrs["provenance"] = digest_tree(read_attributes(about))
        digests.attrs["checkpoint"] = np.zeros(DIGEST_BYTES, np.uint8)
        writers: dict[int, _ReplicaWriter] = {}
        checkpoint: dict[str, Any] = {}
        held: list[int] = []
        for path in segments:
            blocks, checkpoint = read_segment(path)
            for block in filter(lambda block: block.num_frames, blocks):
                if block.replica not in writers:
                    expected = block.num_frames * len(segments)
                    writers[block.replica] = _ReplicaWriter(file, h5md, block, expected)
                writers[block.replica].append(block, path)
            held.append(path.stat().st_size)
            is_enough = sum(held) >= _BYTES_AT_ONCE or len(held) >= _SHARE_AT_ONCE * len(segments)
            if is_enough or path == segments[-1]:
                for writer in writers.values():
                    writer.write()
                file.flush()
                held.clear()
        write_tree(state, checkpoint)
        digests.attrs.modify("checkpoint", digest_tree(read_tree(state)))

    write_file(final, "trajectory", fill)


class _ReplicaWriter:
    """Streams one replica's blocks into its H5MD root."""

    def __init__(self, file: Any, h5md: Any, first: FrameBlock, expected_frames: int) -> None:
        self._first = first
        self._last_step = int(first.step[0]) - 1
        self._streams: dict[str, _Held] = {}
        root = file.create_group(layout.replica_path(first.replica))
        root["h5md"] = h5md
        self._rows = _frames_per_chunk(first, expected_frames)
        self._create_series(root, first)
        box = root[f"{layout.PARTICLES}/box"]
        box.attrs["dimension"] = 3
        box.attrs["boundary"] = ["periodic" if periodic else "none" for periodic in first.pbc]
        # No fletcher32: one wrong bit would take the digests of all frames that share a chunk.
        none = np.empty((0, DIGEST_BYTES), np.uint8)
        self._digests = _Held(StreamedDataset(file, digests_path(first.replica), none, self._rows))

    def _create_series(self, root: Any, first: FrameBlock) -> None:
        position = root.create_group(f"{layout.PARTICLES}/position")
        steps = StreamedDataset(position, "step", first.step, self._rows, **_CHECKED)
        times = StreamedDataset(position, "time", first.time_fs, self._rows, "fs", **_CHECKED)
        self._streams |= {"step": _Held(steps), "time_fs": _Held(times)}
        for name, (path, unit) in layout.PER_FRAME.items():
            self._create_element(root, name, path, unit, getattr(first, name))
        for name, values in first.observables.items():
            self._create_element(root, name, layout.observable_path(name), None, values)
        # Equal rows pack to almost nothing; on what changes, gzip takes 20 times longer and saves a fifth.
        packed: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        for name, (path, unit) in layout.STATIC.items():
            self._create_element(root, name, path, unit, getattr(first, name)[None], **packed)

    def _create_element(
        self, root: Any, name: str, path: str, unit: str | None, rows: Any, **options: Any
    ) -> None:
        """One time-dependent H5MD element; all of a replica share one dataset of steps and one of times.

        Also those that only some frames have: MDAnalysis and znh5md look up row i of each for frame i, whatever its own steps
        say, and would show the wrong frame's.
        """
        element = root.require_group(path)
        sparse = bool(blank(rows).any())
        values = StreamedDataset(
            element, "value", rows, self._rows, unit, sparse=sparse, **_CHECKED, **options
        )
        self._streams[name] = _Held(values)
        if "step" not in element:
            element["step"] = root[layout.STEP]
            element["time"] = root[layout.TIME]

    def append(self, block: FrameBlock, source: Path) -> None:
        """Hold frames for the next `write`."""
        self._check_fits(block, source)
        rows = block.per_frame() | block.observables
        for name, value in block.static().items():
            rows[name] = np.broadcast_to(value, (block.num_frames, *value.shape))
        for name, stream in self._streams.items():
            stream.append(rows[name])
        self._digests.append(digest_frames(block))

    def write(self) -> None:
        for stream in (*self._streams.values(), self._digests):
            stream.write()

    def _check_fits(self, block: FrameBlock, source: Path) -> None:
        problem = None
        first = self._first.static()
        if any(not np.array_equal(value, first[name]) for name, value in block.static().items()):
            problem = "other atoms, masses or periodic directions"
        elif _types(block) != _types(self._first):
            problem = "other observables, shapes or number types"
        elif block.step[0] <= self._last_step:
            problem = f"step {block.step[0]} after step {self._last_step}"
        self._last_step = int(block.step[-1])
        if problem is not None:
            raise UserError(
                f"{source} does not continue the segments before it: replica {block.replica} has {problem}. "
                "Segments of different runs were mixed; remove those that do not belong here."
            )


class _Held:
    """Rows on their way to a dataset."""

    def __init__(self, stream: StreamedDataset) -> None:
        self._stream = stream
        self._rows: list[Array] = []

    def append(self, rows: Array) -> None:
        self._rows.append(rows)

    def write(self) -> None:
        if self._rows:
            self._stream.append(np.concatenate(self._rows))
            self._rows.clear()


def _frames_per_chunk(block: FrameBlock, expected_frames: int) -> int:
    """So many that the chunks of no quantity exceed _CHUNK_BYTES, or one; evenly, as the last chunk is stored whole."""
    rows = (block.per_frame() | block.observables).values()
    most = max(1, _CHUNK_BYTES // max(values.nbytes // len(values) for values in rows))
    num_chunks = -(-expected_frames // most)
    return -(-expected_frames // num_chunks)


def _types(block: FrameBlock) -> dict[str, Any]:
    arrays = block.per_frame() | block.observables
    return {name: (values.dtype, values.shape[1:]) for name, values in arrays.items()}


def _write_h5md_group(file: Any, author: str) -> Any:
    h5md = file.create_group("h5md")
    h5md.attrs["version"] = np.array([1, 1])
    h5md.create_group("author").attrs["name"] = author
    creator = h5md.create_group("creator")
    creator.attrs["name"] = "hpcft"
    creator.attrs["version"] = __version__
    h5md.create_group("modules/units").attrs["version"] = np.array([1, 0])
    return h5md

"""From the segments of a finished run to one H5MD 1.1 file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcft import __version__
from hpcft.errors import UserError
from hpcft.storage import layout
from hpcft.storage.frames import FrameBlock
from hpcft.storage.hdf5 import write_file
from hpcft.storage.segments import read_segment
from hpcft.storage.tree import StreamedDataset, write_attributes, write_tree


def consolidate(segments: Sequence[Path], final: Path, provenance: Mapping[str, Any]) -> None:
    """Write all frames of `segments`, in their order, and the last checkpoint into one H5MD file.

    Each replica that has a frame is an H5MD root of its own under /replicas/NNNN. Only one segment is in memory
    at a time, and all are left for the caller to delete, so this is safe to repeat. Raises UserError if they do
    not fit together, OSError on a full disk.
    """
    if not segments:
        raise UserError(f"There is no segment to make {final} from; the run committed nothing yet.")

    def fill(file: Any) -> None:
        h5md = _write_h5md_group(file, str(provenance.get("author", "unknown")))
        writers: dict[int, _ReplicaWriter] = {}
        checkpoint: dict[str, Any] = {}
        for path in segments:
            blocks, checkpoint = read_segment(path)
            for block in filter(lambda block: block.num_frames, blocks):
                if block.replica not in writers:
                    expected = block.num_frames * len(segments)
                    writers[block.replica] = _ReplicaWriter(file, h5md, block, expected)
                writers[block.replica].append(block, path)
        write_tree(file.create_group("checkpoint"), checkpoint)
        write_attributes(file.create_group("provenance"), provenance)

    write_file(final, "trajectory", fill)


class _ReplicaWriter:
    """Streams one replica's blocks into its H5MD root."""

    def __init__(self, file: Any, h5md: Any, first: FrameBlock, expected_frames: int) -> None:
        self._first = first
        self._last_step = int(first.step[0]) - 1
        self._expected_frames = expected_frames
        self._streams: dict[str, StreamedDataset] = {}
        root = file.create_group(layout.replica_path(first.replica))
        root["h5md"] = h5md
        self._create_series(root, first)
        box = root[f"{layout.PARTICLES}/box"]
        box.attrs["dimension"] = 3
        box.attrs["boundary"] = ["periodic" if periodic else "none" for periodic in first.pbc]

    def _create_series(self, root: Any, first: FrameBlock) -> None:
        position = root.create_group(f"{layout.PARTICLES}/position")
        self._streams["step"] = self._stream(position, "step", first.step)
        self._streams["time_fs"] = self._stream(position, "time", first.time_fs)
        self._streams["time_fs"].dataset.attrs["unit"] = "fs"
        for name, (path, unit) in layout.PER_FRAME.items():
            self._create_element(root, name, path, unit, getattr(first, name))
        # Equal rows pack to almost nothing; on what changes, gzip takes 20 times longer and saves a fifth.
        packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        for name, (path, unit) in layout.STATIC.items():
            self._create_element(root, name, path, unit, getattr(first, name)[None], **packed)
        for name, values in first.observables.items():
            self._create_element(root, name, layout.observable_path(name), None, values)

    def _create_element(
        self, root: Any, name: str, path: str, unit: str | None, rows: Any, **options: Any
    ) -> None:
        """One time-dependent H5MD element; all of a replica share one dataset of steps and one of times."""
        element = root.require_group(path)
        self._streams[name] = self._stream(element, "value", rows, **options)
        if unit is not None:
            self._streams[name].dataset.attrs["unit"] = unit
        if "step" not in element:
            element["step"] = root[layout.STEP]
            element["time"] = root[layout.TIME]

    def _stream(self, group: Any, name: str, rows: Any, **options: Any) -> StreamedDataset:
        return StreamedDataset(group, name, rows, self._expected_frames, **options)

    def append(self, block: FrameBlock, source: Path) -> None:
        self._check_fits(block, source)
        rows = block.per_frame() | block.observables
        for name, value in block.static().items():
            rows[name] = np.broadcast_to(value, (block.num_frames, *value.shape))
        for name, stream in self._streams.items():
            stream.append(rows[name])

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

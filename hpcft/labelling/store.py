"""Finding a label again that was paid for once, in whatever round or campaign.

A store is a folder with one index for each folder of shards that was registered: an HDF5 file, replaced in one step, so any
number of processes read and register without a lock.

    keys (N,)     all keys of those shards, sorted: a few of them are found by reading a few kilobytes of millions
    shard (N,)    the shard that holds each key, as a row of the two below
    path (S,), relative_path (S,)

The labels stay in their shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcft.errors import UserError
from hpcft.labelling.journal import Record
from hpcft.labelling.shard import SHARD_FILE, read_shard
from hpcft.storage.atomic import read_json
from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.tree import Array, write_array

log = logging.getLogger(__name__)

_KIND = "labelindex"


class LabelStore:
    """All finished shards that were registered in a folder, on their own or found below another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def register(self, shard: Path) -> None:
        """Add a finished shard, or what it gained since; UserError if it was never finished."""
        if not (shard / SHARD_FILE).is_file():
            raise UserError(
                f"{shard} has no {SHARD_FILE}, so it is no finished shard; call finish_shard on it first."
            )
        self.register_below(shard)

    def register_below(self, folder: Path) -> int:
        """Register every finished shard below a folder; returns how many there are.

        What was registered below the same folder before is replaced.
        """
        folder = folder.resolve()
        shards = sorted(path.parent for path in folder.rglob(SHARD_FILE))
        if not shards:
            return 0
        listed = [_keys_of(shard) for shard in shards]
        keys = np.concatenate(listed)
        numbers = np.repeat(np.arange(len(shards)), [len(some) for some in listed])
        order = np.argsort(keys, kind="stable")
        store = self.folder.resolve()
        columns = {
            "keys": keys[order],
            "shard": numbers[order],
            "path": np.array([str(shard) for shard in shards], dtype=object),
            "relative_path": np.array([os.path.relpath(shard, store) for shard in shards], dtype=object),
        }

        def fill(file: Any) -> None:
            for name, values in columns.items():
                write_array(file, name, values)

        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        write_file(self.folder / f"shards-{name}.h5", _KIND, fill)
        return len(shards)

    def find(self, keys: Iterable[str]) -> dict[str, Record]:
        """The records of those keys that some registered shard holds.

        A shard that has been moved away or damaged is passed over with a warning: its labels count as
        unknown.
        """
        missing = set(keys)
        found: dict[str, Record] = {}
        for index in self._indices():
            for places in _shards_with(index, missing):
                for record in self._read(places):
                    if record.key in missing:
                        found[record.key] = record
                        missing.discard(record.key)
        return found

    def listed(self) -> dict[Path, set[str]]:
        """The keys of every registered shard, by the place beside the store where it is looked for first."""
        found: dict[Path, set[str]] = defaultdict(set)
        for index in self._indices():
            with open_file(index, _KIND) as file:
                places = [(self.folder / path).resolve() for path in file["relative_path"].asstr()[:]]
                for key, number in zip(file["keys"][:], file["shard"][:], strict=True):
                    found[places[number]].add(key.decode())
        return dict(found)

    def _indices(self) -> list[Path]:
        return sorted(self.folder.glob("shards-*.h5"))

    def _read(self, places: Mapping[str, str]) -> list[Record]:
        # First beside the store, where both were moved or copied together; then where it was registered.
        candidates = [self.folder.resolve() / places["relative_path"], Path(places["path"])]
        place = next((path for path in candidates if (path / SHARD_FILE).is_file()), None)
        if place is None:
            log.warning(
                "%s, which the label store %s lists, is gone; its labels count as unknown",
                places["path"],
                self.folder,
            )
            return []
        try:
            return read_shard(place)
        except UserError as error:
            log.warning(
                "a shard of the label store %s cannot be read, so its labels count as unknown: %s",
                self.folder,
                error,
            )
            return []


def _keys_of(shard: Path) -> Array:
    contents = read_json(shard / SHARD_FILE)
    return np.array([key.encode() for key in {*contents["labels"], *contents["relaxations"]}], dtype=bytes)


def _shards_with(index: Path, keys: Iterable[str]) -> list[dict[str, str]]:
    """Where the shards are that hold any of the keys, each once."""
    with open_file(index, _KIND) as file:
        sorted_keys, shard = file["keys"], file["shard"]
        numbers: set[int] = set()
        for key in map(str.encode, keys):
            row = bisect_left(sorted_keys, key)
            while row < len(sorted_keys) and sorted_keys[row] == key:
                numbers.add(int(shard[row]))
                row += 1
        return [{name: file[name].asstr()[n] for name in ("path", "relative_path")} for n in sorted(numbers)]

"""Finding a label again that was paid for once, in whatever round or campaign.

A store is a folder with one index (`label_index`) for each folder of shards that was registered, replaced in one step, so
any number of processes read and register without a lock. The labels stay in their shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from hpcft.errors import UserError
from hpcft.labelling.journal import Record
from hpcft.labelling.label_index import Place, WantedKeys, listed, look_up, write_index
from hpcft.labelling.shard import SHARD_FILE, read_frames, read_records
from hpcft.storage.atomic import read_json
from hpcft.storage.tree import Array

_Found = TypeVar("_Found")

log = logging.getLogger(__name__)


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
        store = self.folder.resolve()
        places = [Place(str(shard), os.path.relpath(shard, store)) for shard in shards]
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        write_index(self.folder / f"shards-{name}.h5", [_keys_of(shard) for shard in shards], places)
        return len(shards)

    def find(self, keys: Iterable[str]) -> dict[str, Record]:
        """The records of those keys that some registered shard holds, frames of relaxations as labels like any other.

        A shard that has been moved away or damaged, and a damaged index, is passed over with a warning: its labels count as
        unknown.
        """
        missing, unreadable = set(keys), set[Path]()
        found: dict[str, Record] = {}
        while missing:
            of_shard = defaultdict(set)
            for key, shard in self.locate(missing, unreadable).items():
                of_shard[shard].add(key)
            if not of_shard:
                break
            for shard, wanted in of_shard.items():
                here = {
                    record.key: replace(record, step=None)
                    for record in self._read(shard, partial(read_records, keys=wanted))
                }
                found |= here
                if len(here) < len(wanted):
                    unreadable.add(shard)
            missing -= found.keys()
        return found

    def find_ways(self, keys: Iterable[str]) -> dict[str, list[Record]]:
        """The labels on the way of relaxations, in order, by the key of the label that they began with: the longest of each."""
        wanted, read = set(keys), set[Path]()
        found: dict[str, list[Record]] = {}
        while shards := set(self.locate(wanted, read).values()):
            for shard in shards:
                for way in self._ways(shard):
                    first = way[0].key
                    if first in wanted and len(way) > len(found.get(first, ())):
                        found[first] = way
            read |= shards
        return found

    def locate(self, keys: Iterable[str], passed_over: Collection[Path] = ()) -> dict[str, Path]:
        """The shard of each key, for those that a registered shard holds; a million keys at once take about a second.

        Labels are not read: of a shard no more is looked at than whether it is still there.
        """
        wanted = WantedKeys(keys)
        shards: list[Path] = []
        shard_w = np.full(len(wanted), -1)
        look_all_up = partial(look_up, wanted=wanted)
        for rows_w, numbers, places in self._each_index(look_all_up) if len(wanted) else ():
            new = np.full(max(places, default=0) + 1, -1)
            for number, place in places.items():
                shard = self._present(place)
                if shard is not None and shard not in passed_over:
                    new[number] = len(shards)
                    shards.append(shard)
            useful = (new[numbers] >= 0) & (shard_w[rows_w] < 0)
            shard_w[rows_w[useful]] = new[numbers[useful]]
        rows = np.flatnonzero(shard_w >= 0)
        found = np.array(shards, dtype=object)[shard_w[rows]].tolist() if shards else ()
        return dict(zip(wanted.names(rows), found, strict=True))

    def listed(self) -> dict[Path, set[str]]:
        """The keys of every registered shard, by the place beside the store where it is looked for first."""
        found: dict[Path, set[str]] = defaultdict(set)
        for places in self._each_index(listed):
            for place, keys in places.items():
                found[(self.folder / place.relative_path).resolve()] |= keys
        return dict(found)

    def shards(self) -> Iterator[Path]:
        """Every registered shard that is still there, once."""
        seen = set[Path]()
        for places in self._each_index(listed):
            for place in places:
                shard = self._present(place)
                if shard is not None and shard not in seen:
                    seen.add(shard)
                    yield shard

    def _each_index(self, read: Callable[[Path], _Found]) -> Iterator[_Found]:
        """What `read` finds in each index. One campaign's damaged index must not stop the others that share the store."""
        for index in sorted(self.folder.glob("shards-*.h5")):
            try:
                found = read(index)
            except UserError as error:
                log.warning(
                    "an index of the label store %s cannot be read, so what it lists counts as unknown until it is registered "
                    "again: %s",
                    self.folder,
                    error,
                )
            else:
                yield found

    def _present(self, place: Place) -> Path | None:
        # First beside the store, where both were moved or copied together; then where it was registered.
        candidates = [(self.folder / place.relative_path).resolve(), Path(place.path)]
        found = next((path for path in candidates if (path / SHARD_FILE).is_file()), None)
        if found is None:
            log.warning(
                "%s, which the label store %s lists, is gone; its labels count as unknown",
                place.path,
                self.folder,
            )
        return found

    def _ways(self, shard: Path) -> list[list[Record]]:
        ways: dict[int, list[Record]] = defaultdict(list)
        for record in self._read(shard, read_frames):
            ways[record.index].append(record)
        return list(ways.values())

    def _read(self, shard: Path, read: Callable[[Path], list[Record]]) -> list[Record]:
        try:
            return read(shard)
        except UserError as error:
            log.warning(
                "a shard of the label store %s cannot be read, so its labels count as unknown: %s",
                self.folder,
                error,
            )
            return []


def _keys_of(shard: Path) -> Array:
    contents = read_json(shard / SHARD_FILE)
    keys = {*contents["labels"], *contents["relaxations"], *contents.get("frames", ())}
    return np.array([key.encode() for key in keys], dtype=bytes)

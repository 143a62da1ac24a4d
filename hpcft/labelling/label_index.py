"""The index of one folder of shards: which shard holds a key, for a few keys or for a million.

    keys (N,)     all keys of those shards, sorted: a few of them are found by reading a few kilobytes of millions
    shard (N,)    the shard that holds each key, as a row of the two below
    path (S,), relative_path (S,)

Shape suffixes: w wanted keys, b rows of a block of the index.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcft.storage.hdf5 import open_file, write_file
from hpcft.storage.tree import Array, write_array

_KIND = "labelindex"
_KEY_LENGTH = 64  # of a SHA-256 in hexadecimal digits
# A key costs about twenty reads of the sorted column: below one in so many it is cheaper than to read all of it.
_DENSE = 4_000
_BLOCK = 1 << 20  # rows that are held at once


class Place(NamedTuple):
    """Where a shard was when it was registered, and where that is seen from the store."""

    path: str
    relative_path: str


class WantedKeys:
    """Keys in the order in which any number of indices can be gone through for them. What is no key is in no index."""

    def __init__(self, keys: Iterable[str]) -> None:
        names = [key for key in keys if len(key) == _KEY_LENGTH]
        text = "".join(names)
        if not text.isascii():
            names = [key for key in names if key.isascii()]
            text = "".join(names)
        column = np.frombuffer(text.encode(), dtype=f"S{_KEY_LENGTH}")
        prefixes = _prefixes(column)
        self._names, self._order = names, np.argsort(prefixes)
        self.keys, self._prefixes = column[self._order], prefixes[self._order]

    def __len__(self) -> int:
        return len(self.keys)

    def names(self, rows_w: Array) -> list[str]:
        """Some of the keys as they were given: to make a million strings anew takes longer than to look them up."""
        return [self._names[number] for number in self._order[rows_w].tolist()]

    def matches(self, keys_b: Array) -> tuple[Array, Array]:
        """Rows of `keys_b` and of the wanted keys that are equal, pair by pair; a key may stand in either more than once."""
        prefixes_b = _prefixes(keys_b)
        rows, wanted = np.arange(len(keys_b)), np.searchsorted(self._prefixes, prefixes_b)
        found = []
        while True:  # ends after as many turns as wanted keys have a prefix in common
            rows, wanted = rows[wanted < len(self)], wanted[wanted < len(self)]
            same = self._prefixes[wanted] == prefixes_b[rows]
            rows, wanted = rows[same], wanted[same]
            if not len(rows):
                break
            equal = keys_b[rows] == self.keys[wanted]
            found.append((rows[equal], wanted[equal]))
            wanted = wanted + 1
        if not found:
            return rows, wanted
        return np.concatenate([r for r, _ in found]), np.concatenate([w for _, w in found])


def write_index(path: Path, keys_each: Sequence[Array], places: Sequence[Place]) -> None:
    """Replace an index by one of these shards, of each the keys and the place."""
    keys = np.concatenate(keys_each)
    numbers = np.repeat(np.arange(len(places)), [len(some) for some in keys_each])
    order = np.argsort(keys, kind="stable")
    columns: dict[str, Array] = {"keys": keys[order], "shard": numbers[order]}
    for name in Place._fields:
        columns[name] = np.array([getattr(place, name) for place in places], dtype=object)

    def fill(file: Any) -> None:
        for name, values in columns.items():
            write_array(file, name, values)

    write_file(path, _KIND, fill)


def look_up(path: Path, wanted: WantedKeys) -> tuple[Array, Array, dict[int, Place]]:
    """Which wanted keys (as rows of `wanted.keys`) are in which shards (as numbers), pair by pair; and where those shards are."""
    with open_file(path, _KIND) as file:
        num_rows = len(file["keys"])
        search = _few if len(wanted) * _DENSE < num_rows else _many
        pairs = list(search(file, wanted))
        rows_w = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in pairs)])
        shards = np.concatenate([np.empty(0, np.int64), *(numbers for _, numbers in pairs)])
        held = np.unique(shards).tolist()
        columns = [file[name].asstr()[:] if held else () for name in Place._fields]
        return (
            rows_w,
            shards,
            {number: Place(*(str(column[number]) for column in columns)) for number in held},
        )


def _many(file: Any, wanted: WantedKeys) -> Iterator[tuple[Array, Array]]:
    for start in range(0, len(file["keys"]), _BLOCK):
        rows_b, rows_w = wanted.matches(file["keys"][start : start + _BLOCK])
        yield rows_w, file["shard"][start : start + _BLOCK][rows_b]


def _few(file: Any, wanted: WantedKeys) -> Iterator[tuple[Array, Array]]:
    sorted_keys, shard = file["keys"], file["shard"]
    for row_w, key in enumerate(wanted.keys):
        first = last = bisect_left(sorted_keys, key)
        while last < len(sorted_keys) and sorted_keys[last] == key:
            last += 1
        yield np.full(last - first, row_w), shard[first:last]


def listed(path: Path) -> dict[Place, set[str]]:
    """All keys of an index by their shard."""
    with open_file(path, _KIND) as file:
        columns = [file[name].asstr()[:] for name in Place._fields]
        numbers, keys = file["shard"][:], file["keys"][:]
    order = np.argsort(numbers, kind="stable")
    sizes = np.bincount(numbers, minlength=len(columns[0])).tolist()
    one_after_the_other = iter(keys[order].tolist())
    return {
        Place(*map(str, place)): {key.decode() for key in islice(one_after_the_other, size)}
        for place, size in zip(zip(*columns, strict=True), sizes, strict=True)
    }


def _prefixes(keys: Array) -> NDArray[np.uint64]:
    """The first eight characters of keys as numbers, which sort as the keys do and are found thirty times faster."""
    if not len(keys):
        return np.empty(0, dtype=np.uint64)
    return keys.view(">u8").reshape(len(keys), -1)[:, 0].astype(np.uint64)

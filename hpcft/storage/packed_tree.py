"""A dictionary of many like dictionaries, such as one for each replica, in a few datasets instead of a dozen for each.

HDF5 takes 0.15 ms to make a dataset, however small. So what all replicas have under one name stands in one dataset, one
replica's after another's, and an index in JSON says whose is how large:

    /frames/index                     {"0000": {"frames": {"positions": ["array", "<f4", [100, 32, 3]], ...}, ...}, ...}
    /frames/<f4/frames/positions      [all replicas' numbers]
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hpcft.errors import UserError
from hpcft.storage.tree import Array, check_key, encode_name, numbers_of

_INDEX = "index"
_ARRAY, _JSON = "array", "json"


def write_packed(group: Any, tree: Mapping[str, Any]) -> None:
    """Write a nested dictionary of arrays, and of what JSON takes; those on its first level should be alike.

    Raises TypeError for what neither can hold.
    """
    columns: dict[str, list[Array]] = {}
    index = _take_apart(tree, group.name, "", 0, columns)
    group.create_dataset(_INDEX, data=json.dumps(index))
    for path, parts in columns.items():
        group.create_dataset(path, data=np.concatenate(parts))


def read_packed(file: Any, name: str, only: Collection[str] | None = None) -> dict[str, Any]:
    """What `write_packed` wrote to the group `name`; of the second level and below `only` these arrays, such as `frames/step`.

    UserError if it was written in another way.
    """
    group = file.get(name)
    if group is None or _INDEX not in group:
        raise UserError(
            f"{file.filename} was written by an older hpcft, whose segments this one cannot read; end that run with "
            "the version that began it, or start it anew in another folder."
        )
    return _Unpacking(group, only).tree(json.loads(group[_INDEX].asstr()[()]), "", 0)


def _take_apart(
    tree: Mapping[str, Any], where: str, path: str, depth: int, columns: dict[str, list[Array]]
) -> dict[str, Any]:
    index: dict[str, Any] = {}
    for key, value in tree.items():
        check_key(key, where)
        below = _below(path, key, depth)
        if isinstance(value, Mapping):
            index[key] = _take_apart(value, where, below, depth + 1, columns)
        elif isinstance(value, np.ndarray | np.generic):
            array = numbers_of(value, f"{where}/{key}")
            columns.setdefault(_column(array.dtype.str, below, key), []).append(array.ravel())
            index[key] = [_ARRAY, array.dtype.str, array.shape]
        else:
            index[key] = [_JSON, value]
    return index


def _below(path: str, key: str, depth: int) -> str:
    """The place of a key in its dictionary of the first level, which has none itself."""
    return f"{path}/{encode_name(key)}".lstrip("/") if depth else ""


def _column(dtype: str, below: str, key: str) -> str:
    return f"{dtype}/{below or encode_name(key)}"


class _Unpacking:
    """Deals out the columns in the order in which they were filled."""

    def __init__(self, group: Any, only: Collection[str] | None) -> None:
        self._group = group
        self._only = only
        self._columns: dict[str, Array] = {}
        self._used: dict[str, int] = {}

    def tree(self, index: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key, entry in index.items():
            below = _below(path, key, depth)
            if isinstance(entry, dict):
                tree[key] = self.tree(entry, below, depth + 1)
            elif entry[0] == _JSON:
                tree[key] = entry[1]
            elif self._only is None or below in self._only:
                tree[key] = self._next(_column(entry[1], below, key), entry[2])
        return tree

    def _next(self, column: str, shape: list[int]) -> Array:
        if column not in self._columns:
            self._columns[column] = self._group[column][()]
        start = self._used.get(column, 0)
        self._used[column] = start + math.prod(shape)
        return self._columns[column][start : self._used[column]].reshape(shape)

"""Nested dictionaries, arrays and attributes in HDF5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_NUMERIC_KINDS = "biufc"
_CHUNK_BYTES = 1 << 18


def write_tree(group: Any, tree: Mapping[str, Any]) -> None:
    """Write a nested dictionary: arrays as datasets, dictionaries as groups, all else as JSON.

    Tuples come back as lists and NumPy scalars as 0-d arrays. Raises TypeError for what neither can hold.
    """
    for key, value in tree.items():
        check_key(key, group.name)
        name = encode_name(key)
        if isinstance(value, Mapping):
            write_tree(group.create_group(name), value)
        elif isinstance(value, np.ndarray | np.generic):
            write_array(group, name, numbers_of(value, f"{group.name}/{key}"))
        else:
            group.create_dataset(name, data=json.dumps(value))


def read_tree(group: Any) -> dict[str, Any]:
    """What `write_tree` wrote."""
    tree: dict[str, Any] = {}
    for name, node in group.items():
        if isinstance(node, h5py.Group):
            value: Any = read_tree(node)
        elif holds_text(node):
            value = json.loads(node.asstr()[()])
        else:
            value = np.asarray(node[()])
        tree[decode_name(name)] = value
    return tree


def check_key(key: Any, where: str) -> None:
    """TypeError for what cannot be a key of a stored dictionary."""
    if not isinstance(key, str) or not key:
        raise TypeError(f"{where} would get the key {key!r}, but keys must be non-empty strings")


def numbers_of(value: Array | np.generic, where: str) -> Array:
    """An array of numbers, 0-d for a scalar; TypeError for one of anything else."""
    if value.dtype.kind not in _NUMERIC_KINDS:
        raise TypeError(f"{where} has type {value.dtype}, but arrays must hold numbers or booleans")
    return np.asarray(value)


def write_array(group: Any, name: str, array: Array, unit: str | None = None) -> None:
    """Create a dataset of numbers, or of strings for dtype object."""
    dataset = group.create_dataset(name, data=array, dtype=_stored_type(array))
    if unit is not None:
        dataset.attrs["unit"] = unit


def _stored_type(array: Array) -> Any:
    return h5py.string_dtype() if array.dtype == object else array.dtype


class StreamedDataset:
    """A dataset that grows by rows (frames), in chunks of whole rows; `expected_rows` bounds the chunks' size.

    Of a `sparse` one each row has a chunk of its own, and one that is `blank` none: it reads as what it is, and takes no space.
    """

    def __init__(
        self,
        group: Any,
        name: str,
        first: Array,
        expected_rows: int,
        unit: str | None = None,
        *,
        sparse: bool = False,
        **options: Any,
    ) -> None:
        shape = first.shape[1:]
        self._is_sparse = sparse
        if sparse:
            expected_rows, options = 1, {**options, "fillvalue": np.nan}
        row_bytes = max(1, first.dtype.itemsize * int(np.prod(shape)))
        most_rows = max(1, _CHUNK_BYTES // row_bytes)
        num_chunks = max(1, -(-expected_rows // most_rows))
        rows = max(1, -(-expected_rows // num_chunks))  # evenly, because the last chunk is stored whole
        self.dataset = group.create_dataset(
            name,
            shape=(0, *shape),
            maxshape=(None, *shape),
            dtype=_stored_type(first),
            chunks=(rows, *(max(1, size) for size in shape)),
            **options,
        )
        if unit is not None:
            self.dataset.attrs["unit"] = unit

    def append(self, rows: Array) -> None:
        start = len(self.dataset)
        self.dataset.resize(start + len(rows), axis=0)
        if not self._is_sparse:
            self.dataset[start:] = rows
            return
        for index in np.flatnonzero(~blank(rows)):
            self.dataset[start + index] = rows[index]


def blank(rows: Array) -> NDArray[np.bool_]:
    """Which rows consist of nothing but NaN, [f]: a quantity that was not taken down there."""
    if rows.dtype.kind != "f" or rows.ndim < 2:
        return np.zeros(len(rows), dtype=bool)
    return np.asarray(np.isnan(rows).all(axis=tuple(range(1, rows.ndim))))


def write_attributes(group: Any, attributes: Mapping[str, Any]) -> None:
    """Write a dictionary as attributes; what HDF5 has no type for becomes JSON under `<key>.json`."""
    for key, value in attributes.items():
        plain = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)
        if plain or (isinstance(value, str) and "\0" not in value):
            group.attrs[key] = value
        else:
            group.attrs[f"{key}.json"] = json.dumps(value)


def read_attributes(group: Any) -> dict[str, Any]:
    """What `write_attributes` wrote."""
    attributes: dict[str, Any] = {}
    for key, value in group.attrs.items():
        if key.endswith(".json"):
            attributes[key.removesuffix(".json")] = json.loads(value)
        else:
            attributes[key] = value.item() if isinstance(value, np.generic) else value
    return attributes


def encode_name(key: str) -> str:
    """A key as an HDF5 link name, in which a slash would open a group and a dot is the group itself."""
    return "%2E" if key == "." else key.replace("%", "%25").replace("/", "%2F")


def decode_name(name: str) -> str:
    """The key of an encoded name."""
    return name.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def is_dataset(node: Any) -> bool:
    """Whether an HDF5 node is a dataset and no group."""
    return isinstance(node, h5py.Dataset)


def holds_text(dataset: Any) -> bool:
    """Whether a dataset is of strings."""
    return h5py.check_string_dtype(dataset.dtype) is not None

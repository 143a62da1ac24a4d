"""Nested dictionaries through HDF5, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import pytest

from hpcft.storage.tree import (
    StreamedDataset,
    decode_name,
    encode_name,
    read_attributes,
    read_tree,
    write_attributes,
    write_tree,
)


@pytest.fixture
def memory() -> Iterator[Any]:
    with h5py.File("in-memory", "w", driver="core", backing_store=False, libver="v110") as file:
        yield file


@pytest.mark.parametrize("key", ["plain", "a/b", ".", "..", "50 %", "%2F", "%252F", "Å", " "])
def test_any_key_comes_back_from_its_name_which_holds_no_slash(key: str) -> None:
    assert decode_name(encode_name(key)) == key
    assert "/" not in encode_name(key)
    assert encode_name(key) != "."


def test_a_checkpoint_comes_back_with_types_and_bits(memory: Any) -> None:
    tree = {
        "random": np.random.default_rng(7).bit_generator.state,  # has integers of 128 bits
        "positions": np.array([[0.1, np.nan, -0.0]], dtype=np.float32),
        "mask": np.array([True, False]),
        "scalar": np.float32(1 / 3),
        "empty": np.zeros((0, 3)),
        "nested": {
            "deeper": {},
            "text": "Delta Q in amu½ Å",
            "nothing": None,
            "list": [1, 2.5, "x"],
            "a/b": 1e-300,
        },
    }
    write_tree(memory, tree)
    back = read_tree(memory)
    assert back["random"] == tree["random"]
    assert back["nested"] == tree["nested"]
    for name in ("positions", "mask", "empty", "scalar"):
        expected = np.asarray(tree[name])
        assert (back[name].dtype, back[name].shape) == (expected.dtype, expected.shape)
        assert back[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "tree, complaint",
    [
        ({"x": object()}, "not JSON serializable"),
        ({"x": np.array(["a"])}, "/x has type <U1"),
        ({3: 1}, "key 3"),
        ({"": 1}, "key ''"),
    ],
)
def test_what_cannot_be_stored_is_refused(memory: Any, tree: dict[Any, Any], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        write_tree(memory, tree)


def test_attributes_of_any_json_type_come_back(memory: Any) -> None:
    attributes = {
        "seed": 3,
        "scale": 0.1,
        "flag": True,
        "name": "Si",
        "versions": {"torch": "2"},
        "none": None,
    }
    attributes |= {"list": [1, 2], "large": 1 << 100, "odd": "a\0b", "long": "x" * 100_000}
    write_attributes(memory, attributes)
    assert read_attributes(memory) == attributes


def test_a_dataset_written_in_pieces_is_the_whole_in_chunks_of_whole_rows(memory: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 30, 3))
    stream = StreamedDataset(memory, "x", rows[:20], expected_rows=40)
    for piece in (rows[:20], rows[20:20], rows[20:]):
        stream.append(piece)
    assert memory["x"][()].tobytes() == rows.tobytes()
    assert memory["x"].chunks == (40, 30, 3)

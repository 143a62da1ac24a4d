"""Many like dictionaries in a few datasets: what comes back, what is refused, and what an older version wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcft.errors import UserError
from hpcft.storage.hdf5 import write_file
from hpcft.storage.packed_tree import read_packed, write_packed
from hpcft.storage.segments import read_segment, steps_in_segment
from hpcft.storage.tree import write_tree


def replica(number: int, frames: int) -> dict[str, Any]:
    rows = np.arange(3.0 * frames).reshape(frames, 3) + 100 * number
    return {
        "frames": {"step": np.arange(frames) + number, "positions": rows.astype(np.float32), "energy": rows},
        "a/b": np.float64(number),
        "why": f"replica {number}",
        "nothing": {},
    }


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            same(found[name], value)
    elif isinstance(expected, np.ndarray | np.generic):
        np.testing.assert_array_equal(found, expected, strict=True)
    else:
        assert found == expected


def test_replicas_of_any_length_come_back_with_their_own_numbers_and_types(tmp_path: Path) -> None:
    tree = {f"{number:04d}": replica(number, frames) for number, frames in enumerate((4, 0, 7))}
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        write_packed(file.create_group("all"), tree)
        same(
            read_packed(file, "all"),
            {name: {**one, "a/b": np.asarray(one["a/b"])} for name, one in tree.items()},
        )
        steps = read_packed(file, "all", only=["frames/step"])
        num_datasets = sum(len(group) for kind, group in file["all"].items() if kind != "index")
    assert [list(one["frames"]) for one in steps.values()] == 3 * [["step"]]
    np.testing.assert_array_equal(steps["0002"]["frames"]["step"], np.arange(7) + 2)
    assert num_datasets < 10  # not some for each replica


@pytest.mark.parametrize("tree", [{"0000": {"": 1}}, {"0000": {"names": np.array(["a"])}}])
def test_what_cannot_be_held_is_named(tmp_path: Path, tree: dict[str, Any]) -> None:
    with (
        h5py.File(tmp_path / "packed.h5", "w") as file,
        pytest.raises(TypeError, match=r"key ''|names has type"),
    ):
        write_packed(file, tree)


def test_a_segment_of_an_older_version_is_refused_by_name(tmp_path: Path) -> None:
    """Its groups, as they were before: without it a KeyError would tell the user of damage."""
    path = tmp_path / "segment-0000.h5"

    def fill(file: Any) -> None:
        write_tree(file.create_group("replicas"), {"0000": {"frames": {"step": np.arange(3)}}})
        write_tree(file.create_group("checkpoint"), {"0000": {"step": 3}})

    write_file(path, "segment", fill)
    for read in (read_segment, steps_in_segment):
        with pytest.raises(
            UserError, match=r"segment-0000.h5 was written by an older hpcft.*end that run with"
        ):
            read(path)

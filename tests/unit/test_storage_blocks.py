"""Structures that are written block by block read back as those that are written at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.storage.structures import StructureFile, read_structures, write_structures_in_blocks


def labelled(number: int) -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((1, 1, 1 + number % 3))
    atoms.rattle(0.1, seed=number)
    atoms.info = {"REF_energy": float(number), "key": f"key {number}", "REF_stress": np.full(6, number)}
    atoms.set_array("REF_forces", atoms.positions * number)
    return atoms


@pytest.mark.parametrize("size", [1, 4, 7, 20])
def test_blocks_of_any_size_give_all_structures_in_their_order(tmp_path: Path, size: int) -> None:
    structures = [labelled(number) for number in range(11)]
    blocks = (structures[first : first + size] for first in range(0, 11, size))
    write_structures_in_blocks(tmp_path / "s.h5", blocks, 11, {"campaign": "here"})
    found = read_structures(tmp_path / "s.h5")
    assert len(found) == len(StructureFile(tmp_path / "s.h5")) == 11
    for atoms, wanted in zip(found, structures, strict=True):
        assert atoms == wanted
        assert atoms.info["key"] == wanted.info["key"]
        np.testing.assert_array_equal(atoms.info["REF_stress"], wanted.info["REF_stress"])
        np.testing.assert_array_equal(atoms.arrays["REF_forces"], wanted.arrays["REF_forces"])
    assert read_structures(tmp_path / "s.h5", [9])[0] == structures[9]


def test_a_block_with_other_keys_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    other = labelled(1)
    del other.info["REF_stress"]
    with pytest.raises(UserError, match="REF_stress"):
        write_structures_in_blocks(tmp_path / "s.h5", [[labelled(0)], [other]], 2)
    assert list(tmp_path.iterdir()) == []

"""Fault 34: NaN or infinity anywhere in a result makes it a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Item
from hpcft.labelling.journal import read_journals
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import finish_shard, read_shard
from hpcft.labelling.worker import label_items

REFERENCE = Reference("ase.calculators.emt.EMT")


@pytest.fixture
def overlapping(metals: Callable[..., list[Atoms]]) -> Atoms:
    atoms = metals("Cu")[0]
    atoms.positions[1] = atoms.positions[0]
    return atoms


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_emt_still_gives_a_finite_energy_for_overlapping_atoms(overlapping: Atoms) -> None:
    overlapping.calc = EMT()
    assert np.isfinite(overlapping.get_potential_energy())
    assert not np.isfinite(overlapping.get_forces()).all()


@pytest.mark.parametrize("kind", ["single-point", "relaxation"])
def test_a_finite_energy_with_nan_forces_is_failed_and_never_done(
    tmp_path: Path, overlapping: Atoms, metals: Callable[..., list[Atoms]], kind: str
) -> None:
    structures = [*metals("Cu", "Ni"), overlapping]
    if kind == "single-point":
        items = [Item.single_point(atoms) for atoms in structures]
    else:
        items = [Item.relaxation(atoms, fmax=0.01, max_steps=50) for atoms in structures]
    summary = label_items(items, REFERENCE, tmp_path)
    assert (summary.num_done, summary.causes) == (2, {"non-finite": 1})
    result = read_journals(tmp_path)[2].result
    assert isinstance(result, Failure)
    assert "forces" in result.message
    finish_shard(tmp_path)
    assert [record.index for record in read_shard(tmp_path)] == [0, 1]


def test_a_structure_with_nan_positions_costs_only_itself(
    tmp_path: Path, metals: Callable[..., list[Atoms]]
) -> None:
    good, bad = metals("Cu", "Cu")
    bad.positions[0, 0] = np.nan
    summary = label_items([Item.single_point(bad), Item.single_point(good)], REFERENCE, tmp_path)
    assert (summary.num_done, summary.causes) == (1, {"geometry": 1})

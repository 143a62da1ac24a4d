"""The key of an item: one for the same work, another for anything that changes the result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import UserError
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.reference import Reference

EMT = Reference("ase.calculators.emt.EMT")


def copper() -> Atoms:
    return bulk("Cu", cubic=True)


def key(atoms: Atoms) -> str:
    return item_key(Item.single_point(atoms), EMT)


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    atoms = Atoms("CuAu", positions=[[0, 0, 0], [0.1, 0.25, 2.5]], cell=[5, 6, 7], pbc=True)
    assert key(atoms) == "56fceaeb375284eb02e7ca725641164ad96d1041dec02d9981e5b325079c91f6"


def change_position(atoms: Atoms) -> None:
    atoms.positions[0, 0] = np.nextafter(atoms.positions[0, 0], 1)


def change_element(atoms: Atoms) -> None:
    atoms.numbers[0] = 79


def change_cell(atoms: Atoms) -> None:
    atoms.cell[2, 2] = np.nextafter(atoms.cell[2, 2], 9)


def change_periodicity(atoms: Atoms) -> None:
    atoms.pbc = (True, True, False)


def change_magnetic_moments(atoms: Atoms) -> None:
    atoms.set_initial_magnetic_moments([1, 0, 0, 0])


def change_charges(atoms: Atoms) -> None:
    atoms.set_initial_charges([1, 0, 0, 0])


def change_order(atoms: Atoms) -> None:
    atoms.positions = atoms.positions[::-1]


@pytest.mark.parametrize(
    "change",
    [
        change_position,
        change_element,
        change_cell,
        change_periodicity,
        change_magnetic_moments,
        change_charges,
        change_order,
    ],
)
def test_whatever_changes_the_result_changes_the_key(change: Callable[[Atoms], None]) -> None:
    atoms = copper()
    change(atoms)
    assert key(atoms) != key(copper())


def test_whatever_cannot_change_the_result_leaves_the_key() -> None:
    atoms = copper()
    atoms.positions *= -1.0
    atoms.positions *= -1.0  # leaves zeros with a sign
    atoms.info["frame"] = 3
    atoms.set_tags([1, 2, 3, 4])
    atoms.set_momenta(np.ones((4, 3)))
    atoms.set_initial_magnetic_moments(np.zeros(4))
    atoms.set_constraint(FixAtoms([0]))
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    assert key(atoms) == key(copper())


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6, unique=True))
def test_structures_with_other_positions_have_other_keys(values: list[float]) -> None:
    atoms = Atoms("Cu2", positions=np.reshape(values, (2, 3)))
    other = Atoms("Cu2", positions=np.reshape(values, (2, 3))[::-1])
    assert key(atoms) == key(atoms.copy())
    assert key(atoms) != key(other)


def test_the_kind_of_work_and_its_settings_are_in_the_key() -> None:
    items = [
        Item.single_point(copper()),
        Item.relaxation(copper(), fmax=0.01, max_steps=100),
        Item.relaxation(copper(), fmax=0.02, max_steps=100),
        Item.relaxation(copper(), fmax=0.01, max_steps=101),
    ]
    items.append(Item.relaxation(copper(), fmax=0.01, max_steps=100, with_cell=True))
    assert len({item_key(item, EMT) for item in items}) == 5
    assert item_key(items[0], Reference("ase.calculators.emt.EMT", {"asap_cutoff": True})) != key(copper())


def test_an_item_keeps_its_structure_when_the_callers_changes() -> None:
    atoms = copper()
    item = Item.single_point(atoms)
    before = item_key(item, EMT)
    atoms.positions += 1.0
    assert item_key(item, EMT) == before


@pytest.mark.parametrize(
    ("fmax", "max_steps"), [(0.0, 10), (float("nan"), 10), (None, 10), (0.1, 0), (0.1, None)]
)
def test_a_relaxation_without_possible_end_is_refused(fmax: float | None, max_steps: int | None) -> None:
    with pytest.raises(UserError):
        Item("relaxation", copper(), fmax, max_steps)


def test_the_cell_of_a_structure_that_is_not_periodic_cannot_relax() -> None:
    slab = copper()
    slab.pbc = [True, True, False]
    with pytest.raises(UserError, match="relax it at fixed cell"):
        Item.relaxation(slab, fmax=0.1, max_steps=10, with_cell=True)
    with pytest.raises(UserError, match="single-point"):
        Item("single-point", copper(), with_cell=True)


def test_a_single_point_with_settings_of_a_relaxation_is_refused() -> None:
    with pytest.raises(UserError):
        Item("single-point", copper(), 0.1, 10)


def test_a_constrained_relaxation_is_refused_because_every_atom_would_move() -> None:
    atoms = copper()
    atoms.set_constraint(FixAtoms([0]))
    with pytest.raises(UserError, match="constraints"):
        Item.relaxation(atoms, fmax=0.1, max_steps=10)

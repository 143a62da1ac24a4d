"""Which pairs of start and end are training targets, and what is said of those that are not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.relaxation import RelaxationPair, check_pair


def start() -> Atoms:
    """Eight atoms, 7.2 by 3.6 by 3.6 Å, off their sites."""
    atoms = bulk("Cu", a=3.6, cubic=True).repeat((2, 1, 1))
    atoms.numbers[::2] = 13
    atoms.rattle(0.05, seed=1)
    return atoms


def end() -> Atoms:
    atoms = start()
    atoms.rattle(0.1, seed=2)
    return atoms


def refusal(first: Atoms, last: Atoms, *, with_cell: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        check_pair(RelaxationPair(first, last), "pair 7 of a.h5", with_cell=with_cell)
    message = str(caught.value)
    assert message.startswith("pair 7 of a.h5")
    return message


def test_a_relaxation_of_the_same_atoms_in_the_same_cell_is_a_target() -> None:
    check_pair(RelaxationPair(start(), end()), "pair")
    check_pair(RelaxationPair(start(), end()), "pair", with_cell=True)


def test_another_number_of_atoms_is_refused() -> None:
    message = refusal(start(), end()[:-1])
    assert "starts with 8 atoms and ends with 7; a target needs the same atoms" in message


def test_another_order_of_the_elements_is_refused_with_the_first_atom_that_differs() -> None:
    last = end()[[0, 1, 3, 2, 4, 5, 6, 7]]
    assert "starts with Al as atom 2 and ends with Cu" in refusal(start(), last)
    assert "same elements in the same order" in refusal(start(), last)


def test_another_element_is_refused() -> None:
    last = end()
    last.numbers[5] = 29 + 18
    assert "starts with Cu as atom 5 and ends with Ag" in refusal(start(), last)


def test_other_periodic_directions_are_refused() -> None:
    last = end()
    last.pbc = [True, True, False]
    message = refusal(start(), last)
    assert "starts with pbc [True, True, True] and ends with [True, True, False]" in message


def test_another_cell_is_refused_unless_the_cell_relaxes_too() -> None:
    last = end()
    last.set_cell(last.cell.array * 1.01, scale_atoms=True)
    assert "ends in another cell than it starts in" in refusal(start(), last)
    check_pair(RelaxationPair(start(), last), "pair", with_cell=True)


@pytest.mark.parametrize("which", ["start", "end"])
@pytest.mark.parametrize("what", ["positions", "cell"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(which: str, what: str, bad: float) -> None:
    first, last = start(), end()
    spoilt = first if which == "start" else last
    if what == "positions":
        spoilt.positions[3, 1] = bad
    else:
        spoilt.cell.array[0, 0] = bad
    message = refusal(first, last, with_cell=what == "cell")
    assert f"its {which} holds positions or cell vectors that are no numbers" in message


def test_an_atom_that_moves_by_half_of_the_cell_or_more_is_refused_with_its_number_and_its_way() -> None:
    last = start()
    last.positions[6] += [0.0, 0.0, 0.6 * 3.6]
    message = refusal(start(), last)
    found = re.search(r"atom 6 moves by (\S+) Å, half of the cell's width of 3.60 Å or more", message)
    assert found
    share = (
        last.get_masses()[6] / last.get_masses().sum()
    )  # the others go the other way, for the nearest image
    assert float(found[1]) == pytest.approx(0.6 * 3.6 + 0.4 * 3.6 * share, abs=0.01)


def test_atoms_that_were_wrapped_back_into_the_cell_are_welcome() -> None:
    last = end()
    last.wrap()
    assert np.abs(last.positions - start().positions).max() > 3.0
    check_pair(RelaxationPair(start(), last), "pair")


def test_a_drift_of_all_atoms_together_is_no_movement_in_a_crystal() -> None:
    last = end()
    last.positions += [1.7, 0.0, 0.0]
    check_pair(RelaxationPair(start(), last), "pair")


def test_in_a_slab_only_the_periodic_directions_have_a_width() -> None:
    first = start()
    first.pbc = [True, True, False]
    last = first.copy()
    last.positions[:, 2] += 1.7
    check_pair(RelaxationPair(first, last), "pair")
    last.positions[6, 1] += 1.9
    assert "atom 6 moves by 2.5" in refusal(first, last)


def test_in_the_open_an_atom_may_move_as_far_as_it_likes() -> None:
    first, last = Atoms("CuAl", [[0, 0, 0], [0, 0, 2]]), Atoms("CuAl", [[0, 0, 0], [9, 9, 9]])
    check_pair(RelaxationPair(first, last), "pair")


def test_with_the_cell_what_counts_is_the_way_within_it() -> None:
    """A cell that doubles carries its atoms along."""
    last = start()
    last.set_cell(2 * last.cell.array, scale_atoms=True)
    check_pair(RelaxationPair(start(), last), "pair", with_cell=True)
    last.positions[6] += [0.0, 0.0, 0.55 * 7.2]
    assert "atom 6 moves" in refusal(start(), last, with_cell=True)

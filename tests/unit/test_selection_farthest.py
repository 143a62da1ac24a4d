"""Farthest-point selection: what is chosen, from what, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpcft.selection import farthest_points
from hpcft.selection.farthest import standardise

Rows = np.ndarray


def rows(least: int = 0, most: int = 12, columns: int = 3) -> st.SearchStrategy[Rows]:
    """Descriptors on a coarse grid, so that ties and equal rows do happen."""
    return st.integers(least, most).flatmap(
        lambda count: arrays(float, (count, columns), elements=st.integers(-4, 4).map(float))
    )


def distances_to(candidates: Rows, others: Rows) -> Rows:
    return np.asarray(np.linalg.norm(candidates[:, None] - others[None], axis=2).min(axis=1))


@given(candidates=rows(), known=rows(), count=st.integers(0, 14))
def test_each_choice_is_the_first_of_those_farthest_from_all_chosen_and_known(
    candidates: Rows, known: Rows, count: int
) -> None:
    chosen = farthest_points(candidates, count, known)
    assert len(chosen) == len(set(chosen)) <= min(count, len(candidates))
    for number, index in enumerate(chosen):
        taken = np.concatenate([known, candidates[chosen[:number]]])
        if len(taken) == 0:
            distance = np.linalg.norm(candidates - candidates.mean(axis=0), axis=1)
        else:
            distance = distances_to(candidates, taken)
            assert distance[index] > 0
        assert index == int(np.argmax(distance))


@given(candidates=rows(least=1), known=rows(), count=st.integers(1, 14))
def test_fewer_come_back_only_when_all_others_repeat_what_is_taken(
    candidates: Rows, known: Rows, count: int
) -> None:
    chosen = farthest_points(candidates, count, known)
    if len(chosen) < count:
        taken = np.concatenate([known, candidates[chosen]])
        assert (distances_to(candidates, taken) == 0).all()


@given(candidates=rows(), known=rows(), count=st.integers(0, 14), more=st.integers(0, 5))
def test_asking_for_more_goes_on_from_the_same_choices(
    candidates: Rows, known: Rows, count: int, more: int
) -> None:
    few, many = farthest_points(candidates, count, known), farthest_points(candidates, count + more, known)
    assert many[: len(few)] == few


@given(candidates=rows(least=1, most=8), known=rows(least=1), count=st.integers(1, 5))
def test_no_candidate_is_left_farther_away_than_the_last_that_was_chosen(
    candidates: Rows, known: Rows, count: int
) -> None:
    chosen = farthest_points(candidates, count, known)
    if chosen:
        before = np.concatenate([known, candidates[chosen[:-1]]])
        last = distances_to(candidates[chosen[-1:]], before)[0]
        after = np.concatenate([known, candidates[chosen]])
        assert distances_to(candidates, after).max() <= last


@pytest.mark.parametrize("known", [None, np.zeros((0, 2))])
def test_without_known_rows_the_first_choice_is_the_farthest_from_the_mean(known: Rows | None) -> None:
    candidates = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    assert farthest_points(candidates, 2, known) == [3, 0]


def test_no_choice_is_made_where_none_is_asked_for_or_possible() -> None:
    assert farthest_points(np.array([[1.0], [2.0]]), 0) == []
    assert farthest_points(np.zeros((0, 3)), 5) == []
    assert farthest_points(np.array([[1.0], [1.0]]), 5, np.array([[1.0]])) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_descriptor_that_is_not_finite_is_refused_by_its_row(bad: float) -> None:
    rows = np.array([[0.0, 1.0], [2.0, bad], [3.0, 4.0]])
    with pytest.raises(ValueError, match="candidate 1 has a non-finite descriptor"):
        farthest_points(rows, 2)
    with pytest.raises(ValueError, match="known row 1 has a non-finite descriptor"):
        farthest_points(np.zeros((2, 2)), 2, rows)


def test_columns_are_scaled_by_the_spread_of_the_reference_and_dead_ones_dropped() -> None:
    reference = np.array([[0.0, 10.0, 7.0], [2.0, 30.0, 7.0]])
    scaled = standardise(np.array([[1.0, 20.0, 9.0], [3.0, 40.0, 7.0]]), reference)
    np.testing.assert_allclose(scaled, [[0.0, 0.0, 0.0], [2.0, 2.0, 0.0]])


@given(reference=rows(least=2), scale=st.sampled_from([1e-3, 7.0, 1e4]))
def test_units_of_a_column_do_not_change_the_choice(reference: Rows, scale: float) -> None:
    other = reference * [scale, 1.0, 1.0]
    a, b = standardise(reference, reference), standardise(other, other)
    np.testing.assert_allclose(a, b, atol=1e-9)

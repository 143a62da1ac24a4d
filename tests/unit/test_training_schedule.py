"""Values that change in the course of a training."""

from __future__ import annotations

import pytest

from hpcft.training.schedule import Schedule, scheduled, value_at


def test_a_schedule_is_linear_between_its_points_and_constant_outside() -> None:
    ramp = scheduled([[2, 10.0], [4, 30.0], [5, 0.0]])
    found = [value_at(ramp, epoch) for epoch in (0, 2, 3, 4, 4.5, 5, 99)]
    assert found == pytest.approx([10, 10, 20, 30, 15, 0, 0])


def test_a_number_is_itself_at_any_time() -> None:
    assert value_at(scheduled(3), 0) == value_at(3.0, 1e6) == 3.0


@pytest.mark.parametrize("points", [(), ((1.0, 0.0), (1.0, 2.0)), ((2.0, 0.0), (1.0, 2.0))])
def test_epochs_that_do_not_increase_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="increasing epochs"):
        Schedule(points)

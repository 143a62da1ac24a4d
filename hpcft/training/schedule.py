"""Values that change in the course of a training: weights of a loss, steps of an unroll."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """Points (epoch, value): linear between them, constant before the first and after the last.

    Raises ValueError unless there is a point and the epochs increase.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.points]
        if not epochs or any(b <= a for a, b in pairwise(epochs)):
            raise ValueError(f"a schedule needs points with increasing epochs; it has {list(self.points)}")

    def at(self, epoch: float) -> float:
        """The value at this time; epochs count from 0, and 1.5 is half way through the second."""
        epochs, values = zip(*self.points, strict=True)
        return float(np.interp(epoch, epochs, values))


Scheduled = float | Schedule


def value_at(scheduled: Scheduled, epoch: float) -> float:
    """Of a schedule, or of a number that never changes."""
    return scheduled.at(epoch) if isinstance(scheduled, Schedule) else float(scheduled)


def scheduled(value: float | Sequence[Sequence[float]]) -> Scheduled:
    """A number as it is; a list of [epoch, value] as a schedule."""
    if isinstance(value, int | float):
        return float(value)
    return Schedule(tuple((float(epoch), float(at)) for epoch, at in value))

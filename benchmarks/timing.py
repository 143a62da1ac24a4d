"""Clocks, and processes that start afresh, for benchmarks that compare programs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

Found = dict[str, Any]


class Mark(NamedTuple):
    """Seconds by the clock, and of a process's processor time."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Mark:
        return Mark(time.perf_counter(), time.process_time())

    def since(self, earlier: Mark) -> Mark:
        return Mark(self.wall - earlier.wall, self.cpu - earlier.cpu)


def between(marks: Sequence[Mark]) -> list[Mark]:
    """How long it is from each mark to the next."""
    return [after.since(before) for before, after in pairwise(marks)]


def typical(durations: Iterable[Mark]) -> Mark:
    """Medians."""
    return Mark(*map(statistics.median, zip(*durations, strict=True)))


def spanned(name: str, values: Sequence[float]) -> Found:
    """Median and range, as they go to the file."""
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}


R = TypeVar("R")


def in_processes(function: Callable[..., R], *calls: tuple[Any, ...]) -> list[R]:
    """`function` of each tuple of arguments, at the same time, each in a process of its own.

    So the memory that they need is not this process's, whose own is the least that a program that it starts can show.
    """
    with ProcessPoolExecutor(len(calls), mp_context=get_context("fork")) as pool:
        return [future.result() for future in [pool.submit(function, *call) for call in calls]]

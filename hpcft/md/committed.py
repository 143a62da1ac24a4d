"""A run in segments that are committed one by one, written while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import UserError
from hpcft.md.simulation import Simulation
from hpcft.storage.trajectory import (
    list_segments,
    read_segment,
    segment_path,
    set_aside_uncommitted,
    write_segment,
)


class SegmentTaken(Exception):
    """Another process has committed the segment that this one has just run."""


@dataclass(frozen=True)
class Stretch:
    """How long replicas run (steps), and how often frames are kept and committed."""

    steps: int
    frame_every: int
    segment_frames: int

    def __post_init__(self) -> None:
        if self.steps < self.frame_every:
            raise UserError(
                f"no frame would be kept: one is every {self.frame_every} steps, and there are {self.steps}; keep frames more "
                "often, or run longer"
            )

    @property
    def steps_per_segment(self) -> int:
        return self.frame_every * self.segment_frames

    @property
    def num_segments(self) -> int:
        return -(-self.steps // self.steps_per_segment)


def run_segments(
    folder: Path,
    simulation: Simulation,
    stretch: Stretch,
    on_segment: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Run what `folder` does not hold yet; returns all segments. `on_segment` is told how many of how many are done.

    A segment that is there is never run again: the replicas go on from its checkpoint, to the same bits as without a stop (on
    the CPU). Raises SegmentTaken, and OSError on a full disk: then all that was committed stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    set_aside_uncommitted(folder)
    segments = list_segments(folder)
    if segments:
        _, checkpoint = read_segment(segments[-1], frames=False)
        for replica in simulation.replicas:
            replica.restore(checkpoint[f"{replica.index:04d}"])
    with ThreadPoolExecutor(1, thread_name_prefix="segments") as thread:
        pending: Future[bool] | None = None
        for number in range(len(segments), stretch.num_segments):
            done = number * stretch.steps_per_segment
            blocks = simulation.run(min(stretch.steps_per_segment, stretch.steps - done), stretch.frame_every)
            # A copy, as the replicas move on while it is written.
            checkpoint = {f"{replica.index:04d}": replica.state() for replica in simulation.replicas}
            _finish(pending, folder, number - 1)
            pending = thread.submit(write_segment, segment_path(folder, number), blocks, checkpoint)
            if on_segment is not None:
                on_segment(number + 1, stretch.num_segments)
        _finish(pending, folder, stretch.num_segments - 1)
    return list_segments(folder)


def _finish(pending: Future[bool] | None, folder: Path, number: int) -> None:
    if pending is not None and not pending.result():
        raise SegmentTaken(f"segment {number} of {folder} was published by another process")

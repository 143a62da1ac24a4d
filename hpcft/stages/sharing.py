"""Light helpers that planning needs: no torch here."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms

from hpcft.stages.context import StageContext
from hpcft.storage.structures import read_structures
from hpcft.storage.trajectory import Trajectory


def share_out(count: int, tasks: int) -> list[dict[str, Any]]:
    """Payloads that spread `count` replicas over at most `tasks` tasks, evenly and in order."""
    parts = np.array_split(np.arange(count), min(tasks, count))
    return [{"replicas": [int(i) for i in part]} for part in parts]


def last_states(context: StageContext) -> dict[int, dict[str, Any]]:
    """Where explore of the round before left each replica, by its index."""
    states: dict[int, dict[str, Any]] = {}
    for task in context.tasks_of("explore", context.round - 1):
        with Trajectory(task.path / "trajectory.h5") as trajectory:
            states |= {int(name): dict(state) for name, state in trajectory.checkpoint().items()}
    return states


def probe_frames(context: StageContext) -> list[Atoms]:
    """The frames that this round's probe has set aside for the reference, numbered as everywhere."""
    frames: list[Atoms] = []
    for task in context.tasks_of("probe"):
        frames += read_structures(task.path / "frames.h5")
    return frames

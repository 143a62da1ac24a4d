"""What a replica leaves behind while its segment runs: frames, and a way back to where its batch began."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcft.md.replica import Replica
from hpcft.storage.frames import FrameBlock

_FIXED = {"step", "time_fs", "positions", "velocities", "forces", "cell", "energy", "temperature"}


@dataclass
class Recorder:
    """Frames of one replica while a segment runs."""

    rows: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value)

    def has(self, step: int) -> bool:
        return bool(self.rows.get("step", [None])[-1] == step)

    def block(self, replica: Replica) -> FrameBlock:
        count = len(self.rows.get("step", []))
        n = len(replica.atoms)
        vector, box = (count, n, 3), (count, 3, 3)

        def column(name: str, shape: tuple[int, ...], dtype: type | None = float) -> np.ndarray:
            return np.asarray(self.rows.get(name, []), dtype=dtype).reshape(shape)

        return FrameBlock(
            replica=replica.index,
            numbers=replica.atoms.numbers.copy(),
            masses=replica.atoms.get_masses(),
            pbc=np.asarray(replica.atoms.pbc),
            step=column("step", (count,), int),
            time_fs=column("time_fs", (count,)),
            positions=column("positions", vector, None),
            velocities=column("velocities", vector, None),
            forces=column("forces", vector, None),
            cell=column("cell", box),
            potential_energy=column("energy", (count,)),
            temperature_K=column("temperature", (count,)),
            observables={name: np.asarray(v) for name, v in self.rows.items() if name not in _FIXED},
        )


class Begun:
    """Where a replica and its frames stood when its batch began: positions are only written back at the end of one."""

    def __init__(self, replica: Replica, recorder: Recorder) -> None:
        self._replica, self._recorder = replica, recorder
        self._counters = {name: getattr(replica, name) for name in ("step", "time_fs", "stopped", "volume")}
        self._random = replica.random.bit_generator.state
        self._rows = {name: list(values) for name, values in recorder.rows.items()}

    def go_back(self) -> None:
        for name, value in self._counters.items():
            setattr(self._replica, name, value)
        self._replica.random.bit_generator.state = self._random
        self._recorder.rows = self._rows

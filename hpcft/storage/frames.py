"""One replica's stretch of molecular dynamics in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hpcft.storage.tree import Array

STATIC = ("numbers", "masses", "pbc")
PER_FRAME = (
    "step",
    "time_fs",
    "positions",
    "velocities",
    "forces",
    "cell",
    "potential_energy",
    "temperature_K",
)
_TAKEN = {*STATIC, *PER_FRAME, "temperature"}


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameBlock:
    """Frames of one replica of n atoms in rising order of `step`.

    Shapes are checked here (ValueError) and types are kept, so float32 dynamics stay float32 on disk.
    """

    replica: int
    """Index in the whole campaign."""
    numbers: Array
    """[n] atomic numbers"""
    masses: Array
    """[n] amu"""
    pbc: Array
    """[3] bool"""
    step: Array
    """[f] integer"""
    time_fs: Array
    """[f]"""
    positions: Array
    """[f,n,3] Å, unwrapped"""
    velocities: Array
    """[f,n,3] Å/fs; NaN in a frame without them, which takes no space in a file"""
    forces: Array
    """[f,n,3] eV/Å; the same"""
    cell: Array
    """[f,3,3] Å, rows are lattice vectors"""
    potential_energy: Array
    """[f] eV"""
    temperature_K: Array
    """[f]"""
    observables: dict[str, Array] = field(default_factory=dict)
    """[f,...] by name, such as a descriptor; the flag `sane` marks frames from before an explosion"""

    def __post_init__(self) -> None:
        f, n = len(self.step), len(self.numbers)
        shapes = {"masses": (n,), "pbc": (3,), "step": (f,), "cell": (f, 3, 3)}
        shapes |= dict.fromkeys(("positions", "velocities", "forces"), (f, n, 3))
        shapes |= dict.fromkeys(("time_fs", "potential_energy", "temperature_K"), (f,))
        for name, shape in shapes.items():
            self._check(np.shape(getattr(self, name)) == shape, name, f"must have shape {shape}")
        self._check(self.step.dtype.kind in "iu", "step", "must be integers")
        self._check(bool((np.diff(self.step) > 0).all()), "step", "must rise from frame to frame")
        for name, values in self.observables.items():
            self._check(
                name not in _TAKEN, name, "is a field of its own, so no observable may have that name"
            )
            self._check(values.shape[:1] == (f,), name, f"must have {f} frames")
            self._check(values.dtype.kind in "biufc", name, "must hold numbers or booleans")

    def _check(self, holds: bool, name: str, expectation: str) -> None:
        if not holds:
            values = np.asarray(self.observables.get(name, getattr(self, name, None)))
            raise ValueError(
                f"frames of replica {self.replica}: {name} {expectation}, "
                f"but it has shape {values.shape} and type {values.dtype}"
            )

    @property
    def num_frames(self) -> int:
        return len(self.step)

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

    def static(self) -> dict[str, Array]:
        """What all frames share, by name."""
        return {name: getattr(self, name) for name in STATIC}

    def per_frame(self) -> dict[str, Array]:
        """What changes from frame to frame, by name, without the observables."""
        return {name: getattr(self, name) for name in PER_FRAME}

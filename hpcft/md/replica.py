"""A replica: all that it needs to go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units


@dataclass
class Replica:
    """What a checkpoint holds. Velocities in Å/fs; `volume` (Å^3) is that at the start, 0 before the first step."""

    index: int
    atoms: Atoms
    velocities: np.ndarray
    random: np.random.Generator
    step: int = 0
    time_fs: float = 0.0
    stopped: str = ""
    volume: float = 0.0

    def state(self) -> dict[str, Any]:
        return {
            "positions": self.atoms.get_positions(),
            "velocities": self.velocities,
            "cell": np.array(self.atoms.cell.array),  # a copy: ASE changes it in place
            "random": json.dumps(self.random.bit_generator.state),
            "step": self.step,
            "time_fs": self.time_fs,
            "stopped": self.stopped,
            "volume": self.volume,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.atoms.set_cell(np.asarray(state["cell"]))
        self.atoms.set_positions(np.asarray(state["positions"]), apply_constraint=False)
        self.velocities = np.array(state["velocities"])
        self.random.bit_generator.state = json.loads(str(state["random"]))
        self.step, self.time_fs = int(state["step"]), float(state["time_fs"])
        self.stopped, self.volume = str(state["stopped"]), float(state.get("volume", 0.0))


def thermal_velocities(atoms: Atoms, temperature_K: float, random: np.random.Generator) -> np.ndarray:
    """Maxwell-Boltzmann velocities in Å/fs with the centre of mass at rest, [n, 3]; fixed atoms (FixAtoms) stand still."""
    masses = atoms.get_masses()[:, None]
    velocities = random.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature_K / masses)
    fixed = fixed_indices(atoms)
    if len(fixed):
        velocities[fixed] = 0.0
    else:
        velocities -= (masses * velocities).sum(0) / masses.sum()
    return np.asarray(velocities * units.fs)


def fixed_indices(atoms: Atoms) -> np.ndarray:
    """Of the atoms that ASE's FixAtoms holds, sorted."""
    found = [constraint.index for constraint in atoms.constraints if type(constraint).__name__ == "FixAtoms"]
    return np.unique(np.concatenate(found)).astype(int) if found else np.zeros(0, dtype=int)


def disturbed(
    atoms: Atoms, random: np.random.Generator, *, rattle: float = 0.0, strain: float = 0.0
) -> Atoms:
    """A copy with its cell strained (each component of a symmetric strain normal with this deviation), then rattled (Å)."""
    found = atoms.copy()
    if strain:
        components = strain * random.standard_normal((3, 3))
        deformation = np.eye(3) + 0.5 * (components + components.T)
        found.set_cell(found.cell.array @ deformation, scale_atoms=True)
    if rattle:
        shift = rattle * random.standard_normal((len(atoms), 3))
        shift[fixed_indices(atoms)] = 0.0
        found.set_positions(found.get_positions() + shift, apply_constraint=False)
    return found

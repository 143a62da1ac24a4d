"""What a replica is told: ensemble, time step, temperature and pressure (constant or as a ramp), and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Thermostat = Literal["none", "langevin", "svr"]
Barostat = Literal["none", "isotropic", "full"]


@dataclass(frozen=True)
class Ramp:
    """Linear from `start` to `end` over `steps` steps of a replica, and `end` from then on."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        progress = min(1.0, step / max(1, self.steps))
        return self.start + progress * (self.end - self.start)

    @property
    def is_constant(self) -> bool:
        return self.start == self.end


@dataclass(frozen=True)
class Dynamics:
    """How a replica moves.

    Thermostats: `langevin` (BAOAB: Leimkuhler and Matthews, Appl. Math. Res. eXpress 2013, 34), with friction; `svr`, stochastic
    velocity rescaling (Bussi, Donadio and Parrinello, J. Chem. Phys. 126, 014101, 2007), which disturbs the dynamics least;
    none: NVE by velocity Verlet. Barostats: stochastic cell rescaling, of the volume (`isotropic`: Bernetti and Bussi, J. Chem.
    Phys. 153, 114107, 2020) or of the whole cell (`full`: Del Tatto et al., Appl. Sci. 12, 1139, 2022).
    """

    temperature_K: float | Ramp = 300.0
    timestep: float = 1.0
    """fs"""
    friction_per_ps: float = 10.0
    thermostat: Thermostat = "langevin"
    thermostat_fs: float = 100.0
    """Relaxation time of the kinetic energy under `svr`."""
    barostat: Barostat = "none"
    pressure_GPa: float | Ramp = 0.0
    barostat_fs: float = 1000.0
    """Relaxation time of the volume."""
    compressibility_per_GPa: float = 0.01
    """Of the order of the material's: it scales `barostat_fs` and does not change what is sampled."""
    fix_centre_of_mass: bool = False
    """Take the drift of the whole away from Langevin's random forces (the others do not change it)."""

    def temperature_at(self, step: int) -> float:
        return _at(self.temperature_K, step)

    def pressure_at(self, step: int) -> float:
        return _at(self.pressure_GPa, step)


def _at(value: float | Ramp, step: int) -> float:
    return value.at(step) if isinstance(value, Ramp) else value


# Thermostat and barostat by the name of an ensemble.
ENSEMBLES: dict[str, tuple[Thermostat, Barostat]] = {
    "nve": ("none", "none"),
    "nvt": ("langevin", "none"),
    "nvt-svr": ("svr", "none"),
    "npt": ("svr", "isotropic"),
    "npt-full": ("svr", "full"),
}


@dataclass(frozen=True)
class Guards:
    """When a replica counts as exploded, collapsed or beyond what the model knows, and stops with that cause."""

    max_temperature_K: float = float("inf")
    min_distance: float = 0.0
    """Å"""
    max_force: float = 1e3
    """eV/Å"""
    max_volume_change: float = 8.0
    """Factor between the volume now and at the start of the replica, up or down."""
    max_observed: Mapping[str, float] = field(default_factory=dict)
    """Largest value of what is observed on a frame, by name: a committee's spread, a Q-residual."""

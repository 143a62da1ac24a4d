"""Stochastic cell rescaling: the isothermal-isobaric ensemble, of the volume alone or of the whole cell."""

from __future__ import annotations

import numpy as np
from ase import units
from scipy.linalg import sqrtm

from hpcft.md.settings import Dynamics


def deformation(
    dynamics: Dynamics,
    step: int,
    cell: np.ndarray,
    kinetic: np.ndarray,
    stress: np.ndarray,
    timestep: float,
    random: np.random.Generator,
) -> np.ndarray:
    """Symmetric deformation F of one time step, [3, 3]: cell and positions become x @ F, velocities v @ F^-1.

    `kinetic` is the sum of m v v (eV), `stress` that of the potential (eV/Å^3, positive under tension), `timestep` in ASE's unit.
    Isotropic: Bernetti and Bussi, J. Chem. Phys. 153, 114107 (2020), eq. 6 for ln V. Full: Del Tatto, Raiteri, Bernetti and
    Bussi, Appl. Sci. 12, 1139 (2022), eq. 12; the rotation that it contains is taken out, which changes no distance.
    """
    if dynamics.barostat == "none":
        return np.eye(3)
    volume = float(abs(np.linalg.det(cell)))
    pressure = dynamics.pressure_at(step) * units.GPa
    thermal = units.kB * dynamics.temperature_at(step)
    inner = kinetic / volume - stress
    # beta / tau_p times the time step, in Å^3/eV
    rate = dynamics.compressibility_per_GPa / units.GPa * timestep / (dynamics.barostat_fs * units.fs)
    if dynamics.barostat == "isotropic":
        noise = np.sqrt(2.0 * thermal * rate / volume) * random.standard_normal()
        growth = -rate * (pressure - np.trace(inner) / 3.0) + noise
        return np.asarray(np.exp(growth / 3.0) * np.eye(3))
    drift = -rate / 3.0 * ((pressure - thermal / volume) * np.eye(3) - inner)
    noise_33 = np.sqrt(2.0 * thermal * rate / (3.0 * volume)) * random.standard_normal((3, 3))
    gradient = np.eye(3) + drift + noise_33
    return np.asarray(np.real(sqrtm(gradient.T @ gradient)))

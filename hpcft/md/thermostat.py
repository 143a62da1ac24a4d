"""Stochastic velocity rescaling: the canonical distribution of the kinetic energy, and otherwise the dynamics as they are."""

from __future__ import annotations

import numpy as np


def rescaling_factor(
    kinetic: float, target: float, freedom: int, step: float, random: np.random.Generator
) -> float:
    """Factor of all velocities after a time of `step` relaxation times.

    `kinetic` and `target` (freedom k_B T / 2) are energies. Bussi, Donadio and Parrinello, J. Chem. Phys. 126, 014101 (2007),
    eq. A7; the sign (eq. A8) is that of a velocity that may turn round. Without any kinetic energy there is nothing to rescale.
    """
    normal = float(random.standard_normal())
    # A sum of freedom - 1 squared normal numbers.
    others = 2.0 * float(random.standard_gamma(0.5 * (freedom - 1))) if freedom > 1 else 0.0
    if not kinetic > 0:
        return 1.0
    kept, ratio = np.exp(-step), target / (freedom * kinetic)
    mixed = np.sqrt(kept) + normal * np.sqrt((1.0 - kept) * ratio)
    squared = mixed**2 + others * (1.0 - kept) * ratio
    sign = 1.0 if normal + np.sqrt(kept / max((1.0 - kept) * ratio, 1e-300)) >= 0 else -1.0
    return float(sign * np.sqrt(squared))

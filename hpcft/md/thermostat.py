"""Stochastic velocity rescaling: the canonical distribution of the kinetic energy, and otherwise the dynamics as they are.

Shape suffix: r replicas.
"""

from __future__ import annotations

import numpy as np


def random_part(freedom: int, random: np.random.Generator) -> tuple[float, float]:
    """What `rescaling_factors` needs of a replica's random numbers: a normal one, and a sum of freedom - 1 squared ones."""
    normal = float(random.standard_normal())
    others = 2.0 * float(random.standard_gamma(0.5 * (freedom - 1))) if freedom > 1 else 0.0
    return normal, others


def rescaling_factors(
    kinetic_r: np.ndarray,
    target_r: np.ndarray,
    freedom_r: np.ndarray,
    step_r: np.ndarray,
    normal_r: np.ndarray,
    others_r: np.ndarray,
) -> np.ndarray:
    """Factors of all velocities of each replica after a time of `step_r` relaxation times, [r].

    `kinetic_r` and `target_r` (freedom k_B T / 2) are energies; for the rest see `random_part`. Bussi, Donadio and Parrinello,
    J. Chem. Phys. 126, 014101 (2007), eq. A7; the sign (eq. A8) is that of a velocity that may turn round. Without any kinetic
    energy, or with one that is no number, there is nothing to rescale.
    """
    moves = kinetic_r > 0
    kept = np.exp(-step_r)
    ratio = target_r / (freedom_r * np.where(moves, kinetic_r, 1.0))
    mixed = np.sqrt(kept) + normal_r * np.sqrt((1.0 - kept) * ratio)
    squared = mixed**2 + others_r * (1.0 - kept) * ratio
    turns = normal_r + np.sqrt(kept / np.maximum((1.0 - kept) * ratio, 1e-300)) < 0
    return np.where(moves, np.where(turns, -1.0, 1.0) * np.sqrt(squared), 1.0)

"""How far energies are from a sum of energies per element, by a fit that a few wrong ones do not draw to themselves.

Shape suffixes: s structures, k elements.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MAD_TO_SIGMA = 1.4826
_MOST_FITS = 30
_FIT_ROUNDING = 1e-3  # eV/atom: below it a residual counts no more than this in the next fit
_CHUNK = 1 << 10


def energy_deviations(energies_s: Array, shares_of: Callable[[slice], Array], good_enough: float) -> Array:
    """Residuals [s] (eV/atom) of a fit of energies per element to energies per atom.

    `shares_of` some rows gives which share of each structure's atoms is of which element, [s, k]. Least absolute residuals
    by reweighted least squares; a data set whose residuals are all within `good_enough` (eV/atom) needs one fit.
    """
    weights_s = deviations_s = np.ones(len(energies_s))
    for _ in range(_MOST_FITS if len(energies_s) else 0):
        deviations_s = _residuals(energies_s, shares_of, weights_s)
        if np.abs(deviations_s).max() <= good_enough:
            break
        weights_s = 1.0 / np.maximum(np.abs(deviations_s), _FIT_ROUNDING)
    return deviations_s


def spread_of(deviations_s: Array) -> float:
    """Standard deviation by the median absolute deviation, which a few wrong ones do not change."""
    return _MAD_TO_SIGMA * float(np.median(np.abs(deviations_s - np.median(deviations_s))))


def _residuals(energies_s: Array, shares_of: Callable[[slice], Array], weights_s: Array) -> Array:
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(energies_s), _CHUNK)]
    normal_kk: Array | float = 0.0
    right_k: Array | float = 0.0
    for rows in chunks:
        shares_sk = shares_of(rows)
        weighted_ks = shares_sk.T * weights_s[rows]
        normal_kk = normal_kk + weighted_ks @ shares_sk
        right_k = right_k + weighted_ks @ energies_s[rows]
    # The smallest solution where the compositions leave it open, as in a file of one compound.
    per_element_k = np.linalg.lstsq(normal_kk, right_k, rcond=None)[0]
    fitted_s = np.concatenate([shares_of(rows) @ per_element_k for rows in chunks])
    residuals_s: Array = energies_s - fitted_s
    return residuals_s

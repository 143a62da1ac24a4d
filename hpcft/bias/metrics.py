"""Bias, not scatter: signed energy error, force slope (softening) and force error on a model's own MD.

Confidence intervals are percentile bootstraps over replicas, not over frames: frames of one replica are
correlated, and treating them as independent would make the intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval; NaN ends where one group cannot give an interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FramePair:
    """One frame under the model and under the reference. Energies in eV, forces [n, 3] in eV/Å.

    `group` is the replica: frames of one group are resampled together.
    """

    group: int
    predicted_energy: float
    reference_energy: float
    predicted_forces: np.ndarray
    reference_forces: np.ndarray

    @property
    def energy_error(self) -> float:
        """Signed error in meV/atom."""
        return 1e3 * (self.predicted_energy - self.reference_energy) / len(self.reference_forces)


def _group_sums(frames: Sequence[FramePair]) -> np.ndarray:
    """[groups, 6]: sums that the metrics are ratios of, so that a bootstrap sample costs a few additions."""
    rows = []
    for group in sorted({frame.group for frame in frames}):
        mine = [frame for frame in frames if frame.group == group]
        rows.append(
            [
                sum(f.energy_error for f in mine),
                len(mine),
                sum(float(np.abs(f.predicted_forces - f.reference_forces).sum()) for f in mine),
                sum(f.reference_forces.size for f in mine),
                sum(float((f.predicted_forces * f.reference_forces).sum()) for f in mine),
                sum(float((f.reference_forces**2).sum()) for f in mine),
            ]
        )
    return np.asarray(rows, dtype=float).reshape(-1, 6)


_RATIOS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # Softening (arXiv 2405.07105): the slope of predicted against reference forces through the origin.
    "energy_bias_meV_per_atom": lambda s: s[..., 0] / s[..., 1],
    "force_slope": lambda s: s[..., 4] / s[..., 5],
    "force_mae_meV_per_A": lambda s: 1e3 * s[..., 2] / s[..., 3],
}


def bias_metrics(
    frames: Sequence[FramePair], *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Signed mean energy error (meV/atom), force slope and force MAE (meV/Å), each with its interval.

    Raises ValueError when there are no frames: a bias that was not measured is not zero.
    """
    if not frames:
        raise ValueError("there are no labelled frames, so the bias is unknown")
    sums = _group_sums(frames)
    picks = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    resampled = sums[picks].sum(axis=1)
    return {
        name: _interval(float(ratio(sums.sum(axis=0))), ratio(resampled), len(sums), confidence)
        for name, ratio in _RATIOS.items()
    }


def interval_of_mean(
    values: Sequence[float], *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of independent values, such as Delta Q of one structure each, with its bootstrap interval."""
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("there are no values to average")
    picks = np.random.default_rng(seed).integers(0, data.size, (samples, data.size))
    return _interval(float(data.mean()), data[picks].mean(axis=1), data.size, confidence)


def _interval(value: float, resampled: np.ndarray, groups: int, confidence: float) -> Interval:
    if groups < 2:
        return Interval(value, float("nan"), float("nan"))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(resampled, [tail, 100.0 - tail])
    return Interval(value, float(low), float(high))

"""Parity plots: what a model predicts over what the reference says, and how its errors are distributed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from matplotlib.figure import Figure

from hpcft.report.drawing import PALETTE, QUIET, save, tidy


@dataclass(frozen=True, eq=False)
class Parity:
    """One quantity of one set of structures, by the reference and by the model: arrays of equal shape.

    In house units: energies per atom (eV/atom), forces (eV/Å), stress (eV/Å^3). NaN where one of them has no value.
    """

    reference: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class _Quantity:
    """`factor` leads from house units to those of the axes, `error_factor` from there to those of the errors.

    Energies have an arbitrary zero, so their slope is a line's with an intercept; that of the others goes through the origin,
    as in `hpcft.bias.metrics`.
    """

    label: str
    error_unit: str
    factor: float = 1.0
    error_factor: float = 1e3
    has_zero: bool = True


_QUANTITIES = {
    "energy": _Quantity("energy (eV/atom)", "meV/atom", has_zero=False),
    "forces": _Quantity("force (eV/Å)", "meV/Å"),
    "stress": _Quantity("stress (GPa)", "GPa", 1 / units.GPa, 1.0),
}
_MOST_POINTS, _WORST_POINTS = 20_000, 200

# Reference and predicted values, [2, values], in the units of the axes, with the colour of their set of structures.
_Sets = dict[str, tuple[np.ndarray, str]]


def write_parity(groups: Mapping[str, Mapping[str, Parity]], path: Path, title: str) -> None:
    """Write a PNG with predicted over reference `energy`, `forces` and `stress`, and below them how the errors are distributed.

    `groups` are sets of structures: train, validation, replay. Legends tell of all values; of more than 20,000 a fixed
    random choice is drawn and the 200 that are furthest off, as the figure says.
    """
    wrong = sorted({name for parities in groups.values() for name in parities} - set(_QUANTITIES))
    if wrong:
        raise ValueError(f"no such quantity: {', '.join(wrong)}; there are {', '.join(_QUANTITIES)}")
    colours = dict(zip(dict.fromkeys(("train", "validation", "replay", *groups)), itertools.cycle(PALETTE)))
    panels: list[tuple[_Quantity, _Sets]] = []
    num_lost = num_most = 0
    for name, quantity in _QUANTITIES.items():
        sets: _Sets = {}
        for group, parity in ((group, some[name]) for group, some in groups.items() if name in some):
            values = np.stack([np.ravel(parity.reference), np.ravel(parity.predicted)]).astype(float)
            finite = values[:, np.isfinite(values).all(axis=0)]
            num_lost += values.shape[1] - finite.shape[1]
            num_most = max(num_most, finite.shape[1])
            if finite.size:
                sets[group] = quantity.factor * finite, colours[group]
        panels += [(quantity, sets)] if sets else []
    figure = Figure(figsize=(max(6.0, 4.3 * len(panels)), 7.2 if panels else 1.2), layout="constrained")
    grid = figure.add_gridspec(2, max(1, len(panels)), height_ratios=(3, 1.2))
    for number, (quantity, sets) in enumerate(panels):
        _draw_parity(figure.add_subplot(grid[0, number]), quantity, sets)
        _draw_errors(figure.add_subplot(grid[1, number]), quantity, sets)
    notes = ["below: the middle 99 % of each set's errors"] if panels else ["nothing to compare"]
    if num_most > _MOST_POINTS:
        notes.append(f"drawn: at most {_MOST_POINTS:,} of a set, by chance but for the {_WORST_POINTS} worst")
    notes += [f"left out: {num_lost:,} that are no finite number on both sides"] if num_lost else []
    save(figure, path, title, notes)


def _drawn(values: np.ndarray) -> np.ndarray:
    """Few enough for a figure, among them those that are furthest off, always the same ones."""
    if values.shape[1] <= _MOST_POINTS:
        return values
    others, worst = np.split(np.argsort(np.abs(values[1] - values[0])), [-_WORST_POINTS])
    chosen = np.random.default_rng(0).choice(others, _MOST_POINTS - _WORST_POINTS, replace=False)
    return values[:, np.concatenate([chosen, worst])]


def _legend(group: str, quantity: _Quantity, values: np.ndarray) -> str:
    reference, predicted = values
    errors = quantity.error_factor * (predicted - reference)
    both = np.abs(errors).mean(), math.sqrt((errors**2).mean())
    mae, rmse = (f"{error:.3g}" if error < 1000 else f"{error:,.0f}" for error in both)
    text = f"{group} ({len(errors):,}): MAE {mae}, RMSE {rmse} {quantity.error_unit}"
    centred = reference - (0.0 if quantity.has_zero else reference.mean())
    square = float(centred @ centred)
    return f"{text}, slope {float(centred @ predicted) / square:.3f}" if square > 0 else text


def _draw_parity(axis: Any, quantity: _Quantity, sets: _Sets) -> None:
    everything = np.concatenate([values.ravel() for values, _ in sets.values()])
    margin = 0.04 * np.ptp(everything) or 0.1
    ends = (everything.min() - margin, everything.max() + margin)
    axis.plot(ends, ends, color=QUIET, linestyle="--", linewidth=1)
    handles = {}
    for group in sorted(sets, key=lambda group: -sets[group][0].size):  # a large set would hide a small one
        values, colour = sets[group]
        size = float(np.clip(40 / values.shape[1] ** 0.4, 2.2, 6))
        look = {"color": colour, "alpha": 0.5, "markersize": size, "markeredgewidth": 0}
        (handles[group],) = axis.plot(*_drawn(values), "o", label=_legend(group, quantity, values), **look)
    legend = axis.legend(
        handles=[handles[group] for group in sets], fontsize=7, loc="lower left", bbox_to_anchor=(0, 1),
        frameon=False, alignment="left", handlelength=1, borderaxespad=0.2,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set(alpha=1, markersize=5)
    axis.set(xlim=ends, ylim=ends, aspect="equal")
    tidy(axis, f"reference {quantity.label}", f"predicted {quantity.label}")


def _draw_errors(axis: Any, quantity: _Quantity, sets: _Sets) -> None:
    """Histograms, each as high as its own peak, of the middle 99 %: a narrow one is seen beside a wide one."""
    for (reference, predicted), colour in sets.values():
        errors = quantity.error_factor * (predicted - reference)
        low, high = np.percentile(errors, 0.5, method="lower"), np.percentile(errors, 99.5, method="higher")
        margin = 0.0 if high > low else 0.01 * abs(high) or 1e-3
        counts, edges = np.histogram(errors, min(60, math.isqrt(errors.size)), (low - margin, high + margin))
        axis.stairs(counts / counts.max(), edges, fill=True, fc=(colour, 0.15), ec=colour, linewidth=1.3)
    axis.axvline(0, color=QUIET, linestyle="--", linewidth=1)
    tidy(axis, f"predicted − reference ({quantity.error_unit})", "count / peak")

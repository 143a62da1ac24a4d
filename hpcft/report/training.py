"""What a training shows at its end: learning curves. Parity plots: `hpcft.report.parity`.

A row is a line of metrics.jsonl (`Trainer.log()`): an epoch, or a setback. Any key may be missing, in all rows or in some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from hpcft.report.drawing import PALETTE, save, tidy

Row = Mapping[str, Any]

_BLUE, _ORANGE, _GREEN, _RED, *_ = PALETTE
_LONG, _WINDOW = 60, 11  # epochs: above the one, single epochs fade behind their running mean over the other


@dataclass(frozen=True)
class _Curve:
    """Points (epoch, value), NaN a gap; `scatters` says whether the values are those of an epoch's random batches."""

    label: str
    colour: str
    style: str
    points: np.ndarray
    scatters: bool

    @property
    def positive(self) -> list[float]:
        return [value for value in self.points[:, 1] if value > 0]


def write_learning_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG with a panel for each thing that the rows know of: losses, errors, Delta Q, learning rate, gradient norm."""
    panels = _panels([row for row in rows if "setback" not in row])
    num_rows = min(2, math.ceil(len(panels) / 3))
    num_columns = math.ceil(len(panels) / max(1, num_rows))
    figure = Figure(figsize=(4.3 * max(1, num_columns), 1.2 + 3.0 * num_rows), layout="constrained")
    for number, (name, curves) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(num_rows, num_columns, number)
        _draw_panel(axis, name, curves)
        _mark_epochs(axis, rows)
    save(figure, path, title, _training_notes(rows, panels) if panels else ["no epoch was recorded"])


def _panels(epochs: Sequence[Row]) -> dict[str, list[_Curve]]:
    """The curves with something in them, of each panel that has such."""

    def curve(key: str, label: str = "", colour: str = _BLUE, style: str = "-") -> _Curve:
        points = np.array([(row["epoch"], number(row[key])) for row in epochs if key in row], dtype=float)
        scatters = key != "learning_rate" and not key.startswith("valid/")
        return _Curve(label, colour, style, points.reshape(-1, 2), scatters)

    def errors(what: str, unit: str, part: str, valid: str) -> dict[str, list[_Curve]]:
        """Training is known by its squares and validation by its absolute errors: beside each other they would mislead."""
        squares = [curve(f"labels/{part}", "training", _BLUE), curve(f"replay/{part}", "replay", _GREEN)]
        for of in squares:
            of.points[:, 1] = 1e3 * np.sqrt(of.points[:, 1])
        absolute = curve(f"valid/{valid}", "validation", _ORANGE)
        return {f"{what}, training: RMSE ({unit})": squares, f"{what}, validation: MAE ({unit})": [absolute]}

    losses = [curve("loss", "training", _BLUE), curve("valid/loss", "validation", _ORANGE)]
    for group, name, colour in (("labels", "training", _BLUE), ("replay", "replay", _GREEN)):
        for part, style in (("energy", "--"), ("forces", ":"), ("stress", "-.")):
            losses.append(curve(f"{group}/{part}", f"{name}: {part}", colour, style))
    panels = {
        "loss, and its parts unweighted (eV, Å)": losses,
        **errors("energy", "meV/atom", "energy", "energy_mae_meV_per_atom"),
        **errors("forces", "meV/Å", "forces", "force_mae_meV_per_A"),
        **errors("stress", "meV/Å³", "stress", "stress_mae_meV_per_A3"),
        "ΔQ after relaxations (√amu Å)": [curve("relaxation/delta_q")],
        "learning rate": [curve("learning_rate")],
        "gradient norm": [curve("gradient_norm")],
    }
    # What is zero throughout was not trained on, such as a stress of weight zero.
    shown = {name: [curve for curve in curves if curve.positive] for name, curves in panels.items()}
    return {name: curves for name, curves in shown.items() if curves}


def number(value: Any) -> float:
    """NaN for everything that is no finite number; JSON has null where some writers had NaN."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _draw_panel(axis: Any, name: str, curves: Sequence[_Curve]) -> None:
    """On a logarithmic axis, which says so, where the values differ by more than a factor of five."""
    for curve in curves:
        _draw_curve(axis, curve)
    positive = [value for curve in curves for value in curve.positive]
    ratio = max(positive) / min(positive)
    if ratio > 5:
        axis.set_yscale("log", nonpositive="mask")
        axis.yaxis.set_minor_formatter(NullFormatter())
    if 5 < ratio < 100:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if ratio < 100:
        axis.yaxis.set_major_formatter(FormatStrFormatter(_tick_format(axis.get_ylim(), ratio > 5)))
    axis.set_title(name, fontsize=10, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(curves) > 3:  # they leave no room for a legend
        axis.set_ylim(top=axis.get_ylim()[1] * ratio**0.4)
        axis.legend(fontsize=7, framealpha=1, handlelength=2.6, ncols=2, loc="upper right")
    elif curves[0].label:
        axis.legend(fontsize=7, framealpha=1, handlelength=2.6)
    tidy(axis, "epoch", "log scale" if ratio > 5 else "")


def _tick_format(limits: tuple[float, float], has_few_digits: bool) -> str:
    """One notation for all ticks of an axis; %g changes it at 1e-4 and at 1e6."""
    if limits[0] >= 1e-4 and limits[1] < 1e6:
        return "%g"
    return "%.0e" if has_few_digits else "%.2e"


def _draw_curve(axis: Any, curve: _Curve) -> None:
    x, y = curve.points.T
    if len(x) > _LONG and curve.scatters:
        axis.plot(x, y, color=curve.colour, linewidth=0.6, alpha=0.35)
        known, window = np.isfinite(y), np.ones(_WINDOW)
        sums = np.convolve(np.where(known, y, 0.0), window, mode="same")
        y = np.where(known, sums / np.maximum(1, np.convolve(known, window, mode="same")), np.nan)
    # Markers show the point between two gaps, to which no line leads.
    look = {"marker": "" if len(x) > _LONG else "o", "markersize": 3, "linewidth": 1.4}
    axis.plot(x, y, curve.style, color=curve.colour, label=curve.label, **look)


def _best_epoch(rows: Sequence[Row]) -> tuple[float, int] | None:
    """The lowest `valid/loss`, and the first epoch that had it."""
    losses = [(number(row["valid/loss"]), int(row["epoch"])) for row in rows if "valid/loss" in row]
    return min((entry for entry in losses if not math.isnan(entry[0])), default=None)


def _mark_epochs(axis: Any, rows: Sequence[Row]) -> None:
    """The epoch whose model is kept, and the setbacks, each after the epoch to which it went back."""
    epochs = [row["epoch"] for row in rows if "setback" not in row]
    margin = max(0.7, 0.02 * (max(epochs) - min(epochs)))
    axis.set_xlim(min(epochs) - margin, max(epochs) + margin)
    if best := _best_epoch(rows):
        axis.axvline(best[1], color="black", linewidth=0.8, zorder=1)
    for after in (row["back_to_epoch"] + 0.5 for row in rows if "setback" in row):
        axis.axvline(after, color=_RED, linestyle=(0, (1, 1.5)), linewidth=1.2, zorder=1)


def _training_notes(rows: Sequence[Row], panels: Mapping[str, Sequence[_Curve]]) -> list[str]:
    notes = []
    if best := _best_epoch(rows):
        notes.append(
            f"black line: epoch {best[1]} is kept, which has the lowest validation loss, {best[0]:.4g}"
        )
    else:
        notes.append("no validation: the last epoch is kept")
    if "labels/forces" in set().union(*rows) and best:
        notes.append(
            "RMSE is no MAE: only the losses compare training (mean over the epoch, with all its terms) with validation "
            "(at the epoch's end)"
        )
    if setbacks := ", ".join(str(row["back_to_epoch"]) for row in rows if "setback" in row):
        notes.append(f"red dots: set back to the end of epoch {setbacks}, on a lower learning rate")
    if any(curve.scatters and len(curve.points) > _LONG for curves in panels.values() for curve in curves):
        notes.append(f"faint: single epochs, bold: their running mean over {_WINDOW}")
    for key, of_all, note in (
        (
            "labels/forces",
            max,
            "RMSE: root of the unweighted loss part over an epoch's batches (Huber's: less)",
        ),
        ("relaxation/dropped", max, "relaxations left out: at most {:.1%} of an epoch's"),
        ("structures_per_s", np.median, "median {:,.4g} structures/s"),
        ("atoms_per_s", np.median, "median {:,.4g} atoms/s"),
        ("memory_MiB", max, "at most {:,.0f} MiB of memory"),
    ):
        known = [value for row in rows if (value := number(row.get(key))) > 0]
        notes += [note.format(of_all(known))] if known else []
    return notes

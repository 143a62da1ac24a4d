"""The figure that a campaign ends with: each measure of bias, round by round, with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from hpcft.report.results import DIGITS, METRICS, RoundResult, model_name
from hpcft.storage.atomic import write_bytes

# The others are never negative: their axes begin at zero, which is no value that scatter would allow.
_IDEAL = {"energy_bias_meV_per_atom": 0.0, "force_slope": 1.0}
_UPRIGHT = 6  # more rounds than these have their names side by side only when turned
_INK, _QUIET = "#1f4e79", "#8a8a8a"


def write_figure(results: Sequence[RoundResult], path: Path, title: str, confidence: float) -> None:
    """Write a PNG with one panel per measure, its values below the axis, rounded as in the table.

    A dashed line is what an unbiased model would show, of the measures that have a sign or a ratio.
    """
    import io

    figure, axes = pyplot.subplots(2, 2, figsize=(9.0, 6.4), constrained_layout=True)
    for axis, (name, label, unit) in zip(axes.flat, METRICS, strict=True):
        _panel(axis, results, name, f"{label} ({unit})" if unit else label)
    figure.suptitle(f"{title}: bias of each round's model along its own MD", fontsize=12)
    labels = results[-1].training_labels if results else 0
    note = (
        f"bars: {confidence:.0%} confidence interval over replicas (ΔQ: over structures) · dashed: no bias · "
        f"{labels} labels trained on"
    )
    figure.supxlabel(note, fontsize=8, color=_QUIET)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())


def _panel(axis: Any, results: Sequence[RoundResult], name: str, label: str) -> None:
    rows = [(row.round, row.metrics[name]) for row in results if name in row.metrics]
    rounds = [round_ for round_, _ in rows]
    values = [metric["value"] for _, metric in rows]
    below = [max(0.0, m["value"] - m["low"]) if m["low"] == m["low"] else 0.0 for _, m in rows]
    above = [max(0.0, m["high"] - m["value"]) if m["high"] == m["high"] else 0.0 for _, m in rows]
    if name in _IDEAL:
        axis.axhline(_IDEAL[name], color=_QUIET, linestyle="--", linewidth=1)
    axis.errorbar(rounds, values, yerr=[below, above], color=_INK, marker="o", capsize=4, linewidth=1.6)
    axis.set_title(label, fontsize=10, loc="left")
    axis.set_xticks([row.round for row in results])
    axis.set_xticklabels(**_tick_labels(results, name), fontsize=9)
    axis.margins(x=0.15 if len(results) <= _UPRIGHT else 0.05, y=0.2)
    if name not in _IDEAL:
        axis.set_ylim(bottom=0.0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _tick_labels(results: Sequence[RoundResult], name: str) -> dict[str, Any]:
    """Each model and its value, where no curve can cross them."""
    turned = len(results) > _UPRIGHT
    texts = []
    for row in results:
        value = f"{row.metrics[name]['value']:.{DIGITS[name]}f}" if name in row.metrics else "–"
        texts.append(f"{model_name(row)}{': ' if turned else chr(10)}{value}")
    return {"labels": texts, "rotation": 90 if turned else 0}

"""The figure that a campaign ends with: each measure of bias, round by round, with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from hpcft.report.results import METRICS, RoundResult
from hpcft.storage.atomic import write_bytes

_IDEAL = {"energy_bias_meV_per_atom": 0.0, "force_slope": 1.0, "force_mae_meV_per_A": 0.0, "delta_q": 0.0}
_INK, _QUIET = "#1f4e79", "#8a8a8a"


def write_figure(results: Sequence[RoundResult], path: Path, title: str, confidence: float) -> None:
    """Write a PNG with one panel per measure; the dashed line is what an unbiased model would show."""
    import io

    figure, axes = pyplot.subplots(2, 2, figsize=(9.0, 6.4), constrained_layout=True)
    for axis, (name, label, unit) in zip(axes.flat, METRICS, strict=True):
        _panel(axis, results, name, f"{label} ({unit})" if unit else label)
    figure.suptitle(f"{title}: bias of each round's model along its own MD", fontsize=12)
    labels = results[-1].training_labels if results else 0
    note = f"bars: {confidence:.0%} confidence interval over replicas · dashed: no bias · {labels} labels trained on"
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
    axis.axhline(_IDEAL[name], color=_QUIET, linestyle="--", linewidth=1)
    axis.errorbar(rounds, values, yerr=[below, above], color=_INK, marker="o", capsize=4, linewidth=1.6)
    for round_, value in zip(rounds, values, strict=True):
        axis.annotate(
            f"{value:.3g}",
            (round_, value),
            textcoords="offset points",
            xytext=(8, 6),
            fontsize=8,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    axis.set_title(label, fontsize=10, loc="left")
    axis.set_xticks([row.round for row in results])
    axis.set_xticklabels(["foundation" if row.round == 0 else f"round {row.round}" for row in results])
    axis.margins(x=0.15, y=0.2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)

"""The table that a campaign ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hpcft.report.results import METRICS, RoundResult, shown

_DIGITS = {"energy_bias_meV_per_atom": 1, "force_slope": 2, "force_mae_meV_per_A": 0, "delta_q": 2}


def results_table(results: Sequence[RoundResult], confidence: float, title: str = "") -> Table:
    """One row per round: the four measures with their intervals, replicas that exploded, labels paid for so far."""
    table = Table(
        title=title or None,
        caption=f"in brackets: {confidence:.0%} confidence interval",
        caption_justify="left",
    )
    table.add_column("model")
    for _, label, unit in METRICS:
        table.add_column(f"{label}\n{unit}".rstrip(), justify="right")
    table.add_column("exploded\nreplicas", justify="right")
    table.add_column("labels\ntraining + judging", justify="right")
    for row in results:
        table.add_row(
            "foundation" if row.round == 0 else f"round {row.round}",
            *(shown(row.metrics.get(name), _DIGITS[name]) for name, _, _ in METRICS),
            str(row.exploded),
            f"{row.training_labels} + {row.judging_labels}",
        )
    return table

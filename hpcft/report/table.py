"""The table that a campaign ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from hpcft.report.results import METRICS, RELAXATION_METRICS, RoundResult, shown

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


def relaxations_table(results: Sequence[RoundResult], confidence: float) -> Table | None:
    """Where the relaxations end beside what the forces are worth, before and after each round; None without train.relaxation."""
    columns = [entry for entry in RELAXATION_METRICS if any(entry[0] in row.metrics for row in results)]
    if "delta_q_steps" not in [name for name, *_ in columns]:
        return None
    table = Table(
        title="relaxed structures, and what they cost",
        caption=f"k: the steps of train.relaxation; in brackets: {confidence:.0%} confidence interval over structures",
        caption_justify="left",
    )
    table.add_column("model")
    for _, label, unit, _ in columns:
        table.add_column(f"{label}\n{unit}", justify="right")
    for row in results:
        table.add_row(
            "foundation" if row.round == 0 else f"round {row.round}",
            *(shown(row.metrics.get(name), digits) for name, _, _, digits in columns),
        )
    return table


def label_notes(results: Sequence[RoundResult], folder: Path) -> list[str]:
    """What the counts of labels do not say: how many of them look wrong."""
    count = results[-1].suspect_labels if results else 0
    if not count:
        return []
    return [
        f'{count} label{"s" * (count != 1)} so far look{"s" * (count == 1)} wrong: listed under "suspects" in product.json of '
        f"{folder}/round-*/label and reference, and kept from training and judging unless label.quarantine is false"
    ]


def relaxation_notes(results: Sequence[RoundResult]) -> list[str]:
    """What the numbers do not say: relaxations that were judged before they had converged, and targets that were refused."""
    notes = []
    for row in results:
        model = "the foundation" if row.round == 0 else f"round {row.round}"
        if row.relaxations_unconverged:
            notes.append(
                f"{model}: {row.relaxations_unconverged} of its relaxations did not converge; ΔQ is where they stopped"
            )
        if row.relaxations_refused:
            number = len(row.relaxations_refused)
            notes.append(f"{model}: {number} without a target: {row.relaxations_refused[0]}")
    return notes

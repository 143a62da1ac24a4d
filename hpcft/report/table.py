"""The tables that a campaign ends with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table

from hpcft.report.results import DIGITS, METRICS, RELAXATION_METRICS, RoundResult, model_name, shown

Column = tuple[str, Sequence[str]]
"""A heading, and a cell for each row."""


@dataclass(frozen=True)
class FittingTable:
    """A table of which nothing is cut: where it is too wide, each interval stands below its value, and then columns follow in
    further tables, each with the first column again."""

    columns: Sequence[Column]
    caption: str
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        def fits(columns: Sequence[Column]) -> bool:
            return Measurement.get(console, options, self._table(columns)).maximum <= width

        # Measured with room to spare, as a table measures no wider than it may be.
        width, options = options.max_width, options.update(width=10_000)
        if fits(self.columns):
            yield self._table(self.columns, self.title, self.caption)
            return
        first, *others = [
            (title, [cell.replace(" [", "\n[") for cell in cells]) for title, cells in self.columns
        ]
        blocks: list[list[Column]] = [[first]]
        for column in others:
            if len(blocks[-1]) > 1 and not fits([*blocks[-1], column]):
                blocks.append([first])
            blocks[-1].append(column)
        for block in blocks:
            is_first, is_last = block is blocks[0], block is blocks[-1]
            yield self._table(block, self.title if is_first else None, self.caption if is_last else None)

    @staticmethod
    def _table(columns: Sequence[Column], title: str | None = None, caption: str | None = None) -> Table:
        table = Table(title=title, caption=caption, caption_justify="left")
        for number, (heading, _) in enumerate(columns):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*row)
        return table


def results_table(results: Sequence[RoundResult], confidence: float, title: str = "") -> FittingTable:
    """One row per round: the four measures with their intervals, replicas that exploded, labels paid for so far."""
    columns: list[Column] = [("model", [model_name(row) for row in results])]
    for name, label, unit in METRICS:
        cells = [shown(row.metrics.get(name), DIGITS[name]) for row in results]
        columns.append((f"{label}\n{unit}".rstrip(), cells))
    columns.append(("exploded\nreplicas", [str(row.exploded) for row in results]))
    labels = [f"{row.training_labels} + {row.judging_labels}" for row in results]
    columns.append(("labels\ntraining + judging", labels))
    caption = f"in brackets: {confidence:.0%} confidence interval over replicas (ΔQ: over structures)"
    return FittingTable(columns, caption, title or None)


def relaxations_table(results: Sequence[RoundResult], confidence: float) -> FittingTable | None:
    """Where the relaxations end beside what the forces are worth, before and after each round; None without train.relaxation."""
    shown_metrics = [entry for entry in RELAXATION_METRICS if any(entry[0] in row.metrics for row in results)]
    if "delta_q_steps" not in [name for name, *_ in shown_metrics]:
        return None
    columns: list[Column] = [("model", [model_name(row) for row in results])]
    for name, label, unit, digits in shown_metrics:
        columns.append((f"{label}\n{unit}", [shown(row.metrics.get(name), digits) for row in results]))
    caption = (
        f"k: the steps of train.relaxation; in brackets: {confidence:.0%} confidence interval over structures"
    )
    return FittingTable(columns, caption, "relaxed structures, and what they cost")


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

"""What a training says while it runs: a live line, and TensorBoard's events."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from hpcft.report.training import Row
from hpcft.report.training import number as _number


class ProgressLine:
    """A live line on a terminal; elsewhere a plain line per epoch, or per ten seconds where epochs are quicker than that."""

    def __init__(self, num_epochs: int, console: Console, clock: Callable[[], float] = monotonic) -> None:
        self._print = partial(console.print, soft_wrap=True, markup=False, highlight=False)
        self._clock, self._left = clock, TimeRemainingColumn()
        self._progress = Progress(
            TextColumn("epoch"), MofNCompleteColumn(), BarColumn(bar_width=12), TextColumn("left"), self._left,
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console, get_time=clock, disable=not console.is_interactive, expand=True,
            speed_estimate_period=math.inf,  # half a minute by default, but an epoch may take hours
        )  # fmt: skip
        self._task = self._progress.add_task("", total=num_epochs)
        self._printed_at = -math.inf
        self._unprinted: str | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._print_latest()
        if not self._progress.disable:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._progress.stop()

    def say(self, text: str) -> None:
        """Print above the line."""
        self._print(text)

    def show(self, row: Row) -> None:
        """Show an epoch, or print a setback."""
        if "setback" in row:
            self._print_latest()
            self._progress.update(self._task, completed=row["back_to_epoch"])
            self._print(f"back to the end of epoch {row['back_to_epoch']}: {row['why']}")
            return
        numbers = " · ".join(form.format(_number(row[key])) for key, form in _SHOWN.items() if key in row)
        self._progress.update(self._task, completed=int(row["epoch"]), description=numbers)
        (task,) = self._progress.tasks
        self._unprinted = f"epoch {task.completed}/{task.total} · {numbers} · left {self._left.render(task)}"
        if self._clock() - self._printed_at >= _PLAIN_EVERY_S or task.finished:
            self._print_latest()

    def _print_latest(self) -> None:
        if self._progress.disable and self._unprinted is not None:
            self._print(self._unprinted)
            self._unprinted, self._printed_at = None, self._clock()


_PLAIN_EVERY_S = 10.0
_SHOWN = {
    "loss": "loss {:.4g}",
    "valid/force_mae_meV_per_A": "validation {:.1f} meV/Å",
    "structures_per_s": "{:.3g} structures/s",
    "gradient_norm": "gradient {:.3g}",
    "learning_rate": "rate {:.2g}",
}


def scalars(row: Row) -> dict[str, float]:
    """TensorBoard's tags and the numbers of an epoch; what is in no group is put in `training`, so that it stands together."""
    tags = {key: key if "/" in key else f"training/{key}" for key in row if key != "epoch"}
    return {tag: value for key, tag in tags.items() if not math.isnan(value := _number(row[key]))}


def tensorboard_writer(folder: Path) -> Callable[[Row], None] | None:
    """A function that adds a row to the event file in `folder`; None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(folder))

    def write(row: Row) -> None:
        if "setback" in row:
            writer.add_text("setback", str(row["why"]), row["back_to_epoch"])
        else:
            for tag, number in scalars(row).items():
                writer.add_scalar(tag, number, int(row["epoch"]))
        writer.flush()

    return write

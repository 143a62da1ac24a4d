"""What `hpcft run` shows while it works: one live line on a terminal, a line per change when piped."""

from __future__ import annotations

import contextlib
import json
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

from hpcft.campaign.decide import Adopt, Collect, RecordEndings, SetAside, Submit
from hpcft.campaign.manager import Turn, stage_line
from hpcft.campaign.policy import describe
from hpcft.report.results import DIGITS, METRICS, RoundResult, model_name, read_results, shown
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder, kind_of


class Progress:
    """Follows the manager's turns. Lines are printed once, when something changes."""

    def __init__(self, folder: CampaignFolder) -> None:
        self.console = Console(highlight=False)
        self.folder = folder
        self._status: Status | None = None
        self._started = time.monotonic()
        self._stage_started = self._started
        self._silent = False

    def __enter__(self) -> Self:
        identity = self.folder.read_identity()
        what = "labels" if kind_of(identity) == "label" else "campaign"
        self.console.print(f"{what} {identity['name']} in {self.folder.root}")
        if self.console.is_terminal:
            self._status = self.console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live line; what follows is plain."""
        status, self._status = self._status, None
        if status is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                status.stop()

    def show(self, turn: Turn) -> None:
        for action in turn.actions:
            current = turn.records.current
            if isinstance(action, Submit) and current and any(map(current.latest_attempt, action.tasks)):
                self._print(
                    f"round {action.round} {action.stage}: tasks {list(action.tasks)} again, attempt {action.attempt}"
                )
            if isinstance(action, Adopt):
                self._print(
                    f"round {action.round} {action.stage}: found {len(action.elements)} jobs in the queue whose submission "
                    f"had not been recorded ({action.elements[0].split('_')[0]}); they are ours"
                )
            if isinstance(action, RecordEndings):
                self._ended(action, turn)
            if isinstance(action, SetAside):
                for task, why in sorted(action.why.items()):
                    self._print(f"round {action.round} {action.stage}: task {task} is set aside: {why}")
            if isinstance(action, Collect):
                self._collected(action)
        stage = turn.records.current
        if stage is None:
            return
        line = stage_line(turn) + self._epoch(stage.round, stage.name)
        self._show_silence(not turn.scheduler_answers, turn.silence)
        if self._status is not None:
            self._status.update(f"{line} · {time.monotonic() - self._stage_started:.0f} s")

    def _ended(self, action: RecordEndings, turn: Turn) -> None:
        stage = turn.records.current
        again = {} if stage is None else stage.retried_after
        # An attempt whose result a retry has put away did end with one.
        endings = [(t, e) for t, e in sorted(action.endings.items()) if e.attempt > again.get(t, 0)]
        for task, ending in endings[:10]:
            self._print(
                f"round {action.round} {action.stage}: task {task}, attempt {ending.attempt}: {describe(ending)}"
            )
        if len(endings) > 10:
            self._print(f"round {action.round} {action.stage}: and {len(endings) - 10} more tasks")

    def _show_silence(self, is_silent: bool, why: str) -> None:
        if is_silent and not self._silent:
            self._print(
                f"{self._clock()}  Slurm does not answer; jobs may go on, and it is asked again. {why}".rstrip()
            )
        elif self._silent and not is_silent:
            self._print(f"{self._clock()}  Slurm answers again")
        self._silent = is_silent

    def _collected(self, action: Collect) -> None:
        seconds = time.monotonic() - self._stage_started
        self._stage_started = time.monotonic()
        self._print(f"{self._clock()}  round {action.round} {action.stage:<9} done in {seconds:5.1f} s")
        if action.stage in ("label", "reference"):
            product = read_json(self.folder.stage(action.round, action.stage).product)
            if found := product.get("suspects"):
                first = f"task {found[0]['task']} of round {found[0]['round']}: {found[0]['reason']}"
                self._print(f"          {len(found)} labels so far look wrong; {first}")
        if action.stage == "evaluate":
            for result in read_results(self.folder):
                if result.round == action.round:
                    self._print(f"          {_brief(result)}")

    def _epoch(self, round_: int, stage: str) -> str:
        """Where training stands, from the last epoch in its metrics; a setback has a line of its own there."""
        metrics = self.folder.stage(round_, stage).task(0).path / "metrics.jsonl"
        if self._status is None or stage != "train" or not metrics.exists():
            return ""
        try:
            rows = map(json.loads, metrics.read_text().splitlines())
            row = [row for row in rows if "loss" in row][-1]
        except (ValueError, IndexError):
            return ""
        return f" · epoch {row['epoch']:.0f}, loss {row['loss']:.4f}"

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:3d}:{seconds:02d}"

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def _brief(result: RoundResult) -> str:
    parts = [
        f"{label} {shown(result.metrics.get(name), DIGITS[name])} {unit}".rstrip()
        for name, label, unit in METRICS
    ]
    return f"{model_name(result)}: {', '.join(parts)}"

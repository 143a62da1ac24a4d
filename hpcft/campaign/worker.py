"""What a job executes: the ranks of one task, or one task in each rank, found by campaign folder, round, stage and number."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpcft import __version__
from hpcft.campaign.records import intents_of
from hpcft.cluster.ranks import rank_of_this_process, spread_over_gpus
from hpcft.errors import CampaignStopped, MissingInput, UserError
from hpcft.storage.atomic import create_json_once, read_json, remove_leftovers
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder, TaskFolder
from hpcft.training.rank import Rank

log = logging.getLogger(__name__)

# An older execution, on a node that Slurm has given up, looks this often whether a newer one has begun.
WATCH_S = 5.0
_LOCK_WAIT_S = 60.0
SUPERSEDED_EXIT = 75


def run_tasks(root: str, round_: int, stage: str, tasks: Sequence[int], attempt: int) -> str:
    """Run this process's share: a rank of the only task, or the whole of one of several tasks of one rank each.

    The outcome is on disk, the return value for logs only.
    """
    rank = rank_of_this_process(attempt)
    if len(tasks) == 1 and not _is_packed(root, round_, stage, attempt):
        return run_task(root, round_, stage, tasks[0], attempt, rank)
    if rank.rank >= len(tasks):
        return "nothing to do: the last job of a stage may have fewer tasks than ranks"
    alone = replace(rank, rank=0, world_size=1, num_nodes=1)
    return run_task(root, round_, stage, tasks[rank.rank], attempt, alone)


def _is_packed(root: str, round_: int, stage: str, attempt: int) -> bool:
    intent = CampaignFolder(Path(root)).stage(round_, stage).intent(attempt)
    return int(read_json(intent).get("tasks_per_job", 1)) > 1


def run_task(root: str, round_: int, stage: str, index: int, attempt: int, rank: Rank | None = None) -> str:
    """Run one task to its end, or as far as it gets."""
    folder = CampaignFolder(Path(root))
    where = folder.stage(round_, stage)
    task = where.task(index)
    rank = rank or rank_of_this_process(attempt)
    task.path.mkdir(parents=True, exist_ok=True)
    if not is_current(where, index, attempt):
        return "superseded"
    if task.result.exists():
        return "done already"
    _say_when_code_has_changed(where, attempt)
    with _ending_signals() as signals:
        try:
            with _only_execution(where, index, attempt, rank.is_first) as execution:
                if task.result.exists():
                    return "done already"
                return _run(folder, round_, stage, index, attempt, rank, execution, signals)
        except BaseException as error:
            # What an execution that is not the newest has to say would be taken for the word of the newest.
            is_ours = type(error).__name__ != "Superseded"
            if is_ours and (rank.is_first or not isinstance(error, SystemExit | KeyboardInterrupt)):
                _record_error(task, attempt, error, signals)
            raise


def _run(
    folder: CampaignFolder,
    round_: int,
    stage: str,
    index: int,
    attempt: int,
    rank: Rank,
    execution: Execution,
    signals: _Signals,
) -> str:
    # Imported here: the lock is taken before the seconds that torch needs to load.
    from hpcft.campaign.settings import settings_of, site_of
    from hpcft.stages.context import StageContext, TaskContext
    from hpcft.stages.registry import stage_named

    site = read_json(folder.site)
    context = StageContext(
        folder, settings_of(folder), round_, stage, str(site["device"]), site_of(folder).mpi_launcher
    )
    rank = spread_over_gpus(rank, site.get("executor", ""), index)
    where = context.here.task(index)
    if rank.is_first:
        remove_leftovers(where.path)
    start = time.monotonic()
    payload = context.plan()[index]
    task = TaskContext(
        context, index, payload, attempt, rank, execution.is_newest, lambda: signals.time_is_up
    )
    outcome = stage_named(stage, context.settings.kind).run(task)
    if rank.is_first:
        about = {
            "attempt": attempt,
            "execution": execution.number,
            "wall_s": time.monotonic() - start,
            "peak_memory_MiB": _peak_memory_MiB(),
            "host": platform.node(),
            "hpcft_version": __version__,
            "at": time.time(),
        }
        task.ensure_owned()
        create_json_once(where.result, {**outcome, "about": about})
    return "done"


def _peak_memory_MiB() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def is_current(stage: StageFolder, index: int, attempt: int) -> bool:
    """Whether no newer attempt at this task was intended."""
    for path in reversed(intents_of(stage)):
        content = read_json(path)
        if index in content["tasks"]:
            return int(content["attempt"]) == attempt
    return False


def _say_when_code_has_changed(where: StageFolder, attempt: int) -> None:
    submitted_by = read_json(where.intent(attempt)).get("hpcft_version")
    if submitted_by != __version__:
        log.warning(
            "this job was submitted by hpcft %s and is run by hpcft %s: what is installed has changed since. Results say "
            "which version made them.",
            submitted_by,
            __version__,
        )


@dataclass(frozen=True)
class Execution:
    """One run of a task's first rank; the other ranks (number 0) end with it."""

    stage: StageFolder
    task: TaskFolder
    number: int = 0
    token: str = ""

    def is_newest(self) -> bool:
        """Whether the task is still ours. Not once a newer execution has begun, nor once the stage is finished and packed
        or put aside, which removes the marks: its files are published, and ours would be older.
        """
        if self.number == 0:
            return True
        if self.stage.product.exists() or self.task.run(self.number + 1).exists():
            return False
        try:
            return bool(read_json(self.task.run(self.number))["token"] == self.token)
        except (FileNotFoundError, KeyError):
            return False


@contextlib.contextmanager
def _only_execution(stage: StageFolder, index: int, attempt: int, is_first: bool) -> Iterator[Execution]:
    """Own the task as its newest execution, in rank 0.

    An older execution may live on where Slurm has lost sight of its node. It sees the newer one's mark and ends, which
    frees the lock; on a file system without locks it is given the time to. Raises RuntimeError if it does not end.
    """
    task = stage.task(index)
    if not is_first:
        yield Execution(stage, task)
        return
    execution, was_elsewhere = _claim(stage, task, attempt)
    with task.lock.open("a") as stream, _ending_once_superseded(execution):
        if was_elsewhere:  # locks may hold on one node only, and the old execution has to see our mark
            time.sleep(2 * WATCH_S)
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"another execution of this task still holds {task.lock} after {_LOCK_WAIT_S:.0f} s; end it, "
                        "or wait until it is done, and resume"
                    ) from None
                time.sleep(0.2)
            except OSError:
                break
        yield execution


def _claim(stage: StageFolder, task: TaskFolder, attempt: int) -> tuple[Execution, bool]:
    """Mark this execution as the task's newest one, naming host and job; whether the one before ran on another host."""
    stage.outcomes.mkdir(exist_ok=True)
    token = secrets.token_hex(8)
    mark = {
        "token": token,
        "attempt": attempt,
        "host": platform.node(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "at": time.time(),
    }
    # The host name alone is no node's where several nodes share a host.
    mark["node"] = os.environ.get("SLURMD_NODENAME", mark["host"])
    number = 1
    while task.run(number).exists() or not create_json_once(task.run(number), mark):
        number += 1
    before = read_json(task.run(number - 1)) if number > 1 else mark
    return Execution(stage, task, number, token), before.get("host") != mark["host"]


@contextlib.contextmanager
def _ending_once_superseded(execution: Execution) -> Iterator[None]:
    """While this lasts, end the process once its task is not its own any more."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_S):
            with contextlib.suppress(OSError, UserError):  # a file system that is away for a moment
                if not execution.is_newest():
                    what = f"a newer execution of {execution.task.path} has begun, or its stage is over"
                    print(f"{what}: this one ends", file=sys.stderr, flush=True)
                    os._exit(SUPERSEDED_EXIT)

    threading.Thread(target=watch, daemon=True, name="superseded-watch").start()
    try:
        yield
    finally:
        over.set()


@dataclass
class _Signals:
    """What the scheduler has told this process about its end."""

    received: list[str] = field(default_factory=list)

    @property
    def time_is_up(self) -> bool:
        return "SIGUSR2" in self.received


@contextlib.contextmanager
def _ending_signals() -> Iterator[_Signals]:
    """Take the signals out of submitit's hands, which would count any of them as a time-out of a short job.

    SIGUSR2 announces the end: work goes on, for everything finished is on disk and what is in hand may still get there.
    SIGTERM is the end: no handler, so that a requeued job is free at once.
    """
    heard = _Signals()
    if threading.current_thread() is not threading.main_thread() or not os.environ.get("SUBMITIT_EXECUTOR"):
        yield heard
        return

    def note(number: int, frame: Any) -> None:
        heard.received.append(signal.Signals(number).name)
        if os.environ["SUBMITIT_EXECUTOR"] == "local":
            # There is no scheduler here that would remember why it ended the task.
            raise KeyboardInterrupt("its time limit is near")

    before = {
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, note),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record_error(task: TaskFolder, attempt: int, error: BaseException, signals: _Signals) -> None:
    """Why this attempt ended. `final`: the same input would fail again, so it is not tried again."""
    timed_out = isinstance(error, KeyboardInterrupt) and signals.time_is_up
    is_mistake = isinstance(error, UserError | CampaignStopped) and not isinstance(error, MissingInput)
    content = {
        "attempt": attempt,
        "cause": "time-limit" if timed_out else "error",
        "message": f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error),
        "final": is_mistake or type(error).__name__ == "NotFinite",
        "traceback": traceback.format_exc()[-8000:],
        "host": platform.node(),
        "at": time.time(),
    }
    with contextlib.suppress(OSError):
        # The first rank to fail names the cause; the others only lose their connection to it.
        create_json_once(task.error(attempt), content)

"""What an array element executes: one rank of one task, found by campaign folder, round, stage and number."""

from __future__ import annotations

import contextlib
import fcntl
import platform
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from hpcft import __version__
from hpcft.campaign.records import intents_of
from hpcft.cluster.ranks import rank_of_this_process
from hpcft.errors import CampaignStopped, UserError
from hpcft.storage.atomic import create_json_once, read_json, remove_leftovers
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder, TaskFolder

_LOCK_WAIT_S = 30.0


def run_task(root: str, round_: int, stage: str, index: int, attempt: int) -> str:
    """Run one task to its end, or as far as it gets; the outcome is on disk, the return value for logs only."""
    folder = CampaignFolder(Path(root))
    where = folder.stage(round_, stage)
    task = where.task(index)
    rank = rank_of_this_process(attempt)
    task.path.mkdir(parents=True, exist_ok=True)
    with _only_attempt(task, rank.is_first) as alone:
        if not alone or not is_current(where, index, attempt):
            return "superseded"
        if task.result.exists():
            return "done already"
        try:
            return _run(folder, round_, stage, index, attempt)
        except BaseException as error:
            if rank.is_first or not isinstance(error, SystemExit | KeyboardInterrupt):
                _record_error(task, attempt, error)
            raise


def _run(folder: CampaignFolder, round_: int, stage: str, index: int, attempt: int) -> str:
    # Imported here: the lock is taken before the seconds that torch needs to load.
    from hpcft.campaign.settings import campaign_of
    from hpcft.stages.context import StageContext, TaskContext
    from hpcft.stages.registry import stage_named

    rank = rank_of_this_process(attempt)
    device = str(read_json(folder.site)["device"])
    context = StageContext(folder, campaign_of(folder), round_, stage, device)
    where = context.here.task(index)
    if rank.is_first:
        remove_leftovers(where.path)
    start = time.monotonic()
    task = TaskContext(context, index, context.plan()[index], attempt, rank)
    outcome = stage_named(stage).run(task)
    if rank.is_first:
        about = {
            "attempt": attempt,
            "wall_s": time.monotonic() - start,
            "host": platform.node(),
            "hpcft_version": __version__,
        }
        if not is_current(context.here, index, attempt):
            return "superseded"
        create_json_once(where.result, {**outcome, "about": about})
    return "done"


def is_current(stage: StageFolder, index: int, attempt: int) -> bool:
    """Whether no newer attempt at this task was intended."""
    for path in reversed(intents_of(stage)):
        content = read_json(path)
        if index in content["tasks"]:
            return int(content["attempt"]) == attempt
    return False


@contextlib.contextmanager
def _only_attempt(task: TaskFolder, is_first: bool) -> Iterator[bool]:
    """Hold the task's lock in rank 0; False when another execution still has it after a while."""
    if not is_first:
        yield True
        return
    with task.lock.open("a") as stream:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.2)
            except OSError:
                break  # a file system without flock: there the scheduler's word is what counts
        yield True


def _record_error(task: TaskFolder, attempt: int, error: BaseException) -> None:
    """Why this attempt ended. `final`: the same input would fail again, so it is not tried again."""
    content = {
        "attempt": attempt,
        "message": f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error),
        "final": isinstance(error, UserError | CampaignStopped) or type(error).__name__ == "NotFinite",
        "traceback": traceback.format_exc()[-8000:],
        "host": platform.node(),
        "at": time.time(),
    }
    with contextlib.suppress(OSError):
        # The first rank to fail names the cause; the others only lose their connection to it.
        create_json_once(task.error(attempt), content)

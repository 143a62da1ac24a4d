"""The controller jobs of a detached campaign, as recorded and as Slurm sees them. Light: `hpcft status` needs it."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.cluster import slurm
from hpcft.errors import SchedulerUnavailable
from hpcft.storage.atomic import create_json_once, read_json
from hpcft.storage.campaign_folder import CampaignFolder

# sbatch and squeue may disagree for this long about a job that was just submitted.
_SETTLING_S = 60.0


STOPPED = "the campaign has stopped"


@dataclass(frozen=True)
class Controller:
    """The newest controller of a campaign, as recorded."""

    number: int
    job_name: str
    at: float
    job_id: str | None = None
    over: str | None = None
    """Why it is not at work any more; None while it should be."""


def newest_controller(folder: CampaignFolder) -> Controller | None:
    numbers = [int(path.name.partition("-")[0]) for path in folder.controllers.glob("[0-9]*-intent.json")]
    if not numbers:
        return None
    intent = read_json(record_path(folder, max(numbers), "intent"))
    submitted, over = (record_path(folder, max(numbers), kind) for kind in ("submitted", "over"))
    return Controller(
        max(numbers),
        str(intent["job_name"]),
        float(intent["at"]),
        str(read_json(submitted)["job_id"]) if submitted.exists() else None,
        str(read_json(over)["why"]) if over.exists() else None,
    )


def record_path(folder: CampaignFolder, number: int, kind: str) -> Path:
    return folder.controllers / f"{number:04d}-{kind}.json"


def lost_controller(folder: CampaignFolder, run: slurm.Run = slurm.run_command) -> str | None:
    """What has become of a controller that should be at work and is not; None if all is well.

    Raises SchedulerUnavailable when Slurm does not say.
    """
    controller = newest_controller(folder)
    if controller is None or controller.over is not None or time.time() - controller.at < _SETTLING_S:
        return None
    jobs = [job for job in slurm.queue(controller.job_name, run) if job.name == controller.job_name]
    if any(not job.is_over and job.reason not in slurm.HOPELESS_REASONS for job in jobs):
        return None
    state = jobs[-1].state + (f", {jobs[-1].reason}" if not jobs[-1].is_over else "") if jobs else "gone"
    return f"the controller job {controller.job_id or controller.job_name} of this detached campaign is lost ({state})"


def dismiss_controller(folder: CampaignFolder, run: slurm.Run = slurm.run_command) -> None:
    """End the controller that waits or runs: a manager in the foreground takes its place."""
    controller = newest_controller(folder)
    if controller is None or controller.over is not None:
        return
    write_over(folder, controller.number, "a manager in the foreground has taken its place")
    with contextlib.suppress(SchedulerUnavailable):  # should it start after all, it finds that it is over
        jobs = slurm.queue(controller.job_name, run)
        alive = [job.job_id for job in jobs if job.name == controller.job_name and not job.is_over]
        if alive:
            slurm.cancel(alive, run)


def write_over(folder: CampaignFolder, number: int, why: str) -> None:
    create_json_once(record_path(folder, number, "over"), {"why": why, "at": time.time()})


def detached_state(folder: CampaignFolder) -> dict[str, Any] | None:
    """The controller that should be at work, for `hpcft status`; None if the campaign is not detached."""
    controller = newest_controller(folder)
    if controller is None or (controller.over and not controller.over.startswith(STOPPED)):
        return None
    return vars(controller)


def tidy_controllers(folder: CampaignFolder, before: int) -> None:
    """Remove what controllers older than number `before` have left; their words end up in manager.log."""
    for path in sorted(folder.controllers.glob("[0-9]*")):
        if int(path.name.partition("-")[0]) >= before:
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        with folder.log.open("ab") as log:
            for output in sorted(path.glob("*_log.*")):
                log.write(output.read_bytes())
        shutil.rmtree(path, ignore_errors=True)

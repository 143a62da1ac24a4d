"""Detached mode: no process stays on the login node; each step ends by leaving a small job that takes the next one.

A controller waits (`afterany`) for the jobs of the stage, collects, decides, submits, and leaves its successor. Records in
`controllers/`: NNNN-intent, NNNN-submitted and, once it has done its part or was dismissed, NNNN-over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcft.campaign.controllers import STOPPED, newest_controller, record_path, tidy_controllers, write_over
from hpcft.campaign.lease import lease
from hpcft.campaign.manager import Manager, Turn
from hpcft.campaign.report import write_report
from hpcft.cluster import slurm
from hpcft.cluster.executors import JobSpec, submit
from hpcft.config.common import Resources
from hpcft.config.site import Site
from hpcft.errors import CampaignStopped, LeaseHeld, SchedulerUnavailable, SubmissionRefused, UserError
from hpcft.storage.atomic import create_json_once, write_json
from hpcft.storage.campaign_folder import CampaignFolder

# What a controller keeps of its time limit to leave a successor.
_RESERVE_S = 300.0
_LEAST_S = 60.0
_LEASE_POLL_S = 5.0
_LATER_S = 600


def submit_controller(manager: Manager, after: Sequence[str], begin_in_s: int = 0) -> str:
    """Leave a controller that starts once the jobs `after` are over; returns its job id."""
    folder, site = manager.folder, manager.site
    folder.controllers.mkdir(exist_ok=True)
    known = newest_controller(folder)
    number = 1 if known is None else known.number + 1
    name = f"{manager.scheduler.name_prefix}controller-{number}"
    while not create_json_once(record_path(folder, number, "intent"), {"job_name": name, "at": time.time()}):
        number += 1
        name = f"{manager.scheduler.name_prefix}controller-{number}"
    spec = JobSpec(
        name=name,
        stage="controller",
        ranks=1,
        resources=Resources(time_min=site.controller.time_min, memory_GB=site.controller.memory_GB),
        folder=folder.controllers / f"{number:04d}-jobs",
        after=tuple(sorted({job_id.split("_")[0] for job_id in after})),
        begin_in_s=begin_in_s,
    )
    try:
        [job_id] = submit(site, spec, run_controller, [(str(folder.root), number)])
    except SubmissionRefused:
        write_json(record_path(folder, number, "over"), {"why": "Slurm refused it", "at": time.time()})
        raise
    write_json(record_path(folder, number, "submitted"), {"job_id": job_id, "at": time.time()})
    tidy_controllers(folder, number - 1)
    return job_id


def drive_detached(
    manager: Manager,
    on_turn: Callable[[Turn], None] = lambda turn: None,
    until: float | None = None,
) -> str | None:
    """Go on until there is nothing to do but wait for jobs, then leave a controller; returns its job id.

    None when the campaign is finished. `until` is the time (time.monotonic) by which a successor must be left in any
    case. Raises CampaignStopped when the campaign cannot go on by itself, SchedulerUnavailable when Slurm has been
    silent for longer than the site's patience, with nobody left to go on.
    """
    manager.leaves_controller = True
    silent_since: float | None = None
    while True:
        turn = manager.step()
        on_turn(turn)
        if turn.is_last:
            manager.tidy_finished(turn.records)
            return None
        now = time.monotonic()
        if turn.is_idle:
            jobs = _jobs_to_wait_for(turn)
            is_late = until is not None and now > until
            try:
                if turn.scheduler_answers and (jobs or is_late):
                    job_id = submit_controller(manager, jobs, 60 if is_late and not jobs else 0)
                    manager.tidy_finished(turn.records)  # with a successor left, it may take its time
                    return job_id
            except SubmissionRefused as refusal:
                if not refusal.is_limit:
                    raise CampaignStopped(str(refusal)) from refusal
            except SchedulerUnavailable:
                pass  # whether it arrived or not: the next controller's number tells it that it is the second
        silent_since = None if turn.scheduler_answers else silent_since or now
        patience_s = manager.site.patience_min * 60
        if silent_since is not None and now - silent_since > patience_s:
            raise SchedulerUnavailable(
                f"Slurm has not answered for {manager.site.patience_min:g} minutes, so no controller could be left; "
                "go on with hpcft submit or hpcft resume once it is back"
            )
        if turn.is_idle:
            manager.wait(turn)


def _jobs_to_wait_for(turn: Turn) -> tuple[str, ...]:
    """Jobs after which there is something to do; none while anything is unclear that time alone will settle."""
    stage = turn.records.current
    if stage is None or not stage.missing:
        return ()
    alive = turn.observation.alive
    if any(queued.reason == "JobHeldUser" for queued in alive.values()):
        return ()  # not released yet: they would be waited for in vain
    latest = {task: stage.latest_attempt(task) for task in stage.missing}
    unclear = [
        t for t, a in latest.items() if a is not None and t not in alive and stage.ending(t, a.number) is None
    ]
    if unclear or not alive:
        return ()
    arrays = sorted({queued.job_id.split("_")[0] for queued in alive.values()}, key=int)
    # Tasks that still wait for room follow as soon as the oldest array has left some.
    has_more = any(a is None or stage.ending(t, a.number) is not None for t, a in latest.items())
    return (arrays[0],) if has_more else tuple(arrays)


def run_controller(root: str, number: int) -> str:
    """What a controller job executes: everything that can be done now, and a successor for the rest."""
    from hpcft.campaign.settings import site_of

    start = time.monotonic()
    folder = CampaignFolder(Path(root))
    if _has_successor(folder, number):
        return "superseded"
    site = site_of(folder)
    until = start + max(_LEAST_S, site.controller.time_min * 60 - _RESERVE_S)
    try:
        next_job = _take_turn(folder, site, number, until)
    except LeaseHeld:
        if _has_successor(folder, number):
            return "superseded"
        # Somebody is at work all the time: look again later, or the chain would end here should they just have gone.
        next_job = submit_controller(Manager(folder, site), (), begin_in_s=_LATER_S)
    except (CampaignStopped, UserError) as stopped:
        write_over(folder, number, f"{STOPPED}: {stopped}")
        raise
    if next_job is None:
        _leave_report(folder)
    why = "the campaign is finished" if next_job is None else f"controller job {next_job} follows"
    write_over(folder, number, why)
    return why


def _leave_report(folder: CampaignFolder) -> None:
    """The figure that `run` writes at its end. Without it the campaign is finished all the same: `hpcft report` makes it."""
    if folder.kind != "campaign":
        return
    try:
        write_report(folder)
    except Exception as error:
        print(f"no figure was written: {error}", flush=True)


def _take_turn(folder: CampaignFolder, site: Site, number: int, until: float) -> str | None:
    """Wait for the lease, which others hold for moments, and go on; LeaseHeld if they hold it for long."""
    while True:
        try:
            with lease(folder.leases, job_is_over=slurm.job_is_over):
                if _has_successor(folder, number):  # left by whoever held the lease until now
                    raise LeaseHeld("another controller has been left meanwhile")
                return drive_detached(Manager(folder, site), _log_turn, until)
        except LeaseHeld:
            if time.monotonic() > until or _has_successor(folder, number):
                raise
        time.sleep(_LEASE_POLL_S)


def _has_successor(folder: CampaignFolder, number: int) -> bool:
    """Whether this controller was dismissed, or one with a higher number has been submitted.

    A higher intent alone proves nothing: its writer, perhaps an earlier execution of this very job, may have died.
    """
    newest = newest_controller(folder)
    if newest is None or record_path(folder, number, "over").exists():
        return True
    if newest.number == number:
        return False
    if newest.job_id is not None:
        return True
    with contextlib.suppress(SchedulerUnavailable):
        return any(job.name == newest.job_name and not job.is_over for job in slurm.queue(newest.job_name))
    return False


def _log_turn(turn: Turn) -> None:
    from hpcft.campaign.manager import stage_line

    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {stage_line(turn)} {turn.silence}".rstrip(), flush=True)


def require_slurm(site: Site) -> None:
    """Raises UserError for a site on which there is nothing to leave a campaign to."""
    if site.executor != "slurm":
        raise UserError(
            f"site {site.name} runs tasks on this machine, so a campaign cannot be left to Slurm; use hpcft run, or name a "
            "Slurm site with --site"
        )

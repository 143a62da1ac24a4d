"""Driving a campaign from a terminal: in the foreground or detached, through Ctrl-C and a lost connection."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.campaign.manager import Manager, Turn
    from hpcft.cli.progress import Progress
    from hpcft.config.settings import Settings
    from hpcft.config.site import Site


# For the controller job of a detached campaign that is just taking its step.
_CONTROLLER_WAIT_S = 20.0


class HangUp(BaseException):
    """The terminal is gone. Not an Exception: nothing on the way may take it for a failure of its own."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which batch systems, `timeout` and systemd end what they run: it ends as with Ctrl-C."""


_HEARD: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HangUp,
}


def chosen_site(folder: CampaignFolder, path: Path | None) -> Site:
    """The site of the file, else the one that the campaign ran on last."""
    from hpcft.campaign.settings import site_of
    from hpcft.config.site import load_site, missing_executables

    site = site_of(folder) if path is None else load_site(path)
    missing = missing_executables(site)
    if missing:
        raise UserError(
            f"site '{site.name}' runs on Slurm, but {', '.join(missing)} cannot be found on this machine. Log in to the "
            "cluster, or run here with a site whose executor is local: --site FILE."
        )
    return site


def opened(directory: Path) -> CampaignFolder:
    """An existing campaign's folder that is safe to submit from; else a UserError."""
    from hpcft.campaign.new_folder import refuse_hostile_name, refuse_shared

    folder = CampaignFolder(directory.absolute())
    folder.read_identity()
    refuse_hostile_name(folder.root)
    refuse_shared(folder.root)
    return folder


def refuse_impossible(folder: CampaignFolder, site: Site) -> None:
    """Raises UserError for what Slurm would refuse, or, worse, take and leave waiting for ever: it is held when submitted."""
    from hpcft.campaign.settings import settings_of
    from hpcft.cluster.limits import read_cluster
    from hpcft.cluster.problems import problems
    from hpcft.errors import SchedulerUnavailable

    if site.executor != "slurm":
        return
    try:
        cluster = read_cluster()
    except SchedulerUnavailable:
        return  # the manager will say so, and wait
    settings = settings_of(folder)
    errors = [p for p in problems(site, settings, cluster) if p.severity == "error"]
    if errors:
        files = {"campaign": "reference file"} if settings.kind == "label" else {}
        lines = [
            f"{files.get(p.source, p.source)} {p.key}: {p.what}{f'; {p.accepted}' if p.accepted else ''}"
            for p in errors
        ]
        raise UserError(
            "nothing was submitted, for Slurm would not run it:\n  "
            + "\n  ".join(lines)
            + "\nShould Slurm know better, say --no-check."
        )


def refuse_without_programs(settings: Settings, site: Site) -> None:
    """Raises UserError if the reference's programs, or the scratch they need, are surely not there."""
    from hpcft.cli.preflight import reference_problems

    errors = [
        problem
        for problem in reference_problems(site, settings, None)
        if problem.severity == "error" and problem.key in ("reference.command", "TMPDIR")
    ]
    if errors:
        raise UserError(
            "\n".join(f"{p.key}: {p.what}; {p.accepted}" for p in errors)
            + "\nShould the jobs know better, say --no-check."
        )


def let_controller_finish(folder: CampaignFolder, at_most_s: float = _CONTROLLER_WAIT_S) -> None:
    """A controller job is at work for some seconds only, and what it leaves waiting can be dismissed."""
    from hpcft.campaign.lease import holder

    deadline = time.monotonic() + at_most_s
    while (at_work := holder(folder.leases)) and at_work.get("job") and time.monotonic() < deadline:
        time.sleep(0.5)


@contextlib.contextmanager
def managing(folder: CampaignFolder, site: Site, take_over: bool, *, resumed: bool) -> Iterator[Manager]:
    """The campaign's only manager, with the lease; a controller that waits for its turn is dismissed."""
    from hpcft.campaign.controllers import dismiss_controller
    from hpcft.campaign.lease import lease
    from hpcft.campaign.manager import Manager, record_resume
    from hpcft.cluster.slurm import job_is_over

    is_slurm = site.executor == "slurm"
    let_controller_finish(folder)
    with lease(
        folder.leases, take_over=take_over, job_is_over=job_is_over if is_slurm else lambda job_id: False
    ):
        if is_slurm:
            dismiss_controller(folder)
        manager = Manager(folder, site)
        if resumed:
            record_resume(folder, time.time())
        yield manager


def drive(folder: CampaignFolder, site: Site, take_over: bool, *, resumed: bool = False) -> bool:
    """Run in the foreground to the campaign's end; False if the terminal went away and a controller goes on."""
    from hpcft.cli.progress import Progress

    with managing(folder, site, take_over, resumed=resumed) as manager, Progress(folder) as progress:
        try:
            with _hearing_the_terminal() as check:

                def on_turn(turn: Turn) -> None:
                    check()
                    progress.show(turn)

                manager.run(on_turn)
        except HangUp:
            return _go_on_without_terminal(manager, progress)
        except KeyboardInterrupt as end:
            _interrupted(manager, site)
            number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
            raise typer.Exit(128 + number) from None
    return True


def drive_and_leave(
    folder: CampaignFolder, site: Site, take_over: bool, *, resumed: bool = False
) -> str | None:
    """Do what can be done now and leave a controller job for the rest; its id, None if the campaign is finished."""
    from hpcft.campaign.detached import drive_detached, require_slurm
    from hpcft.cli.progress import Progress

    require_slurm(site)
    with managing(folder, site, take_over, resumed=resumed) as manager, Progress(folder) as progress:
        return drive_detached(manager, progress.show)


def take_steps(folder: CampaignFolder, site: Site, take_over: bool) -> str:
    """Everything that can be done without waiting; one line about where the campaign stands then.

    No new attempts for what was given up: a clock that calls this every hour has not looked at why.
    """
    from hpcft.campaign.manager import stage_line
    from hpcft.cli.progress import Progress
    from hpcft.errors import SchedulerUnavailable

    with managing(folder, site, take_over, resumed=False) as manager, Progress(folder) as progress:
        while True:
            turn = manager.step()
            progress.show(turn)
            if turn.is_idle or turn.is_last:
                manager.tidy_finished(turn.records)
            if not turn.scheduler_answers:
                raise SchedulerUnavailable(
                    f"Slurm does not answer, so nothing could be decided. {turn.silence}".strip()
                )
            if turn.is_idle or turn.is_last:
                return stage_line(turn)


@contextlib.contextmanager
def _hearing_the_terminal() -> Iterator[Callable[[], None]]:
    """Ctrl-C, SIGTERM and a hang-up end what is done at the moment. Yields a function that raises what was heard before.

    An exception that is raised while Python runs a finaliser is lost: so it is asked for again in each turn.
    """
    heard: list[BaseException] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # once is enough
        heard.append(_HEARD[number]())
        raise heard[-1]

    def check() -> None:
        if heard:
            raise heard[-1]

    wanted = [n for n in _HEARD if signal.getsignal(n) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, hear) for number in wanted}
    try:
        yield check
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == hear:
                signal.signal(number, handler)


def _go_on_without_terminal(manager: Manager, progress: Progress) -> bool:
    """On Slurm a controller job takes over; here this process goes on, as under nohup."""
    from hpcft.campaign.detached import drive_detached

    progress.close()
    descriptor = os.open(manager.folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDONLY) if stream == 0 else descriptor, stream)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} the terminal is gone", flush=True)
    on_turn: Callable[..., None] = _line_of_turn
    if manager.scheduler.is_slurm:
        job = drive_detached(manager, on_turn)
        print(f"controller job {job} goes on" if job else "the campaign is finished", flush=True)
        return job is None
    manager.run(on_turn)
    return True


def _line_of_turn(turn: object) -> None:
    from hpcft.campaign.manager import Turn, stage_line

    assert isinstance(turn, Turn)
    if not turn.is_idle:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {stage_line(turn)}", flush=True)


def _interrupted(manager: Manager, site: Site) -> None:
    from hpcft.campaign.manager import record_resume

    where = short(manager.folder.root)
    if site.executor == "local":
        manager.scheduler.cancel_all()
        record_resume(manager.folder, time.time())  # what was interrupted has not failed
        print(
            f"\nInterrupted; everything finished is kept. Go on with: hpcft resume {where}", file=sys.stderr
        )
        return
    print(
        f"\nInterrupted; the jobs on Slurm go on. Go on with: hpcft resume {where}\n"
        f"or without a process of your own: hpcft submit {where}",
        file=sys.stderr,
    )


def short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

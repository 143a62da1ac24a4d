"""hpcft run, resume, status, cancel, report. Heavy imports wait until a command needs them: status loads no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.errors import LeaseHeld, UserError
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.campaign.manager import Manager
    from hpcft.config.site import Site

CampaignFile = Annotated[Path, typer.Argument(help="The campaign's YAML file.", show_default=False)]
CampaignDir = Annotated[Path, typer.Argument(help="The campaign's folder, as `hpcft run` printed it.")]
SiteFile = Annotated[
    Path | None,
    typer.Option("--site", help="Site config; default: this machine (or, to resume, the last one)."),
]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take the lease from a manager on a host that is gone for good.")
]


def run(
    campaign_file: CampaignFile,
    site: SiteFile = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Campaign folder; default: runs/NAME below the current folder."),
    ] = None,
    take_over: TakeOver = False,
) -> None:
    """Run a campaign to its end, or go on with it where it stands."""
    from hpcft.config.campaign import load_campaign

    campaign = load_campaign(campaign_file)
    root = directory or Path("runs") / campaign.name
    known = CampaignFolder(root.absolute())
    # Without --site a campaign goes on where it ran: its Slurm jobs must not be run again on the login node.
    chosen = _chosen_site(known, site)
    from hpcft.campaign.create import open_or_create

    folder = open_or_create(campaign, campaign_file, root, take_over=take_over)
    _drive(folder, chosen, take_over)


def resume(directory: CampaignDir, site: SiteFile = None, take_over: TakeOver = False) -> None:
    """Go on with a campaign where it stands; tasks that had been given up get new attempts."""
    folder = CampaignFolder(directory.absolute())
    folder.read_identity()
    chosen = _chosen_site(folder, site)
    from hpcft.campaign.create import refuse_hostile_name, refuse_shared

    refuse_hostile_name(folder.root)
    refuse_shared(folder.root)
    _drive(folder, chosen, take_over, resumed=True)


def _chosen_site(folder: CampaignFolder, path: Path | None) -> Site:
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


def _drive(folder: CampaignFolder, site: Site, take_over: bool, *, resumed: bool = False) -> None:
    from hpcft.campaign.lease import lease
    from hpcft.campaign.manager import Manager, record_resume
    from hpcft.cli.progress import Progress

    with lease(folder.leases, take_over=take_over):
        manager = Manager(folder, site)
        if resumed:
            record_resume(folder, time.time())
        with Progress(folder) as progress:
            try:
                manager.run(progress.show)
            except KeyboardInterrupt:
                _stop_local_tasks(manager, site)
                raise typer.Exit(130) from None
    _finish(folder)


def _stop_local_tasks(manager: Manager, site: Site) -> None:
    from hpcft.campaign.manager import record_resume

    if site.executor == "local":
        manager.scheduler.cancel_all()
        record_resume(manager.folder, time.time())  # what was interrupted has not failed
        typer.echo("\nInterrupted; everything finished is kept. ", nl=False, err=True)
    else:
        typer.echo("\nInterrupted; the jobs on Slurm go on. ", nl=False, err=True)
    typer.echo(f"Go on with: hpcft resume {_short(manager.folder.root)}", err=True)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _finish(folder: CampaignFolder) -> None:
    figure = _write_report(folder)
    _print_table(folder)
    last = int(folder.read_identity()["rounds"])
    typer.echo(f"figure: {_short(figure)}")
    typer.echo(f"model:  {_short(folder.stage(last, 'train').task(0).path / 'model.pt')}")


def _confidence(folder: CampaignFolder) -> float:
    return float(folder.read_identity()["config"]["evaluate"]["confidence"])


def _print_table(folder: CampaignFolder) -> None:
    from rich.console import Console

    from hpcft.report.results import read_results
    from hpcft.report.table import results_table

    results = read_results(folder)
    if results:
        console = Console()
        # A pipe has no width of its own; a table that is cut is worth nothing.
        console.width = console.width if console.is_terminal else 140
        console.print(results_table(results, _confidence(folder), str(folder.read_identity()["name"])))


def _write_report(folder: CampaignFolder) -> Path:
    from hpcft.report.figure import write_figure
    from hpcft.report.results import read_results

    folder.report.mkdir(exist_ok=True)
    figure = folder.report / "bias.png"
    write_figure(read_results(folder), figure, str(folder.read_identity()["name"]), _confidence(folder))
    return figure


def report(directory: CampaignDir) -> None:
    """Print the table of all rounds so far and write the figure."""
    folder = CampaignFolder(directory.absolute())
    folder.read_identity()
    _print_table(folder)
    typer.echo(f"figure: {_short(_write_report(folder))}")


def status(
    directory: CampaignDir,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Show where a campaign stands, from its own records: works without a manager and without Slurm."""
    from hpcft.campaign.status import describe

    folder = CampaignFolder(directory.absolute())
    state = describe(folder)
    if as_json:
        typer.echo(json.dumps(state, indent=1))
        return
    typer.echo(state["summary"])
    for line in state["problems"]:
        typer.echo(f"  {line}")
    _print_table(folder)


def cancel(directory: CampaignDir) -> None:
    """End all running and waiting tasks of a campaign; what is finished stays, and resume goes on."""
    from hpcft.campaign.lease import holder
    from hpcft.campaign.manager import record_resume
    from hpcft.campaign.scheduler import Scheduler
    from hpcft.campaign.settings import campaign_of, site_of

    folder = CampaignFolder(directory.absolute())
    scheduler = Scheduler(folder, campaign_of(folder), site_of(folder))
    manager = holder(folder.leases)
    if manager is not None:
        raise LeaseHeld(
            f"process {manager['pid']} on {manager['host']} drives this campaign and would submit its tasks again; end that "
            "process first, then cancel"
        )
    count = scheduler.cancel_all()
    record_resume(folder, time.time())  # what was cancelled has not failed
    typer.echo(f"{count} job{'s' * (count != 1)} cancelled. Go on with: hpcft resume {_short(folder.root)}")

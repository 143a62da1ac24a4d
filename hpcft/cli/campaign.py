"""hpcft run, submit, resume, status, cancel, report. Heavy imports wait until a command needs them: status loads no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.cli.drive import (
    chosen_site,
    drive,
    drive_and_leave,
    let_controller_finish,
    opened,
    refuse_impossible,
    refuse_without_programs,
    short,
    take_steps,
)
from hpcft.cli.labelled import show_labels, showing_what_is_done, write_and_show
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.config.site import Site

CampaignFile = Annotated[Path, typer.Argument(help="The campaign's YAML file.", show_default=False)]
CampaignDir = Annotated[Path, typer.Argument(help="The campaign's folder, as `hpcft run` printed it.")]
SiteFile = Annotated[
    Path | None,
    typer.Option("--site", help="Site config; default: this machine (or, to resume, the last one)."),
]
CampaignFolderOption = Annotated[
    Path | None,
    typer.Option("--dir", help="Campaign folder; default: runs/NAME below the current folder."),
]
Check = Annotated[bool, typer.Option(help="Refuse first what could not run, as `hpcft check` tells it.")]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take the lease from a manager on a host that is gone for good.")
]


def run(
    campaign_file: CampaignFile,
    site: SiteFile = None,
    directory: CampaignFolderOption = None,
    take_over: TakeOver = False,
    check: Check = True,
) -> None:
    """Run a campaign to its end, or go on with it where it stands; this command stays until then."""
    folder, chosen = _made(campaign_file, site, directory, take_over, check)
    if check:
        refuse_impossible(folder, chosen)
    if drive(folder, chosen, take_over):
        _finish(folder)


def submit(
    campaign: Annotated[
        Path, typer.Argument(help="A campaign's YAML file, or the folder of one.", show_default=False)
    ],
    site: SiteFile = None,
    directory: CampaignFolderOption = None,
    take_over: TakeOver = False,
    check: Check = True,
) -> None:
    """Leave a campaign to Slurm: a small controller job follows each stage, and no process stays here."""
    resumed = campaign.is_dir()
    if resumed:
        folder = opened(campaign)
        chosen = chosen_site(folder, site)
    else:
        folder, chosen = _made(campaign, site, directory, take_over, check, detached=True)
    if check:
        refuse_impossible(folder, chosen)
    with showing_what_is_done(folder):
        job = drive_and_leave(folder, chosen, take_over, resumed=resumed)
    if job is None:
        _finish(folder)
        return
    typer.echo(
        f"controller job {job} goes on when the jobs before it are over. Look with: hpcft status {short(folder.root)}"
    )


def resume(
    directory: CampaignDir,
    site: SiteFile = None,
    take_over: TakeOver = False,
    once: Annotated[
        bool,
        typer.Option("--once", help="Do what can be done now, then return; what was given up stays so."),
    ] = False,
    check: Check = True,
) -> None:
    """Go on with a campaign where it stands; tasks that had been given up get new attempts."""
    folder = opened(directory)
    chosen = chosen_site(folder, site)
    if check:
        refuse_impossible(folder, chosen)
    with showing_what_is_done(folder):
        if once:
            typer.echo(take_steps(folder, chosen, take_over))
            return
        is_done = drive(folder, chosen, take_over, resumed=True)
    if is_done:
        _finish(folder)


def _made(
    campaign_file: Path,
    site: Path | None,
    directory: Path | None,
    take_over: bool,
    check: bool,
    *,
    detached: bool = False,
) -> tuple[CampaignFolder, Site]:
    """The folder of the campaign that a file describes, made now or found, and the site to run it on."""
    from hpcft.config.campaign import load_campaign

    campaign = load_campaign(campaign_file)
    root = directory or Path("runs") / campaign.name
    known = CampaignFolder(root.absolute())
    # Without --site a campaign goes on where it ran: its Slurm jobs must not be run again on the login node.
    chosen = chosen_site(known, site)
    from hpcft.campaign.create import open_or_create

    if detached:
        from hpcft.campaign.detached import require_slurm

        require_slurm(chosen)
    if check and not known.identity.exists():
        refuse_without_programs(campaign, chosen)
    return open_or_create(campaign, campaign_file, root, take_over=take_over), chosen


def _finish(folder: CampaignFolder) -> None:
    if folder.kind == "label":
        show_labels(folder)
        return
    from hpcft.campaign.report import write_report

    write_report(folder)
    _print_table(folder)
    _name_what_it_leaves(folder)


def _name_what_it_leaves(folder: CampaignFolder) -> None:
    from hpcft.campaign.report import figure_of, last_model

    if figure_of(folder).exists():
        typer.echo(f"figure: {short(figure_of(folder))}")
    typer.echo(f"model:  {short(last_model(folder))}")


def _print_table(folder: CampaignFolder) -> None:
    if folder.kind == "label":
        show_labels(folder)
        return
    from rich.console import Console

    from hpcft.campaign.report import confidence_of
    from hpcft.report.results import read_results
    from hpcft.report.table import label_notes, relaxation_notes, relaxations_table, results_table

    results = read_results(folder)
    if results:
        console = Console()
        # A pipe has no width of its own; a table that is cut is worth nothing.
        console.width = console.width if console.is_terminal else 140
        console.print(results_table(results, confidence_of(folder), str(folder.read_identity()["name"])))
        if (relaxations := relaxations_table(results, confidence_of(folder))) is not None:
            console.print(relaxations)
        for note in (*label_notes(results, folder.root), *relaxation_notes(results)):
            console.print(note, soft_wrap=True, markup=False, highlight=False)


def report(directory: CampaignDir) -> None:
    """Print the table of all rounds so far and write the figure; of labels alone, write those that are there."""
    from hpcft.campaign.report import write_report

    folder = CampaignFolder(directory.absolute())
    if folder.kind == "label":
        write_and_show(folder)
        return
    _print_table(folder)
    typer.echo(f"figure: {short(write_report(folder))}")


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
    if state["state"] == "finished" and folder.kind == "campaign":
        _name_what_it_leaves(folder)


def cancel(directory: CampaignDir) -> None:
    """End all running and waiting tasks of a campaign; what is finished stays, and resume goes on."""
    from hpcft.campaign.controllers import dismiss_controller
    from hpcft.campaign.lease import lease
    from hpcft.campaign.manager import record_resume
    from hpcft.campaign.mend import cancel_everything
    from hpcft.campaign.scheduler import Scheduler
    from hpcft.campaign.settings import settings_of, site_of
    from hpcft.cluster.slurm import job_is_over

    folder = opened(directory)
    site = site_of(folder)
    is_slurm = site.executor == "slurm"
    if is_slurm:
        dismiss_controller(folder)  # and wait until one that is at work has ended: it would submit again
    let_controller_finish(folder, 60.0)
    with lease(folder.leases, job_is_over=job_is_over if is_slurm else lambda job_id: False):
        if is_slurm:
            dismiss_controller(folder)
        count = cancel_everything(folder, Scheduler(folder, settings_of(folder), site))
        record_resume(folder, time.time())  # what was cancelled has not failed
    typer.echo(f"{count} job{'s' * (count != 1)} cancelled. Go on with: hpcft resume {short(folder.root)}")

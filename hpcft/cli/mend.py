"""hpcft retry, rewind: what a user does about failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.cli.drive import chosen_site, let_controller_finish, opened, short
from hpcft.errors import UserError
from hpcft.storage.campaign_folder import STAGES, CampaignFolder

if TYPE_CHECKING:
    from hpcft.campaign.scheduler import Scheduler

CampaignDir = Annotated[Path, typer.Argument(help="The campaign's folder, as `hpcft run` printed it.")]


@contextmanager
def _alone_with(folder: CampaignFolder) -> Iterator[Scheduler]:
    """The lease, and the scheduler of the site on which the campaign ran last."""
    from hpcft.campaign.lease import lease
    from hpcft.campaign.scheduler import Scheduler
    from hpcft.campaign.settings import settings_of
    from hpcft.cluster.slurm import job_is_over

    site = chosen_site(folder, None)
    is_slurm = site.executor == "slurm"
    let_controller_finish(folder)
    with lease(folder.leases, job_is_over=job_is_over if is_slurm else lambda job_id: False):
        yield Scheduler(folder, settings_of(folder), site)


def _how_to_go_on(folder: CampaignFolder) -> None:
    from hpcft.campaign.controllers import detached_state

    controller = detached_state(folder)
    if controller is not None and controller["over"] is None:
        typer.echo(f"The controller job {controller['job_id']} goes on when the jobs before it are over.")
        return
    typer.echo(f"Go on with: hpcft resume {short(folder.root)}, or without a process here: hpcft submit")


def retry(
    directory: CampaignDir,
    stage: Annotated[str | None, typer.Option("--stage", help="Only if this stage is in progress.")] = None,
    task: Annotated[
        list[int] | None, typer.Option("--task", help="This task; may be given several times.")
    ] = None,
    cause: Annotated[
        str | None,
        typer.Option(
            "--cause",
            help="Only what ended so: error, time-limit, out-of-memory, node-failure, preempted, cancelled, failed, lost, "
            "set-aside, or the cause of a failed label, such as scf.",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a setting first, such as label.time_min=60; may be given several times."
        ),
    ] = None,
) -> None:
    """Give failed or set-aside tasks of the stage in progress new attempts; resume or submit then goes on.

    Of `hpcft label` also where it is finished: what has failed is tried again, what is labelled is kept.
    """
    from hpcft.campaign.mend import change_settings
    from hpcft.campaign.mend import retry as retry_tasks

    folder = opened(directory)
    _known_stage(stage)
    with _alone_with(folder):
        changed = change_settings(folder, changes or ())
        for key, (old, new) in changed.items():
            typer.echo(f"{key}: {old} -> {new}")
        try:
            retried = retry_tasks(folder, stage=stage, tasks=task or None, cause=cause)
        except UserError as nothing:
            if not changed:
                raise
            typer.echo(f"no task is tried again: {nothing}")
            return
    where = f"round {retried.stage.round}, stage {retried.stage.name}"
    if retried.tasks:
        typer.echo(f"{where}: {_listed(retried.tasks)} will be tried again")
    if retried.reopened:
        typer.echo(f"{where}: {_listed(retried.reopened)} will try failed labels again")
    _how_to_go_on(folder)


def rewind(
    directory: CampaignDir,
    round_: Annotated[int, typer.Option("--round", min=0, help="Round to go back to.", show_default=False)],
    stage: Annotated[str, typer.Option("--stage", help="Stage to start again from.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Start again from a stage; its results and all later ones are kept aside, and no label is paid for twice."""
    from hpcft.campaign.mend import refuse_unknown_place
    from hpcft.campaign.mend import rewind as rewind_stages

    folder = opened(directory)
    _known_stage(stage)
    refuse_unknown_place(folder, round_, stage)
    if not yes and not typer.confirm(
        f"Cancel what runs, and put stage {stage} of round {round_} and all that follows aside?"
    ):
        raise typer.Exit(0)
    with _alone_with(folder) as scheduler:
        moved = rewind_stages(folder, round_, stage, scheduler)
    for path in reversed(moved):
        typer.echo(f"kept in {short(path)}")
    _how_to_go_on(folder)


def _known_stage(stage: str | None) -> None:
    if stage is not None and stage not in STAGES:
        raise UserError(f"there is no stage {stage}; the stages are {', '.join(STAGES)}")


def _listed(tasks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, tasks[:20])) + (f" and {len(tasks) - 20} more" if len(tasks) > 20 else "")
    return f"task{'s' * (len(tasks) > 1)} {shown}"

"""hpcft logs: what a task's jobs have printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcft.errors import UserError
from hpcft.storage.campaign_folder import STAGES, CampaignFolder

_TAIL = 40


def logs(
    directory: Annotated[Path, typer.Argument(help="The campaign's folder, as `hpcft run` printed it.")],
    round_: Annotated[int | None, typer.Option("--round", help="Default: the round in progress.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Default: the stage in progress.")] = None,
    task: Annotated[
        int | None, typer.Option("--task", help="Default: the first one that has failed, else 0.")
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="All attempts, from their first lines.")] = False,
) -> None:
    """Show how attempts at a task ended, and the end of what its last job has printed."""
    from hpcft.campaign.logs import logs_of
    from hpcft.campaign.records import read_records

    folder = CampaignFolder(directory.absolute())
    folder.read_identity()
    records = read_records(folder)
    current = records.current or records.stages[-1]
    if stage is not None and stage not in STAGES:
        raise UserError(f"there is no stage {stage}; the stages are {', '.join(STAGES)}")
    where = folder.stage(current.round if round_ is None else round_, stage or current.name)
    if not where.plan.exists():
        raise UserError(f"{where.path} has not begun, so there are no logs; see hpcft status {directory}")
    if task is None:
        failed = sorted(current.endings) if where == folder.stage(current.round, current.name) else []
        task = failed[0] if failed else 0
    attempts = logs_of(where, task)
    for attempt in attempts if whole else attempts[-1:]:
        on = f" on {attempt.node}" if attempt.node else ""
        typer.echo(f"== task {task}, attempt {attempt.attempt}, job {attempt.job_id or 'unknown'}{on}")
        if attempt.ending is not None:
            typer.echo(f"ended: {attempt.ending['cause']} {attempt.ending.get('detail', '')}".rstrip())
        if attempt.error is not None:
            typer.echo(attempt.error["traceback"].rstrip() or attempt.error["message"])
        for name, text in attempt.printed.items():
            lines = text.splitlines()
            typer.echo(
                f"-- {name}" + (f", the last {_TAIL} lines" if len(lines) > _TAIL and not whole else "")
            )
            typer.echo("\n".join(lines if whole else lines[-_TAIL:]))
    if len(attempts) > 1 and not whole:
        typer.echo(f"({len(attempts) - 1} earlier attempts: --all)")

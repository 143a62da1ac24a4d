"""The command `hpcft`: thin commands over the library, and the one place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys

import typer

from hpcft import __version__
from hpcft.cli import (
    archive,
    campaign,
    check,
    inspect,
    label,
    logs,
    md,
    mend,
    model,
    relax,
    site,
    store,
    train,
)
from hpcft.errors import CampaignStopped, LabelError, LeaseHeld, SchedulerUnavailable, UserError

app = typer.Typer(
    name="hpcft",
    help="Fine-tune universal interatomic potentials in iterated campaigns on Slurm clusters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done · 1 the campaign stopped, or labels failed · 2 bad input · 3 another manager is at work · "
    "4 Slurm does not answer · 130, 143 interrupted",
)
app.command("run")(campaign.run)
app.command("submit")(campaign.submit)
app.command("resume")(campaign.resume)
app.command("retry")(mend.retry)
app.command("rewind")(mend.rewind)
app.command("status")(campaign.status)
app.command("logs")(logs.logs)
app.command("cancel")(campaign.cancel)
app.command("report")(campaign.report)
app.command("inspect")(inspect.inspect)
app.command("label")(label.label)
app.command("md", cls=train.ManyFiles)(md.md)
app.command("relax")(relax.relax)
app.command("train", cls=train.ManyFiles)(train.train)
app.command("archive")(archive.archive)
app.command("verify")(archive.verify)
app.command("check")(check.check)
app.add_typer(model.app, name="model")
app.add_typer(site.app, name="site")
app.add_typer(store.app, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (CampaignStopped, 1),
    (UserError, 2),
    (LabelError, 2),
    (LeaseHeld, 3),
    (SchedulerUnavailable, 4),
)


def main() -> None:
    """Run the command line; errors of the user's are one message on stderr, without a traceback."""
    # Nobody else may write what we make: jobs load pickles from it, and a pickle is code.
    os.umask(os.umask(0o022) | 0o022)
    try:
        app()
    except tuple(kind for kind, _ in EXIT_CODES) as error:
        print(f"hpcft: {error}", file=sys.stderr)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A full disk, a folder without permission: the system's word and the file are all there is to say.
        print(f"hpcft: {error}. What is finished is kept; mend it and go on.", file=sys.stderr)
        sys.exit(1)

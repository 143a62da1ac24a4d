"""hpcft archive, verify: a campaign as one file, and whether a campaign or such a file is whole."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.campaign.verify import Verified


class Part(StrEnum):
    """What an archive can do without."""

    trajectories = "trajectories"


def archive(
    directory: Annotated[Path, typer.Argument(help="The campaign's folder.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: DIR.tar beside the folder.")
    ] = None,
    without: Annotated[
        Part | None, typer.Option(help="Leave this out (of a finished campaign): most of its bytes.")
    ] = None,
) -> None:
    """Make one portable file of a campaign, finished or not, with a checksum of everything in it."""
    from hpcft.campaign.archive import create_archive

    folder = CampaignFolder(directory.absolute())
    target = folder.root.resolve().with_name(f"{folder.root.resolve().name}.tar") if out is None else out
    with _busy(f"writing {target}"):
        done = create_archive(folder, target, without_trajectories=without is Part.trajectories)
    left_out = f", {len(done.left_out)} trajectories left out" if done.left_out else ""
    typer.echo(
        f"{_short(done.path)}: {done.num_files} files, {_size(done.num_bytes)}{left_out}. "
        f"To see whether a copy of it is whole: hpcft verify {_short(done.path)}"
    )


def verify(
    path: Annotated[
        Path, typer.Argument(help="A campaign's folder, or an archive of one.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Check that a campaign or an archive is whole: one line for each problem, exit code 1 if there is any."""
    if not path.exists():
        raise UserError(f"there is no {path}; name a campaign's folder or an archive")
    with _busy(f"reading {path}"):
        found = _verified(path)
    if as_json:
        problems = [vars(problem) for problem in found.problems]
        typer.echo(json.dumps({**vars(found), "path": str(path), "problems": problems}, indent=1))
    else:
        for problem in found.problems:
            typer.echo(f"{problem.file} {problem.text}")
        typer.echo(_summary(path, found))
    if found.problems:
        raise typer.Exit(1)


def _verified(path: Path) -> Verified:
    if path.is_dir():
        from hpcft.campaign.verify import verify_campaign

        return verify_campaign(CampaignFolder(path.absolute()))
    from hpcft.campaign.verify_archive import verify_archive

    return verify_archive(path)


def _summary(path: Path, found: Verified) -> str:
    count = len(found.problems)
    state = f"{count} problem{'s' * (count != 1)}" if count else "all is well"
    about = f"{found.num_files} files, {_size(found.num_bytes)}, {found.num_stages} finished stages"
    left_out = f", {found.num_left_out} trajectories left out when it was archived" * bool(found.num_left_out)
    return f"{path}: {state} ({about}{left_out})"


def _busy(what: str) -> AbstractContextManager[object]:
    """Shows on a terminal that something goes on; it may be hundreds of gigabytes."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"

"""What may stand at the names that a user gives: files and folders to write, models to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder

Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def check_writable(path: Path, force: bool, *inputs: Path) -> None:
    """UserError unless `path` can be written: an input never is (by whatever link), another file only with `force`."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir() or any(_is_same(path, other) for other in inputs):
        raise UserError(f"{path} is an input or a folder; give another name for what is written")
    if (path.exists() or path.is_symlink()) and not force:
        raise UserError(f"{path} is there already; give another name, or overwrite it with --force")


def check_run_folder(folder: Path) -> None:
    """UserError for what can be no folder of a run: a file, and the folder of a campaign, whose own files stand there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for what is written")
    if CampaignFolder(folder).identity.exists():
        raise UserError(f"{folder} belongs to a campaign; choose another folder for what is written")


def check_model_file(path: Path) -> None:
    """UserError if there is none."""
    if not path.is_file():
        raise UserError(f"there is no model file {path}")


def _is_same(path: Path, other: Path) -> bool:
    """Also of two that are not there yet."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()

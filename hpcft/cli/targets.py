"""Files that a command writes under a name that the user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcft.errors import UserError

Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def check_writable(path: Path, force: bool, *inputs: Path) -> None:
    """UserError unless `path` can be written: an input never is (by whatever link), another file only with `force`."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir() or any(_is_same(path, other) for other in inputs):
        raise UserError(f"{path} is an input or a folder; give another name for what is written")
    if (path.exists() or path.is_symlink()) and not force:
        raise UserError(f"{path} is there already; give another name, or overwrite it with --force")


def _is_same(path: Path, other: Path) -> bool:
    """Also of two that are not there yet."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()

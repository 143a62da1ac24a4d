"""Files that decide a reference's numbers: they enter the key of a label by their content, not by where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.labelling.dotted_path import nearest
from hpcft.labelling.settings import ESPRESSO, TEACHER

TERSOFF = "hpcft.labelling.classical.tersoff"
STILLINGER_WEBER = "hpcft.labelling.classical.stillinger_weber"

_PLACES = {TEACHER: "model", TERSOFF: "potential_file", ESPRESSO: "pseudo_dir"}
"""The argument that says where the files are."""


def files_of(calculator: str, arguments: Mapping[str, Any]) -> dict[str, Path]:
    """What the arguments name, by its role; UserError for a relative path, as jobs run in other folders."""
    place = _PLACES.get(calculator)
    where = None if place is None else (arguments.get("profile") or arguments).get(place)
    if where is None:
        return {}
    if not isinstance(where, str | Path):
        raise UserError(f"{place} of {calculator} is {where!r}; write an absolute path")
    path = Path(where).expanduser()
    if not path.is_absolute():
        raise UserError(
            f"{place} of {calculator} is the relative path {where}, and calculations run in folders of their own; write an "
            f"absolute one, such as {path.resolve()}"
        )
    if calculator == ESPRESSO:
        names = arguments.get("pseudopotentials", {})
        if not (isinstance(names, Mapping) and all(isinstance(name, str) for name in names.values())):
            raise UserError(f"pseudopotentials of {calculator} are {names!r}; write {{Si: Si.UPF, ...}}")
        return {symbol: path / name for symbol, name in names.items()}
    return {str(place): path}


def missing_files(calculator: str, arguments: Mapping[str, Any]) -> list[str]:
    """One sentence for each file that the arguments name and that is not there."""
    return [
        _is_missing(role, path)
        for role, path in files_of(calculator, arguments).items()
        if not path.is_file()
    ]


def contents_of(calculator: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file that the arguments name, by its role; UserError where one is missing."""
    if missing := missing_files(calculator, arguments):
        raise UserError("\n".join(missing))
    return {
        role: hashlib.sha256(path.read_bytes()).hexdigest()
        for role, path in files_of(calculator, arguments).items()
    }


def without_places(calculator: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without the folder or path from which the files are read."""
    place = _PLACES[calculator]
    kept = {key: value for key, value in arguments.items() if key != place}
    if isinstance(kept.get("profile"), Mapping):
        kept["profile"] = {key: value for key, value in kept["profile"].items() if key != place}
    return kept


def _is_missing(role: str, path: Path) -> str:
    there = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
    what = role if role in _PLACES.values() else f"pseudopotential of {role}"
    hint = nearest(path.name, there) if path.parent.is_dir() else f" There is no folder {path.parent}."
    return f"The {what}, {path}, does not exist.{hint}"

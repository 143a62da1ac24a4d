"""Files that decide a reference's numbers: they enter the key of a label by their content, not by where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.errors import MissingInput, UserError
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
    """What is wrong with each file that the arguments name and that is not there."""
    found = [_fault(role, path) for role, path in files_of(calculator, arguments).items()]
    return [fault for fault in found if fault is not None]


def contents_of(calculator: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file that the arguments name, by its role; MissingInput where one cannot be read."""
    if missing := missing_files(calculator, arguments):
        raise MissingInput("\n".join(missing))
    return {role: _sha256(role, path) for role, path in files_of(calculator, arguments).items()}


def without_places(calculator: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without the folder or path from which the files are read."""
    place = _PLACES[calculator]
    kept = {key: value for key, value in arguments.items() if key != place}
    if isinstance(kept.get("profile"), Mapping):
        kept["profile"] = {key: value for key, value in kept["profile"].items() if key != place}
    return kept


def _fault(role: str, path: Path) -> str | None:
    try:
        if path.is_file():
            return None
        there = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else None
    except OSError as error:
        return _is_unreadable(role, path, error)
    hint = f" There is no folder {path.parent}." if there is None else nearest(path.name, there)
    return f"The {_what(role)}, {path}, does not exist.{hint}"


def _sha256(role: str, path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MissingInput(_is_unreadable(role, path, error)) from error


def _is_unreadable(role: str, path: Path, error: OSError) -> str:
    return f"The {_what(role)}, {path}, cannot be read: {error.strerror}. Mend its file system or its permissions."


def _what(role: str) -> str:
    return role if role in _PLACES.values() else f"pseudopotential of {role}"

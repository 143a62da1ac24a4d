"""Importing what a user names by a dotted path, with errors that suggest the nearest name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from hpcft.errors import UserError


def resolve(dotted_path: str) -> Callable[..., Any]:
    """What a dotted path names: a class, a function, or a class's factory as in `...Tersoff.from_lammps`."""
    module, names = _import_longest(dotted_path)
    found: Any = module
    for position, name in enumerate(names):
        if not hasattr(found, name):
            where = ".".join([module.__name__, *names[:position]])
            raise UserError(
                f"{where} has no {name!r}, which {dotted_path!r} names.{nearest(name, _public_names(found))}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise UserError(
            f"{dotted_path!r} names a {type(found).__name__}, which cannot be called; name a class."
        )
    factory: Callable[..., Any] = found
    return factory


def _import_longest(dotted_path: str) -> tuple[Any, list[str]]:
    """The longest prefix that is a module, and the names that are left."""
    parts = dotted_path.split(".")
    module = _import(parts[0], dotted_path, None)
    for position in range(1, len(parts)):
        name = ".".join(parts[: position + 1])
        if not _is_module(name, module):
            return module, parts[position:]
        module = _import(name, dotted_path, module)
    return module, []


def _is_module(name: str, parent: Any) -> bool:
    return hasattr(parent, "__path__") and importlib.util.find_spec(name) is not None


def _import(name: str, dotted_path: str, parent: Any) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            hint = nearest(name, [] if parent is None else _public_names(parent))
            raise UserError(
                f"The module {name!r} of {dotted_path!r} is not installed.{hint} "
                "Install it into the environment of the jobs, or correct the path."
            ) from error
        raise UserError(
            f"Importing {name!r} for {dotted_path!r} failed: {type(error).__name__}: {error}."
        ) from error


def _public_names(owner: Any) -> list[str]:
    names = [name for name in dir(owner) if not name.startswith("_")]
    if hasattr(owner, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(owner.__path__)]
    return sorted(set(names))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint for the end of an error message, empty if no candidate is close."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[close[0]]!r}?" if close else ""

"""Arguments of a calculator as its class takes them: keywords checked, profiles made, forces and stress asked for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.labelling.contents import missing_files
from hpcft.labelling.dotted_path import nearest
from hpcft.labelling.settings import ESPRESSO, ORCA, VASP

_OF_ESPRESSO = {
    "profile",
    "input_data",
    "pseudopotentials",
    "kpts",
    "kspacing",
    "koffset",
    "crystal_coordinates",
    "additional_cards",
}


def prepared(
    path: str, factory: Callable[..., Any], arguments: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The arguments with which to call `factory`; UserError for a keyword that it does not take or would not look at."""
    ready = dict(arguments)
    if path == ESPRESSO:
        _check_espresso(ready)
    if _has_a_profile(factory):
        ready["profile"] = _profile(path, factory, ready.get("profile"))
    if path == ESPRESSO:
        ready["profile"].pseudo_dir = str(Path(ready["profile"].pseudo_dir).expanduser())
        # pw.x computes forces and stress only when told, and ASE does not tell it.
        ready["input_data"] = {**ready.get("input_data", {}), "tprnfor": True, "tstress": True}
    if works_in_a_directory(factory):
        ready["directory"] = str(directory)
    _check_keywords(path, factory, ready)
    return ready


def works_in_a_directory(factory: Callable[..., Any]) -> bool:
    """Whether this is one of ASE's calculators that start a program in a folder, for each calculation anew."""
    from ase.calculators.calculator import FileIOCalculator
    from ase.calculators.genericfileio import GenericFileIOCalculator

    if not isinstance(factory, type):
        return False
    is_vasp = factory.__module__.startswith("ase.calculators.vasp.")  # of neither family
    return is_vasp or issubclass(factory, FileIOCalculator | GenericFileIOCalculator)


def _has_a_profile(factory: Callable[..., Any]) -> bool:
    from ase.calculators.genericfileio import GenericFileIOCalculator

    return isinstance(factory, type) and issubclass(factory, GenericFileIOCalculator)


def _profile(path: str, factory: Callable[..., Any], wanted: Any) -> Any:
    """An object of the profile class that stands beside the calculator's, such as EspressoProfile."""
    from ase.calculators.calculator import BadConfiguration
    from ase.calculators.genericfileio import BaseProfile

    makers = [
        found
        for found in vars(sys.modules[factory.__module__]).values()
        if isinstance(found, type) and issubclass(found, BaseProfile) and found is not BaseProfile
    ]
    names = list(inspect.signature(makers[0]).parameters) if makers else []
    names = [name for name in names if name != "kwargs"]
    if not isinstance(wanted, Mapping):
        raise UserError(
            f"{path} needs profile: {{{', '.join(f'{name}: ...' for name in names)}}}, but got {wanted!r}."
        )
    for name in wanted:
        if name not in names:
            raise UserError(
                f"The profile of {path} takes no {name!r}.{nearest(name, names)} It takes {', '.join(names)}."
            )
    try:
        return makers[0](**wanted)
    except (TypeError, BadConfiguration) as error:
        raise UserError(f"The profile of {path} does not fit: {error}.") from error


def _check_espresso(arguments: Mapping[str, Any]) -> None:
    """ASE leaves out what it does not know of input_data without a word."""
    from ase.io.espresso_namelist.keys import ALL_KEYS

    sections = ALL_KEYS["pw"]
    known = {key.lower() for keys in sections.values() for key in keys}
    data = arguments.get("input_data", {})
    tables = [table for name, table in data.items() if isinstance(table, Mapping)]
    for name, value in data.items():
        if isinstance(value, Mapping) and name.lower() not in {section.lower() for section in sections}:
            raise UserError(
                f"pw.x has no namelist {name!r}.{nearest(name, sections)} It has {', '.join(sections)}."
            )
    for name in [
        key for table in (data, *tables) for key, value in table.items() if not isinstance(value, Mapping)
    ]:
        if name.split("(")[0].lower() not in known:
            raise UserError(
                f"input_data holds {name!r}, which pw.x does not know.{nearest(name, known)} Correct it."
            )
    for name in arguments:
        if name not in _OF_ESPRESSO:
            where = (
                "it belongs into input_data"
                if name.lower() in known
                else f"it takes {', '.join(sorted(_OF_ESPRESSO))}"
            )
            raise UserError(
                f"{ESPRESSO} takes no argument {name!r}.{nearest(name, _OF_ESPRESSO)} Correct it: {where}."
            )
    profile = arguments.get("profile")
    if not isinstance(profile, Mapping) or "pseudo_dir" not in profile:
        raise UserError(
            f"{ESPRESSO} is not told where its pseudopotentials are; write arguments.pseudo_dir with the short name espresso, "
            "or profile: {command: ..., pseudo_dir: ...} with the dotted path."
        )
    if missing := missing_files(ESPRESSO, arguments):
        raise UserError("\n".join(missing))


def _check_keywords(path: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    signature = inspect.signature(factory)
    accepted = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    takes_any = len(accepted) < len(signature.parameters)
    # ASE's calculators store an unknown keyword and never look at it: a misspelt setting would go unnoticed.
    known = _known_keywords(path, factory)
    if takes_any and known:
        accepted = [*dict.fromkeys([*accepted, *known, "restart", "label", "atoms", "directory"])]
        takes_any = False
    for name in arguments:
        if name not in accepted and not takes_any:
            raise UserError(
                f"{path} takes no argument {name!r}.{nearest(name, accepted)} {_choice(path, accepted)}"
            )
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"The arguments of {path} do not fit: {error}.") from error


def _choice(path: str, accepted: Sequence[str]) -> str:
    if path == VASP:  # hundreds
        return "Write a tag that ASE does not know yet as custom: {tag: value}."
    return f"It takes {', '.join(accepted) or 'no arguments'}."


def _known_keywords(path: str, factory: Callable[..., Any]) -> Iterable[str]:
    if path == ORCA:
        return ("charge", "mult", "orcasimpleinput", "orcablocks")
    if path == VASP:
        from ase.calculators.vasp.create_input import GenerateVaspInput

        # ASE hands what it does not know on to VASP, which may not look at it; `custom` is for tags newer than ASE.
        tables = [table for name, table in vars(GenerateVaspInput()).items() if name.endswith("_params")]
        return [name for table in tables for name in table]
    if works_in_a_directory(factory):
        return ()
    return getattr(factory, "default_parameters", None) or ()

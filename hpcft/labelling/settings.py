"""Arguments of a reference calculator as data: canonical form, merging, and options that are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcft.errors import UserError

ESPRESSO = "ase.calculators.espresso.Espresso"
TBLITE = "tblite.ase.TBLite"
GPAW = "gpaw.GPAW"
VASP = "ase.calculators.vasp.Vasp"
CP2K = "ase.calculators.cp2k.CP2K"
AIMS = "ase.calculators.aims.Aims"
ORCA = "ase.calculators.orca.ORCA"
TEACHER = "hpcft.labelling.teacher.mace"

_COUNTS_AS: Mapping[str, Mapping[str, Any]] = {
    TEACHER: {"device": None},
    GPAW: {"txt": None, "parallel": None},
    TBLITE: {"verbosity": 0},  # as gfn2-xtb has always had it, so that its labels keep their keys
}
"""Arguments that only say where a calculation runs or what it prints, and the value that all others count as; None: left out."""
# How many ranks ORCA starts: a block of its input, or a word of its first line.
_RANKS_OF_ORCA = {"orcablocks": r"\s*%pal\b.*?\bend\b", "orcasimpleinput": r"\s*(?<!\S)pal\d+(?!\S)"}

# Option -> value that makes a code return the energy of an unconverged calculation as if it were converged.
_ACCEPTS_UNCONVERGED = {
    "scf_must_converge": False,
    "ignore_convergence_failure": True,
    "fail_on_maxiter": False,
    "postprocess_anyway": True,
}
_FALSE = {"false", ".false.", "f", ".f.", "no", "off"}
_TRUE = {"true", ".true.", "t", ".t.", "yes", "on"}


def refuse_unconverged(path: str, arguments: Any) -> None:
    """UserError for settings, at any depth, that would pass unconverged or moved structures off as labels."""
    for key, value in _nested_items(arguments):
        refused = _ACCEPTS_UNCONVERGED.get(key.lower())
        if refused is not None and _as_bool(value) is refused:
            raise UserError(
                f"{key} = {value!r} makes {path} pass unconverged numbers off as converged; remove it. "
                "Structures that do not converge are recorded as failed, or tried again down the ladder."
            )
        if key.lower() == "calculation" and path == ESPRESSO and value != "scf":
            raise UserError(
                f"calculation = {value!r} is no single-point, and hpcft moves the atoms itself; write 'scf'."
            )
        if isinstance(value, str) and "IGNORE_CONVERGENCE_FAILURE" in value.upper():
            raise UserError(
                f"{key} of {path} has IGNORE_CONVERGENCE_FAILURE, which hides unconverged results; remove it."
            )
        if key == "maximum iterations":
            raise UserError(
                f"convergence: {{maximum iterations: {value}}} makes {path} take whatever is there after so many iterations "
                "for converged; write maxiter, which ends in a failure."
            )
        if path == VASP and (moves := _moves_atoms_of_vasp(key, value)):
            raise UserError(f"{moves} makes {path} move the atoms, and hpcft moves them itself; remove it.")


def _moves_atoms_of_vasp(key: str, value: Any) -> str:
    """Structures are told by what hpcft gave to the code, so it may not go elsewhere."""
    moves = (key.lower() == "nsw" and value != 0) or (key.lower() == "ibrion" and value != -1)
    return f"{key} = {value!r}" if moves else ""


def _nested_items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _nested_items(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _nested_items(inner)


def _as_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return True if value.lower() in _TRUE else False if value.lower() in _FALSE else None
    return bool(value) if isinstance(value, bool | np.bool_ | int) else None


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it, table by table."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = (
            merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def decisive(path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, equal where they differ only in what cannot change the numbers."""
    counts_as = {**_COUNTS_AS.get(path, {})}
    for name, ranks in _RANKS_OF_ORCA.items() if path == ORCA else ():
        text = arguments.get(name)
        if (
            isinstance(text, str)
            and (rest := re.sub(ranks, "", text, flags=re.IGNORECASE | re.DOTALL)) != text
        ):
            # No block at all is ASE's own, for one rank.
            counts_as[name] = rest.strip() or (None if name == "orcablocks" else "")
    left_out = {name for name, value in counts_as.items() if value is None}
    return {name: counts_as.get(name, value) for name, value in arguments.items() if name not in left_out}


def canonical(value: Any, where: str) -> Any:
    """Settings in their one JSON form; UserError for what is no setting.

    16 and 16.0, a tuple and a list, a NumPy scalar and a number, a path and its text are the same.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise UserError(f"{where} hold the number {value}; only finite numbers can be settings.")
        return int(value) if float(value).is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): canonical(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(inner, where) for inner in value]
    raise UserError(
        f"{where} hold a {type(value).__name__}; settings are numbers, text, true/false, lists and tables."
    )

"""Structures and results in files of other codes, and which of them are no labels, however sound they look.

ASE's readers take whatever energy stands in an output. A calculation whose self-consistent field did not converge has one
too, so the text itself is asked here: for VASP (vasprun.xml, OUTCAR) and Quantum ESPRESSO (pw.x). Other formats say nothing
about convergence, and what they hold counts as converged unless it is marked `converged: false`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from hpcft.errors import UserError
from hpcft.storage.structures import read_any

_UNCONVERGED = "its self-consistent field did not converge"
# The line with which ASE's reader ends an ionic step of an OUTCAR.
_OUTCAR_STEP = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM"
_OUTCAR_CONVERGED = "aborting loop because EDIFF is reached"
# Where ASE's reader of pw.x begins a structure, results or not.
_ESPRESSO_STRUCTURE = re.compile("^.*(?:Program PWSCF|ATOMIC_POSITIONS).*$", re.MULTILINE)
_ESPRESSO_ENERGY = "!    total energy"
_ESPRESSO_THRESHOLD = re.compile(r"convergence threshold\s*=\s*(\S+)")
_ESPRESSO_ACCURACY = re.compile(r"estimated scf accuracy\s*<\s*(\S+)")
_ESPRESSO_ROUNDING = 0.5e-8  # Ry: the last digit that it prints


@dataclass(frozen=True, eq=False)
class FoundFrame:
    """A structure as ASE reads it; `fault` says why it is no label, and is empty where nothing speaks against it."""

    atoms: Atoms
    fault: str = ""


def read_frames(path: Path) -> tuple[list[FoundFrame], bool]:
    """All structures of a file with results, and whether the file is the output of a code that is known here.

    UserError if it cannot be read, or if structures and what the output says about them do not fit together.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return [FoundFrame(atoms) for atoms in read_any(path)], False  # which says what is wrong
    reader = _READERS.get(_format_of(path))
    if reader is None:
        return [FoundFrame(atoms, _marked(atoms)) for atoms in read_any(path)], False
    try:
        return reader(path), True
    except UserError:
        raise
    except Exception as error:  # each of ASE's readers fails in its own way
        raise UserError(
            f"{path} cannot be read as the output of a calculation ({type(error).__name__}: {error}); is it complete?"
        ) from error


def _format_of(path: Path) -> str:
    try:
        return str(filetype(str(path)))
    except (UnknownFileTypeError, OSError, ValueError):
        return ""


def _marked(atoms: Atoms) -> str:
    """Some people note in extxyz or a database whether a calculation converged."""
    noted: Mapping[str, Any] = {**atoms.info.get("key_value_pairs", {}), **atoms.info}
    converged = noted.get("converged", True)
    says_no = str(converged).strip().lower() in ("false", "f", "0", "no")
    return "it is marked as not converged" if says_no else ""


def _matched(path: Path, structures: Sequence[Atoms], faults: Sequence[str]) -> list[FoundFrame]:
    if len(structures) != len(faults):
        raise UserError(
            f"{path} has {len(structures)} structures but {len(faults)} calculations, so which of them converged cannot be "
            "told; import them by another of the code's files, or as extxyz once you have checked them."
        )
    return [FoundFrame(atoms, fault) for atoms, fault in zip(structures, faults, strict=True)]


def _text(path: Path) -> str:
    """Unpacked where the file is compressed, as ASE does it."""
    with open_with_compression(str(path), "rb") as file:
        return bytes(file.read()).decode(errors="replace")


def _vasp_xml(path: Path) -> list[FoundFrame]:
    steps: list[Any] = []
    limit = 60  # VASP's own default
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            if event == "start" and element.tag == "calculation":
                steps.append(element)
            elif event == "end" and element.tag == "parameters":
                limit = next(
                    (int(i.text) for i in element.iter("i") if i.get("name") == "NELM" and i.text), 60
                )
    except (
        ElementTree.ParseError
    ):  # it was killed: the last step counts if it has come to its energy, as for ASE
        if steps and steps[-1].find("energy") is None:
            del steps[-1]
    if not steps:
        raise UserError(f"{path} holds no finished calculation; it ended before its first energy.")
    counts = [len(step.findall("scstep")) for step in steps]
    faults = [f"{_UNCONVERGED}: it took all {limit} steps (NELM)" * (count >= limit) for count in counts]
    return _matched(path, list(ase.io.read(path, ":", format="vasp-xml")), faults)


def _vasp_outcar(path: Path) -> list[FoundFrame]:
    parts = _text(path).split(_OUTCAR_STEP)[:-1]
    faults = ["" if _OUTCAR_CONVERGED in part else f"{_UNCONVERGED}: EDIFF was not reached" for part in parts]
    return _matched(path, list(ase.io.read(path, ":", format="vasp-out")), faults)


def _espresso(path: Path) -> list[FoundFrame]:
    text = _text(path)
    starts = [match.start() for match in _ESPRESSO_STRUCTURE.finditer(text)]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    threshold, faults = float("inf"), []
    for part in parts:
        if given := _ESPRESSO_THRESHOLD.search(part):
            threshold = float(given[1])
        faults.append(_espresso_fault(part, threshold))
    structures = ase.io.read(path, ":", format="espresso-out", results_required=False)
    frames = _matched(path, list(structures), faults)
    # pw.x prints the structure of a relaxation's end, and where it was about to go, without computing anything there.
    return [frame for frame, part in zip(frames, parts, strict=True) if "iteration #" in part]


def _espresso_fault(part: str, threshold: float) -> str:
    """`scf_must_converge = .false.` has pw.x say that convergence was achieved when its steps ran out: accuracy tells."""
    energies = part.count(_ESPRESSO_ENERGY)
    if energies == 0 or "convergence has been achieved" not in part:
        return _UNCONVERGED if "convergence NOT achieved" in part else "it broke off before it had converged"
    if energies > 1:
        return (
            f"it has {energies} total energies, as with hybrid functionals, and ASE reads the first of them"
        )
    accuracy = float(_ESPRESSO_ACCURACY.findall(part)[-1])
    if accuracy > threshold + _ESPRESSO_ROUNDING:
        return f"{_UNCONVERGED}: estimated accuracy {accuracy:g} Ry, threshold {threshold:g} Ry"
    return ""


_READERS: Mapping[str, Callable[[Path], list[FoundFrame]]] = {
    "vasp-xml": _vasp_xml,
    "vasp-out": _vasp_outcar,
    "espresso-out": _espresso,
}

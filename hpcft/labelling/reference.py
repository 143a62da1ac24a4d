"""A reference calculator as the user names it, by dotted path and keyword arguments, and checked."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from hpcft.config.reference import DATA_SET_VARIABLES
from hpcft.config.reference import Reference as ReferenceConfig
from hpcft.errors import LabelError, UserError
from hpcft.labelling.arguments import prepared
from hpcft.labelling.causes import CAUSES_OF_THE_MACHINE, label_error
from hpcft.labelling.classical import elements_of_stillinger_weber, elements_of_tersoff
from hpcft.labelling.contents import STILLINGER_WEBER, TERSOFF, contents_of, without_places
from hpcft.labelling.dotted_path import resolve
from hpcft.labelling.presets import MPI, PRESETS, Preset
from hpcft.labelling.settings import (
    CP2K,
    ESPRESSO,
    GPAW,
    ORCA,
    TBLITE,
    TEACHER,
    canonical,
    decisive,
    merged,
    refuse_unconverged,
)

# hpcft gives each calculation a new folder and a new start, so that no label depends on the one before.
_NOT_FOR_USERS = {"directory", "restart", "atoms"}
# How a file that the user has misspelt, or that is of another kind, shows; any other OSError is the machine's.
_WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, None}


@dataclass(frozen=True)
class Reference:
    """A calculator by its dotted path, its keyword arguments, what a label holds, and what bounds one calculation.

    `elements` are the chemical symbols that it can do, for calculators that accept any element silently.
    `time_limit_s` is for one reference calculation: a relaxation may take it anew in every step. `ladder`
    holds arguments to merge over `arguments`, one after the other, when the self-consistent field does not
    converge; every rung must stand for the same physics, because the key of a label does not depend on it.
    `properties` are asked for beside energy, forces and stress. `energy`: the one from which the forces derive, or
    that extrapolated to zero smearing. `memory_limit_GB` bounds one calculation with all its processes. `contents`
    holds the SHA-256 of files that the arguments name, by their role.
    """

    calculator: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    elements: tuple[str, ...] | None = None
    time_limit_s: float = 3600.0
    ladder: tuple[Mapping[str, Any], ...] = ()
    properties: tuple[str, ...] = ()
    energy: Literal["free", "extrapolated"] = "free"
    environment: Mapping[str, str] = field(default_factory=dict)
    memory_limit_GB: float | None = None
    contents: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "." not in self.calculator:
            raise UserError(
                f"The reference calculator {self.calculator!r} is no dotted path; "
                "write its module too, for example 'ase.calculators.emt.EMT'."
            )
        if not (math.isfinite(self.time_limit_s) and self.time_limit_s > 0):
            raise UserError(
                f"The time limit of {self.calculator} is {self.time_limit_s} s; give a positive number."
            )
        for symbol in self.elements or ():
            if symbol not in atomic_numbers:
                raise UserError(
                    f"{symbol!r} among the elements of {self.calculator} is no chemical symbol; "
                    "write 'Si', not 'silicon'."
                )
        for name in _NOT_FOR_USERS.intersection(self.arguments):
            raise UserError(
                f"hpcft sets {name!r} of {self.calculator} for each calculation itself; remove it."
            )
        for rung in self.rungs():
            canonical(rung, f"the arguments of {self.calculator}")
            refuse_unconverged(self.calculator, rung)

    def fingerprint(self) -> str:
        """SHA-256 of the settings that decide the numbers.

        These are not the time limit, the ladder, the elements, the launch command, or what `decisive` leaves out.
        Files that the arguments name (potentials, pseudopotentials, models) enter by their content where `contents`
        has them, else by name. Of the environment only what names data sets enters, as it stands.
        """
        arguments = without_places(self.calculator, self.arguments) if self.contents else dict(self.arguments)
        arguments = decisive(self.calculator, arguments)
        if isinstance(arguments.get("profile"), Mapping):
            arguments["profile"] = {
                key: value for key, value in arguments["profile"].items() if key != "command"
            }
        arguments.pop("command", None)
        settings: dict[str, Any] = {
            "calculator": self.calculator,
            "arguments": canonical(arguments, self.calculator),
        }
        if self.contents:
            settings["contents"] = dict(self.contents)
        # Only where they differ from the default, so that labels of before keep their keys.
        if self.properties:
            settings["properties"] = sorted(self.properties)
        if self.energy != "free":
            settings["energy"] = self.energy
        if data_sets := {
            name: self.environment[name] for name in DATA_SET_VARIABLES & self.environment.keys()
        }:
            settings["data_sets"] = data_sets
        return hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def provenance(self) -> dict[str, str]:
        """What a file of its labels says of it."""
        return {"reference": self.calculator, "reference_fingerprint": self.fingerprint()}

    def rungs(self) -> Iterator[Mapping[str, Any]]:
        """The arguments of the first try, then those of each rung of the ladder."""
        yield self.arguments
        for changes in self.ladder:
            yield merged(self.arguments, changes)

    def at_rung(self, arguments: Mapping[str, Any]) -> Reference:
        """This reference with the arguments of one rung, and no further ladder."""
        return replace(self, arguments=arguments, ladder=())


def reference_from(config: ReferenceConfig, mpi: str = "") -> Reference:
    """The reference that a user's settings describe: a short name spelt out, and `mpi` for {mpi} in its command.

    UserError for a file that a short name's arguments name and that is not there, as its content enters the labels' keys.
    """
    preset = PRESETS.get(config.calculator) or Preset(config.calculator)
    arguments = spelt_out(config, mpi)
    is_short = config.calculator in PRESETS
    return Reference(
        preset.calculator,
        arguments,
        config.elements,
        config.time_limit_s,
        preset.ladder if config.ladder is None else tuple(preset.read(rung) for rung in config.ladder),
        tuple(config.properties),
        config.energy,
        dict(config.environment),
        config.memory_limit_GB,
        # A dotted path's files enter by name, as they always have: its labels keep their keys.
        contents_of(preset.calculator, arguments) if is_short else {},
    )


def spelt_out(config: ReferenceConfig, mpi: str = "") -> dict[str, Any]:
    """The arguments of the calculator's class: the user's over the short name's, with the command."""
    preset = PRESETS.get(config.calculator)
    if preset is None or preset.command is None:
        if config.command is not None:
            programs = ", ".join(name for name, known in PRESETS.items() if known.command is not None)
            where = (
                "it runs inside Python" if preset else "write its command where it stands in its arguments"
            )
            raise UserError(f"reference.command is for {programs}; {config.calculator} takes none: {where}")
        preset = preset or Preset(config.calculator)
    beneath = preset.arguments
    for name in config.properties:
        beneath = merged(beneath, preset.for_properties.get(name, {}))
    arguments = preset.completed(merged(beneath, preset.read(config.arguments)))
    if preset.command is None:
        return dict(arguments)
    template = preset.command if config.command is None else config.command
    words_of_command(template.replace(MPI, ""))
    command = template.replace(MPI, mpi).strip()
    return dict(preset.with_command(arguments, command))


def words_of_command(command: str) -> list[str]:
    """The program that a command starts, and what follows it; UserError if a shell could not read it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(
            f"The command {command!r} of the reference cannot be read: {error}; correct it."
        ) from error
    if not words:
        raise UserError(f"The command of the reference names no program; write one, as in '{MPI} pw.x'.")
    return words


def build_calculator(reference: Reference, directory: Path) -> Any:
    """A new ASE calculator that works in `directory`; UserError if the path or the arguments do not fit, LabelError if
    the machine cannot start its program or read its files.
    """
    factory = resolve(reference.calculator)
    arguments = prepared(reference.calculator, factory, reference.arguments, directory)
    # CP2K's program is started at once, and reads and writes where it was started; GPAW opens its output.
    at_once = reference.calculator in (CP2K, GPAW)
    place = contextlib.chdir(directory) if at_once else contextlib.nullcontext()
    try:
        with place:
            return factory(**arguments)
    except UserError:
        raise
    except Exception as error:  # each code has its own way to reject its arguments
        if cause := _cause_of_the_machine(error):
            command = reference.arguments.get("command")
            how = f" by its command {command!r}" if command else ""
            raise LabelError(
                cause, f"{reference.calculator} did not start{how} ({type(error).__name__}: {error})"
            ) from error
        raise UserError(
            f"{reference.calculator} did not accept its arguments: {type(error).__name__}: {error}. "
            f"Given were {', '.join(sorted(reference.arguments)) or 'none'}; correct them."
        ) from error


def _cause_of_the_machine(error: Exception) -> str | None:
    """Why a calculator whose arguments may be sound could not be made, or None."""
    cause = label_error(error, None).cause
    if cause in CAUSES_OF_THE_MACHINE:
        return cause
    is_unreadable = isinstance(error, OSError) and error.errno not in _WRONG_PATH
    return "missing-binary" if is_unreadable else None


def check_arguments(reference: Reference) -> None:
    """UserError if the calculator cannot be built as it stands; starts no program."""
    if reference.calculator == CP2K:
        prepared(CP2K, resolve(CP2K), reference.arguments, Path())
        return
    if reference.calculator == GPAW:  # which greets
        reference = reference.at_rung({**reference.arguments, "txt": None})
    build_calculator(reference, Path(os.devnull).parent)


def unknown_elements(reference: Reference, numbers: Iterable[int]) -> list[str]:
    """Symbols among atomic `numbers` that the reference cannot do; empty also where that is unknown."""
    known = _known_elements(reference)
    if known is None:
        return []
    return [
        chemical_symbols[number]
        for number in sorted({int(number) for number in numbers})
        if chemical_symbols[number] not in known
    ]


def unsuitable(reference: Reference, atoms: Atoms) -> str | None:
    """Why the reference cannot do a structure that it would take for another one, or None."""
    if unknown := unknown_elements(reference, atoms.numbers):
        return f"{reference.calculator} cannot do {', '.join(unknown)}"
    if reference.calculator == ORCA and atoms.pbc.any():
        return "ORCA knows only molecules, and the structure is periodic"
    return None


def _known_elements(reference: Reference) -> set[str] | None:
    path, arguments = reference.calculator, reference.arguments
    if reference.elements is not None:
        return set(reference.elements)
    if path == "ase.calculators.emt.EMT":
        from ase.calculators.emt import parameters

        return set(parameters)
    if path == ESPRESSO:
        return set(arguments.get("pseudopotentials", {}))
    if path == "ase.calculators.tersoff.Tersoff.from_lammps":
        return elements_of_tersoff(potential_file=arguments["potential_file"])
    if path == TERSOFF:
        return elements_of_tersoff(**arguments)
    if path == STILLINGER_WEBER:
        return elements_of_stillinger_weber(**arguments)
    if path == TEACHER:
        from hpcft.labelling.teacher import (
            elements_of_teacher,
        )  # torch, and only where a model is the reference

        return elements_of_teacher(**arguments)
    if path == TBLITE:
        return set(chemical_symbols[1:87])
    return None

"""A reference calculator as the user names it, by dotted path and keyword arguments, and checked."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ase.data import atomic_numbers, chemical_symbols

from hpcft.config.reference import Reference as ReferenceConfig
from hpcft.errors import UserError
from hpcft.labelling.dotted_path import nearest, resolve
from hpcft.labelling.presets import MPI, PRESETS, Preset
from hpcft.labelling.settings import ESPRESSO, canonical, merged, refuse_unconverged

# hpcft gives each calculation a new folder and a new start, so that no label depends on the one before.
_NOT_FOR_USERS = {"directory", "restart", "atoms"}


@dataclass(frozen=True)
class Reference:
    """A calculator by its dotted path, its keyword arguments, what a label holds, and what bounds one calculation.

    `elements` are the chemical symbols that it can do, for calculators that accept any element silently.
    `time_limit_s` is for one reference calculation: a relaxation may take it anew in every step. `ladder`
    holds arguments to merge over `arguments`, one after the other, when the self-consistent field does not
    converge; every rung must stand for the same physics, because the key of a label does not depend on it.
    `properties` are asked for beside energy, forces and stress. `energy`: the one from which the forces derive, or
    that extrapolated to zero smearing. `memory_limit_GB` bounds one calculation with all its processes.
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

        These are not the time limit, the ladder, the elements or the launch command. Files that the arguments
        name (potentials, pseudopotentials) enter by name, not by content.
        """
        arguments = dict(self.arguments)
        if isinstance(arguments.get("profile"), Mapping):
            arguments["profile"] = {
                key: value for key, value in arguments["profile"].items() if key != "command"
            }
        arguments.pop("command", None)
        settings: dict[str, Any] = {
            "calculator": self.calculator,
            "arguments": canonical(arguments, self.calculator),
        }
        # Only where they differ from the default, so that labels of before keep their keys.
        if self.properties:
            settings["properties"] = sorted(self.properties)
        if self.energy != "free":
            settings["energy"] = self.energy
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
    """The reference that a user's settings describe: a short name spelt out, and `mpi` for {mpi} in its command."""
    preset = PRESETS.get(config.calculator)
    if preset is None:
        if config.command is not None:
            raise UserError(
                f"reference.command is for short names ({', '.join(PRESETS)}); write the command of {config.calculator} "
                "where it stands in its arguments"
            )
        preset = Preset(config.calculator)
    arguments = merged(preset.arguments, config.arguments)
    command = config.command or preset.command
    if command is not None:
        arguments = dict(preset.with_command(arguments, command.replace(MPI, mpi).strip()))
    return Reference(
        preset.calculator,
        arguments,
        config.elements,
        config.time_limit_s,
        preset.ladder if config.ladder is None else config.ladder,
        tuple(config.properties),
        config.energy,
        dict(config.environment),
        config.memory_limit_GB,
    )


def build_calculator(reference: Reference, directory: Path) -> Any:
    """A new ASE calculator that works in `directory`; UserError if the path or the arguments do not fit."""
    factory = resolve(reference.calculator)
    arguments = dict(reference.arguments)
    if reference.calculator == ESPRESSO:
        arguments = _espresso_arguments(arguments)
    if _works_in_a_directory(factory):
        arguments["directory"] = str(directory)
    _check_arguments(reference.calculator, factory, arguments)
    try:
        return factory(**arguments)
    except Exception as error:  # each code has its own way to reject its arguments
        raise UserError(
            f"{reference.calculator} did not accept its arguments: {type(error).__name__}: {error}. "
            f"Given were {', '.join(sorted(reference.arguments)) or 'none'}; correct them."
        ) from error


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


def _known_elements(reference: Reference) -> set[str] | None:
    if reference.elements is not None:
        return set(reference.elements)
    if reference.calculator == "ase.calculators.emt.EMT":
        from ase.calculators.emt import parameters

        return set(parameters)
    if reference.calculator == ESPRESSO:
        return set(reference.arguments.get("pseudopotentials", {}))
    if reference.calculator == "ase.calculators.tersoff.Tersoff.from_lammps":
        from ase.calculators.tersoff import Tersoff

        triples = Tersoff.read_lammps_format(reference.arguments["potential_file"])
        return {symbol for triple in triples for symbol in triple}
    return None


def _works_in_a_directory(factory: Callable[..., Any]) -> bool:
    from ase.calculators.calculator import FileIOCalculator
    from ase.calculators.genericfileio import GenericFileIOCalculator

    return isinstance(factory, type) and issubclass(factory, FileIOCalculator | GenericFileIOCalculator)


def _check_arguments(path: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    signature = inspect.signature(factory)
    accepted = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    takes_any = len(accepted) < len(signature.parameters)
    # ASE's calculators store an unknown keyword and never look at it: a misspelt setting would go unnoticed.
    defaults = getattr(factory, "default_parameters", None)
    if takes_any and defaults and not _works_in_a_directory(factory):
        accepted += [*defaults, "restart", "label", "atoms", "directory"]
        takes_any = False
    for name in arguments:
        if name not in accepted and not takes_any:
            raise UserError(
                f"{path} takes no argument {name!r}.{nearest(name, accepted)} "
                f"It takes {', '.join(accepted) or 'no arguments'}."
            )
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"The arguments of {path} do not fit: {error}.") from error


def _espresso_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    from ase.calculators.espresso import EspressoProfile

    profile = arguments.get("profile")
    if not isinstance(profile, Mapping) or set(profile) != {"command", "pseudo_dir"}:
        raise UserError(
            f"{ESPRESSO} needs profile: {{command: ..., pseudo_dir: ...}} and nothing else there, "
            f"but got {profile!r}."
        )
    folder = Path(profile["pseudo_dir"]).expanduser().resolve()
    for symbol, name in arguments.get("pseudopotentials", {}).items():
        if not (folder / name).is_file():
            there = [path.name for path in folder.glob("*")] if folder.is_dir() else []
            raise UserError(
                f"The pseudopotential of {symbol}, {folder / name}, does not exist.{nearest(name, there)}"
            )
    # pw.x computes forces and stress only when told, and ASE does not tell it.
    return {
        **arguments,
        "profile": EspressoProfile(profile["command"], folder),
        "tprnfor": True,
        "tstress": True,
    }

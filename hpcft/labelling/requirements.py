"""What a reference needs of a machine before it can give a label, and which of it is not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from hpcft.config.reference import Reference as ReferenceConfig
from hpcft.errors import LabelError, UserError
from hpcft.labelling.dotted_path import resolve
from hpcft.labelling.presets import MPI, PRESETS
from hpcft.labelling.reference import (
    Reference,
    check_arguments,
    reference_from,
    spelt_out,
    unknown_elements,
    words_of_command,
)
from hpcft.labelling.settings import AIMS, GPAW, VASP

_MIN_SCRATCH_BYTES = 500_000_000
"""A plane-wave code's failed run on few atoms leaves 22 MB, and several run side by side."""

Which = Callable[[str], str | None]


@dataclass(frozen=True)
class Lack:
    """One thing that is missing or wrong; `key` is the key of `reference` that is to blame."""

    key: str
    what: str
    accepted: str = ""
    may_come_later: bool = False
    """Whether a module that the jobs load may bring it."""


def lacks(
    config: ReferenceConfig,
    symbols: Collection[str],
    mpi: str = "",
    which: Which = shutil.which,
    *,
    needs_mpi: bool = True,
) -> list[Lack]:
    """Everything that stands in the way of labels for structures of the elements `symbols`, on this machine.

    `mpi` is what {mpi} in the command stands for; `needs_mpi` says that a program started without it has not what it needs.
    Nothing is started.
    """
    with _environment(config.environment):
        return list(_lacks(config, symbols, mpi, which, needs_mpi))


def _lacks(
    config: ReferenceConfig, symbols: Collection[str], mpi: str, which: Which, needs_mpi: bool
) -> Iterator[Lack]:
    path = PRESETS[config.calculator].calculator if config.calculator in PRESETS else config.calculator
    try:
        resolve(path)
    except UserError as mistake:
        yield Lack("calculator", str(mistake), _how_to_install(config.calculator))
        return
    try:
        arguments = spelt_out(config, mpi)
        command = _command_in(arguments)
        words = [] if command is None else words_of_command(command)
    except UserError as mistake:
        is_in_arguments = config.calculator not in PRESETS and config.command is None
        yield Lack("arguments" if is_in_arguments else "command", str(mistake))
        return
    yield from _programs(config, words, mpi if needs_mpi else "", which)
    try:
        reference = reference_from(config, mpi)
        check_arguments(reference)
        unknown = unknown_elements(reference, [atomic_numbers[symbol] for symbol in symbols])
    except (UserError, LabelError) as mistake:
        yield Lack("arguments", str(mistake))
        return
    if unknown:
        key = "elements" if config.elements is not None else "arguments"
        what = f"{config.calculator} has nothing for {', '.join(unknown)}, which the structures contain"
        yield Lack(key, what, "pseudopotentials, parameters or a model for each element")
    yield from missing_data_sets(reference, [symbol for symbol in symbols if symbol not in unknown])


def scratch_lacks() -> Iterator[str]:
    """Why calculations could not write where they run, in the folder of $TMPDIR; of this machine only."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        yield f"no folder for scratch files can be written to: {error.strerror}; set TMPDIR to one on a local disk"
        return
    wanted = os.environ.get("TMPDIR")
    if wanted and Path(wanted).absolute() != Path(folder).absolute():
        yield f"TMPDIR is {wanted}, which is no folder that you can write to; calculations would run in {folder}"
    free = shutil.disk_usage(folder).free
    if free < _MIN_SCRATCH_BYTES:
        yield f"{folder}, where calculations run (TMPDIR), has only {free / 1e6:.0f} MB free"


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """That of a calculation: codes look for their files where variables say."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _how_to_install(name: str) -> str:
    extras = {"gfn2-xtb": "xtb", "gpaw": "gpaw"}
    return f"pip install 'hpcft[{extras[name]}]' into the environment of the jobs" if name in extras else ""


def _command_in(arguments: Mapping[str, Any]) -> str | None:
    """What starts the code, wherever its calculator wants to be told."""
    profile = arguments.get("profile")
    command = profile.get("command") if isinstance(profile, Mapping) else arguments.get("command")
    return command if isinstance(command, str) else None


def _programs(config: ReferenceConfig, words: list[str], mpi: str, which: Which) -> Iterator[Lack]:
    """Programs that the words of a command name and that are not there, and a launcher that it leaves out."""
    if not words:
        return
    preset = PRESETS.get(config.calculator)
    template = (preset.command if preset else None) or ""
    own = template.replace(MPI, "").split()[:1]
    key = "command" if preset else "arguments"
    for program in _programs_of(words, own):
        if which(program) is None:
            is_path = "/" in program
            where = "there" if is_path else f"in PATH, {os.environ.get('PATH', '')}"
            what = f"starts {program}, and there is no such program {where}"
            yield Lack(
                key, what, "the path of a program, or lines of the site's setup that bring it", not is_path
            )
    ranks_are_lost = mpi and config.command is not None and MPI in template and MPI not in config.command
    if ranks_are_lost and Path(words[0]).name == own[0]:
        what = f"has no {MPI}, so it runs without the site's MPI launcher"
        yield Lack("command", what, f"{MPI} {config.command}", may_come_later=True)


def _programs_of(words: list[str], own: Collection[str]) -> list[str]:
    """What a command starts: its first word, and what is recognisable as a program among its arguments."""
    first, *others = words
    found = [first]
    for word in others:
        name = Path(word).name
        if name in own or name.endswith(".x") or (word.startswith("/") and os.access(word, os.X_OK)):
            found.append(word)
    return list(dict.fromkeys(found))


def missing_data_sets(reference: Reference, symbols: Collection[str]) -> list[Lack]:
    """What is not there of the files per element that some codes look up by themselves."""
    look = {GPAW: _gpaw, VASP: _vasp, AIMS: _aims}.get(reference.calculator)
    if look is None:
        return []
    with _environment(reference.environment):
        return [missing for symbol in symbols if (missing := look(reference, symbol))]


def _gpaw(reference: Reference, symbol: str) -> Lack | None:
    from gpaw.setup_data import search_for_file
    from gpaw.xc import XC

    if reference.arguments.get("setups"):
        return None  # others than the usual ones, found where the user says
    functional = XC(reference.arguments.get("xc", "LDA")).get_setup_name()
    try:
        search_for_file(f"{symbol}.{functional}")
    except FileNotFoundError as error:
        return Lack("arguments", f"GPAW has no PAW data set for {symbol}: {' '.join(str(error).split())}")
    return None


def _vasp(reference: Reference, symbol: str) -> Lack | None:
    from ase import Atoms

    if "VASP_PP_PATH" not in os.environ:
        what = "VASP finds no POTCAR: VASP_PP_PATH is not set"
        return Lack("environment", what, "the folder that holds potpaw_PBE", may_come_later=True)
    calculator = resolve(VASP)(
        **{key: value for key, value in reference.arguments.items() if key != "command"}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ASE tells that it has read the variable
            calculator.initialize(Atoms(symbol))
    except Exception as error:  # RuntimeError, or a plain Exception for a setup it cannot read
        return Lack("arguments", f"VASP has no POTCAR for {symbol}: {' '.join(str(error).split())}")
    return None


def _aims(reference: Reference, symbol: str) -> Lack | None:
    profile = reference.arguments.get("profile", {})
    folder = reference.arguments.get("species_dir") or profile.get("default_species_directory")
    folder = folder or os.environ.get("AIMS_SPECIES_DIR")
    if folder is None:
        what = "FHI-aims is not told where its species are"
        return Lack("arguments", what, "species_dir: /path/to/species_defaults/...", may_come_later=True)
    file = Path(folder) / f"{atomic_numbers[symbol]:02}_{symbol}_default"
    if file.is_file():
        return None
    return Lack("arguments", f"FHI-aims has no species file for {symbol}: {file} does not exist")

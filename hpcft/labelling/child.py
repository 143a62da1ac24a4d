"""The forked process in which a reference calculator runs: one item after the other, until one fails."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from ase import Atoms

from hpcft.errors import LabelError, MissingInput, UserError
from hpcft.labelling.causes import Failure, Try, label_error
from hpcft.labelling.item import Item, plain_structure
from hpcft.labelling.label import Label, Relaxation, compute_label, relax
from hpcft.labelling.reference import Reference, build_calculator, unsuitable

Result = Label | Relaxation | Failure

_SAME_PLACE = 1e-9  # Å


@dataclass(frozen=True, eq=False)
class Frame:
    """A structure on the way of a relaxation, and its label."""

    atoms: Atoms
    label: Label
    found: bool = False
    """Whether it is known from the way of another relaxation, and this one has yet to come by it."""

    def on_this_way(self) -> Frame:
        """The same once it has."""
        return replace(self, found=False)


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of an item, on which rung of the ladder, and the tries that failed."""

    result: Result
    rung: int = 0
    tries: tuple[Try, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """The reference itself is wrong, so that no item can be computed."""

    message: str
    is_away: bool = False
    """Only a file is missing, which another node may see."""

    @classmethod
    def of(cls, error: UserError) -> Refusal:
        return cls(str(error), isinstance(error, MissingInput))

    @property
    def error(self) -> UserError:
        """The error that it was made of."""
        return MissingInput(self.message) if self.is_away else UserError(self.message)


def become_child(output: int) -> None:
    """Undo what the supervisor set up for itself; print into `output`, read from nowhere."""
    signal.set_wakeup_fd(-1)
    polite = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in (signal.SIGCHLD, *polite):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(null)
    os.close(output)


def serve(connection: Connection, reference: Reference) -> None:
    """Answer (item, known frames, directory) with an Answer or a Refusal, after a Frame for each calculation of a
    relaxation, or for a found one that takes its place, and a None for each try that failed before.
    """
    home = Path.cwd()
    while True:
        try:
            item, known, directory = connection.recv()
        except EOFError:
            return
        message = _compute(item, known, reference, directory, connection)
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir(home)
        connection.send(message)


def _compute(
    item: Item, known: Sequence[Frame], reference: Reference, directory: Path, connection: Connection
) -> Answer | Refusal:
    """The result on the first rung of the ladder that converges, and how those before it ended."""
    tries: list[Try] = []
    frames = list(known)
    for rung, arguments in enumerate(reference.rungs()):
        if rung > 0:
            connection.send(None)
        start = time.monotonic()
        attempt_directory = directory / f"rung-{rung}"
        try:
            attempt_directory.mkdir()
            result = _compute_once(item, frames, reference.at_rung(arguments), attempt_directory, connection)
            return Answer(result, rung, tuple(tries))
        except LabelError as error:
            if error.__cause__ is not None:
                traceback.print_exc()
            failure = Failure(error.cause, str(error))
        except UserError as error:
            return Refusal.of(error)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            known_as = label_error(error, attempt_directory)
            failure = Failure(known_as.cause, str(known_as))
        tries.append(Try(rung, failure.cause, failure.message, time.monotonic() - start))
        if failure.cause != "scf":
            break
    return Answer(failure, rung, tuple(tries))


def _compute_once(
    item: Item,
    known: list[Frame],
    reference: Reference,
    directory: Path,
    connection: Connection,
) -> Label | Relaxation:
    calculator = build_calculator(reference, directory)
    if why := unsuitable(reference, item.atoms):
        raise LabelError("bad-input", why)
    os.chdir(directory)  # for codes that write wherever they stand; the build may have read relative paths

    def label_of(atoms: Atoms) -> Label:
        return compute_label(atoms, calculator, properties=reference.properties, energy=reference.energy)

    def frame_of(atoms: Atoms) -> Label:
        there = next((frame for frame in known if _is_there(frame.atoms, atoms)), None)
        if there is not None and not there.found:
            return there.label
        frame = there or Frame(plain_structure(atoms), label_of(atoms))
        known.insert(0, frame.on_this_way())
        connection.send(frame)
        return frame.label

    if item.kind == "single-point":
        return label_of(item.atoms)
    assert item.fmax is not None and item.max_steps is not None
    relaxation = relax(item.atoms, frame_of, item.fmax, item.max_steps, with_cell=item.with_cell)
    if not relaxation.converged:
        raise LabelError(
            "unconverged",
            f"after {relaxation.num_steps} steps a force of {relaxation.max_force:.4g} eV/Å is left, "
            f"above {item.fmax:g} eV/Å",
        )
    return relaxation


def _is_there(one: Atoms, other: Atoms) -> bool:
    """Whether atoms and cell are in the same place, but for what the linear algebra of another processor rounds otherwise."""
    return bool(
        np.abs(one.positions - other.positions).max() < _SAME_PLACE
        and np.abs(one.cell.array - other.cell.array).max() < _SAME_PLACE
    )

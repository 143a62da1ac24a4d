"""The forked process in which a reference calculator runs: one item after the other, until one fails."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from hpcft.errors import LabelError, UserError
from hpcft.labelling.causes import Failure, label_error
from hpcft.labelling.item import Item
from hpcft.labelling.label import Label, Relaxation, compute_label, relax
from hpcft.labelling.reference import Reference, build_calculator, unknown_elements

Result = Label | Relaxation | Failure


@dataclass(frozen=True)
class Refusal:
    """The reference itself is wrong, so that no item can be computed."""

    message: str


def become_child(output: int) -> None:
    """Undo what the supervisor set up for itself; print into `output`, read from nowhere."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(null)
    os.close(output)


def serve(connection: Connection, reference: Reference) -> None:
    """Answer (item, directory) with (result, rung) or a Refusal, after a None for each calculation before."""
    home = Path.cwd()
    while True:
        try:
            item, directory = connection.recv()
        except EOFError:
            return
        message = _compute(item, reference, directory, connection)
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir(home)
        connection.send(message)


def _compute(
    item: Item, reference: Reference, directory: Path, connection: Connection
) -> tuple[Result, int] | Refusal:
    """The result on the first rung of the ladder that converges, and the number of that rung."""
    for rung, arguments in enumerate(reference.rungs()):
        if rung > 0:
            connection.send(None)
        attempt_directory = directory / f"rung-{rung}"
        attempt_directory.mkdir()
        try:
            return _compute_once(item, reference.at_rung(arguments), attempt_directory, connection), rung
        except LabelError as error:
            if error.__cause__ is not None:
                traceback.print_exc()
            failure = Failure(error.cause, str(error))
        except UserError as error:
            return Refusal(str(error))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            known = label_error(error, attempt_directory)
            failure = Failure(known.cause, str(known))
        if failure.cause != "scf":
            break
    return failure, rung


def _compute_once(
    item: Item, reference: Reference, directory: Path, connection: Connection
) -> Label | Relaxation:
    calculator = build_calculator(reference, directory)
    unknown = unknown_elements(reference, item.atoms.numbers)
    if unknown:
        raise LabelError("bad-input", f"{reference.calculator} cannot do {', '.join(unknown)}")
    os.chdir(directory)  # for codes that write wherever they stand; the build may have read relative paths
    if item.kind == "single-point":
        return compute_label(item.atoms, calculator)
    assert item.fmax is not None and item.max_steps is not None
    relaxation = relax(
        item.atoms,
        calculator,
        item.fmax,
        item.max_steps,
        with_cell=item.with_cell,
        on_step=lambda: connection.send(None),
    )
    if not relaxation.converged:
        raise LabelError(
            "unconverged",
            f"after {relaxation.num_steps} steps a force of {relaxation.max_force:.4g} eV/Å is left, "
            f"above {item.fmax:g} eV/Å",
        )
    return relaxation

"""Why a calculation gave no label: exceptions, exit statuses and outputs become a LabelError with one cause.

| cause | meaning |
|---|---|
| scf | the self-consistent field did not converge |
| non-finite | energy, forces or stress hold NaN or infinity |
| net-force | the forces do not add up to zero |
| stress | the stress is not symmetric |
| unconverged | the relaxation did not reach its force limit within its steps |
| geometry | the structure itself is impossible: overlapping atoms, no volume |
| bad-input | the code rejected the input, or cannot do an element |
| time-limit | the calculation was ended at its wall-time limit |
| crash | a process of the calculation died or was killed, with the signal |
| memory | no memory was left |
| interrupted | a process was ended from outside by a polite signal, as schedulers do before they kill |
| missing-binary | a program of the calculator could not be started, or its files not be read, which is no structure's fault |
| disk-full | no room is left for files, which is no structure's fault either |
| calculator | any other exception of the calculator |
"""

from __future__ import annotations

import errno
import signal
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.errors import LabelError, UserError

# What schedulers and terminals send to end a job: it says nothing about the structure.
_POLITE_SIGNALS = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
}

# Here the machine is at fault: were they recorded, one bad node would turn a whole campaign into failed structures.
CAUSES_OF_THE_MACHINE = frozenset({"missing-binary", "disk-full"})
# Where programs are started: a process of Python's, and CP2K's, which answers once it is ready.
_STARTS = {"Popen._execute_child", "Cp2kShell.__init__"}

# What codes write when they stop, in lower case; the first match decides. Not a bare "not converged": Quantum
# ESPRESSO writes that about single eigenvalues and goes on.
_OUTPUT_MARKS = (
    ("maximum cpu time exceeded", "time-limit"),
    ("convergence not achieved", "scf"),  # Quantum ESPRESSO
    ("scf not converged", "scf"),  # ORCA, tblite
    ("wavefunction not fully converged", "scf"),  # ORCA
    ("scf run not converged", "scf"),  # CP2K
    ("self-consistency cycle did not converge", "scf"),  # FHI-aims
    ("ediff was not reached", "scf"),  # VASP
    ("call to zhegv failed", "scf"),  # VASP: the subspace of its diagonalisation has collapsed
    ("could not find required paw dataset", "bad-input"),  # GPAW
    ("overlap!", "geometry"),
    ("no space left on device", "disk-full"),
)
_SEARCHED_BYTES = 64_000
_SHOWN_BYTES = 4_000
_OUTPUT_SUFFIXES = {".pwo", ".out", ".log", ".err", ".txt"}


@dataclass(frozen=True)
class Failure:
    """Why an item has no label, and the end of what its calculation printed."""

    cause: str
    message: str
    output: str = ""


@dataclass(frozen=True)
class Try:
    """How a try on one rung of the ladder failed."""

    rung: int
    cause: str
    message: str
    wall_s: float


@contextmanager
def calculator_errors(calculator: Any) -> Iterator[None]:
    """Turn whatever a calculator raises into a LabelError."""
    try:
        yield
    except (LabelError, UserError):
        raise
    except Exception as error:
        directory = getattr(calculator, "directory", None)
        raise label_error(error, None if directory is None else Path(directory)) from error


def label_error(error: BaseException, directory: Path | None) -> LabelError:
    """The LabelError that says what `error` of a calculator working in `directory` means."""
    if isinstance(error, LabelError):
        return error
    if isinstance(error, subprocess.CalledProcessError):
        return _of_exit_status(error, directory)
    if isinstance(error, SystemExit):
        return LabelError("crash", f"the calculator ended its own process with exit code {error.code}")
    cause = _cause_of(error)
    if cause == "calculator" and directory is not None:  # such as a parser that finds no energy in the output
        cause = _mark_in(output_tails(directory, _SEARCHED_BYTES)) or cause
    return LabelError(cause, f"{type(error).__name__}: {error}")


def of_signal(number: int, who: str) -> LabelError:
    """A process that ended by a signal: 'interrupted' if it was a polite one, otherwise 'crash'."""
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    if number in _POLITE_SIGNALS:
        return LabelError("interrupted", f"{who} was ended from outside by {name}")
    hint = "; the system kills like this when memory runs out" if number == signal.SIGKILL else ""
    return LabelError("crash", f"{who} died by {name}{hint}")


def output_tails(directory: Path, num_bytes: int = _SHOWN_BYTES) -> str:
    """The ends of the three newest output files that a code left in its directory, newest last."""
    files = [path for path in directory.rglob("*") if path.suffix in _OUTPUT_SUFFIXES and path.is_file()]
    parts = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[-3:]:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - num_bytes))
            parts.append(f"--- {path.name} ---\n{file.read().decode(errors='replace')}")
    return "\n".join(parts)


def _cause_of(error: BaseException) -> str:
    if type(error).__name__ in {"SCFError", "KohnShamConvergenceError", "SCFConvergenceError"}:
        return "scf"
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "disk-full"
    if any(frame.f_code.co_qualname in _STARTS for frame, _ in traceback.walk_tb(error.__traceback__)):
        return "missing-binary"
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, NotImplementedError) or type(error).__name__ in {
        "InputError",
        "CalculatorSetupError",
    }:
        return "bad-input"
    if "converge" in str(error).lower():
        return "scf"
    return _mark_in(str(error)) or "calculator"


def _of_exit_status(error: subprocess.CalledProcessError, directory: Path | None) -> LabelError:
    status, argv = error.returncode, error.cmd if isinstance(error.cmd, list) else str(error.cmd).split()
    program = argv[0] if argv else "the code"
    output = "" if directory is None else output_tails(directory, _SEARCHED_BYTES)
    if status == 124 or (status in {137, -9} and "timeout" in argv):
        return LabelError(
            "time-limit", f"{' '.join(argv)} was ended by its own time limit (exit status {status})"
        )
    if status in {126, 127}:
        return LabelError("missing-binary", f"{' '.join(argv)} could not be started (exit status {status})")
    if status < 0 or 128 < status <= 128 + 64:
        return of_signal(-status if status < 0 else status - 128, program)
    cause = _mark_in(output) or _espresso_cause(argv, status) or "calculator"
    return LabelError(cause, f"{' '.join(argv)} ended with exit status {status}")


def _espresso_cause(argv: list[str], status: int) -> str | None:
    if any(Path(word).name == "pw.x" for word in argv):
        return {1: "bad-input", 2: "scf"}.get(status)
    return None


def _mark_in(text: str) -> str | None:
    lower_case = text.lower()
    return next((cause for mark, cause in _OUTPUT_MARKS if mark in lower_case), None)

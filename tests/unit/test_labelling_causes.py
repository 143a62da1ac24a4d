"""Every way in which a code can fail, as one cause."""

from __future__ import annotations

import errno
import signal
import subprocess
from subprocess import CalledProcessError

import pytest
from ase.calculators.calculator import CalculationFailed, InputError, SCFError

from hpcft.errors import LabelError
from hpcft.labelling.causes import label_error, of_signal


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (CalledProcessError(2, ["pw.x", "-in", "espresso.pwi"]), "scf"),
        (CalledProcessError(1, ["/opt/qe/pw.x", "-in", "espresso.pwi"]), "bad-input"),
        (CalledProcessError(2, "mpirun -n 4 pw.x -in espresso.pwi"), "scf"),
        (CalledProcessError(2, ["vasp"]), "calculator"),
        (CalledProcessError(-11, ["pw.x"]), "crash"),
        (CalledProcessError(139, ["mpirun", "pw.x"]), "crash"),
        (CalledProcessError(-9, ["pw.x"]), "crash"),
        (CalledProcessError(-15, ["pw.x"]), "interrupted"),
        (CalledProcessError(143, ["srun", "pw.x"]), "interrupted"),
        (CalledProcessError(124, ["timeout", "-k", "5", "60", "pw.x"]), "time-limit"),
        (CalledProcessError(137, ["timeout", "-k", "5", "60", "pw.x"]), "time-limit"),
        (CalledProcessError(127, ["env", "pw.x"]), "missing-binary"),
        (SCFError("no"), "scf"),
        (CalculationFailed("SCF not converged in 250 cycles"), "scf"),
        (type("KohnShamConvergenceError", (Exception,), {})("100 iterations"), "scf"),
        (InputError("unknown keyword"), "bad-input"),
        (NotImplementedError("No EMT-potential for Si"), "bad-input"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk-full"),
        (FileNotFoundError("some.output"), "calculator"),
        (MemoryError(), "memory"),
        (ZeroDivisionError("division by zero"), "calculator"),
        (SystemExit(3), "crash"),
        (LabelError("geometry", "as it was"), "geometry"),
    ],
)
def test_each_failure_has_its_cause(error: BaseException, cause: str) -> None:
    assert label_error(error, None).cause == cause


def test_a_program_that_does_not_exist_is_told_from_a_file_that_does_not() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        subprocess.run(["no-such-program"], check=True)
    assert label_error(caught.value, None).cause == "missing-binary"


@pytest.mark.parametrize(
    ("number", "cause", "words"),
    [
        (signal.SIGSEGV, "crash", "SIGSEGV"),
        (signal.SIGKILL, "crash", "memory"),
        (signal.SIGTERM, "interrupted", "SIGTERM"),
        (200, "crash", "signal 200"),
    ],
)
def test_a_signal_is_named(number: int, cause: str, words: str) -> None:
    error = of_signal(number, "pw.x")
    assert error.cause == cause
    assert words in str(error)

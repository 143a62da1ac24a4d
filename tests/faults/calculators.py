"""Reference calculators that misbehave on purpose, and write down each calculation that they finish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ase import Atoms
from ase.calculators.calculator import SCFError, all_changes
from ase.calculators.emt import EMT

SLEEP = [sys.executable, "-c", "import time; time.sleep(3600)"]


class CountingEMT(EMT):
    """EMT that appends the energy of each finished calculation to the file `calls`, or $HPCFT_TEST_CALLS."""

    def __init__(self, calls: str | None = None) -> None:
        super().__init__()
        self.calls = calls or os.environ["HPCFT_TEST_CALLS"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        assert atoms is not None
        self.before(atoms)
        super().calculate(atoms, properties, system_changes)
        append_line(self.calls, repr(float(self.results["energy"])))

    def before(self, atoms: Atoms) -> None:
        """What happens before the calculation."""


class SlowEMT(CountingEMT):
    """Takes a little longer, so that a kill can hit it."""

    def before(self, atoms: Atoms) -> None:
        time.sleep(0.02)


class GatedEMT(CountingEMT):
    """Computes nickel only when the file `gate` exists, and waits for it till then."""

    def __init__(self, calls: str, gate: str) -> None:
        super().__init__(calls)
        self.gate = gate

    def before(self, atoms: Atoms) -> None:
        while "Ni" in atoms.get_chemical_symbols() and not Path(self.gate).exists():
            time.sleep(0.02)


class MeetingEMT(CountingEMT):
    """Goes on only once another calculation has begun beside it, and says on which cores and with how many threads."""

    def __init__(self, calls: str, folder: str) -> None:
        super().__init__(calls)
        self.folder = Path(folder)

    def before(self, atoms: Atoms) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        (self.folder / f"{os.getpid()}").write_text(f"{cores} {os.environ['OMP_NUM_THREADS']}")
        while len(list(self.folder.iterdir())) < 2:
            time.sleep(0.01)


class GreedyEMT(CountingEMT):
    """Takes 300 MB for gold, in a process that it starts, and keeps them."""

    def before(self, atoms: Atoms) -> None:
        if "Au" in atoms.get_chemical_symbols():
            take = "import time; held = bytearray(b'x' * 300_000_000); time.sleep(3600)"
            subprocess.run([sys.executable, "-c", take], check=True)


class DiesAtStepEMT(CountingEMT):
    """Kills its own process in the fifth calculation, once."""

    def before(self, atoms: Atoms) -> None:
        if len(lines_of(Path(self.calls))) == 4 and not Path(f"{self.calls}.died").exists():
            Path(f"{self.calls}.died").touch()
            os.kill(os.getpid(), signal.SIGSEGV)


class ChargedEMT(EMT):
    """EMT with moments, charges and a dipole, and an energy extrapolated to zero smearing beside the free one."""

    implemented_properties: ClassVar[list[str]] = [
        *EMT.implemented_properties,
        "magmoms",
        "charges",
        "dipole",
    ]

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken = broken

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        assert atoms is not None
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = self.results["free_energy"] + 0.25
        self.results["magmoms"] = atoms.positions[:, 0] + 1
        self.results["charges"] = atoms.positions[:, 1]
        self.results["dipole"] = atoms.positions.sum(axis=0)
        if self.broken in atoms.get_chemical_symbols():
            self.results["dipole"] = self.results["dipole"] * float("nan")


class UnsettledEMT(CountingEMT):
    """Does not converge with little mixing."""

    def __init__(self, calls: str, mixing: float) -> None:
        super().__init__(calls)
        self.mixing = mixing

    def before(self, atoms: Atoms) -> None:
        if self.mixing > 0.2:
            raise SCFError(f"no convergence with mixing {self.mixing}")


class HangingEMT(CountingEMT):
    """Hangs on structures with gold, after it started processes: one in its session and one that left it."""

    def __init__(self, calls: str, pids: str) -> None:
        super().__init__(calls)
        self.pids = pids

    def before(self, atoms: Atoms) -> None:
        if "Au" in atoms.get_chemical_symbols():
            print("now I hang", flush=True)
            child = subprocess.Popen(SLEEP)
            escaped = subprocess.Popen(SLEEP, start_new_session=True)
            forked = os.fork()  # holds all pipes of its parent open
            if forked == 0:
                time.sleep(3600)
            for pid in (os.getpid(), child.pid, escaped.pid, forked):
                append_line(self.pids, str(pid))
            time.sleep(3600)


class DyingEMT(CountingEMT):
    """Dies on gold by a signal, leaves on silver by exit, and lets a forked process live on."""

    def __init__(self, calls: str, pids: str, signal_name: str = "SIGSEGV") -> None:
        super().__init__(calls)
        self.pids = pids
        self.number = signal.Signals[signal_name]

    def before(self, atoms: Atoms) -> None:
        symbols = set(atoms.get_chemical_symbols())
        if symbols & {"Au", "Ag"}:
            print("last words", flush=True)
            forked = os.fork()
            if forked == 0:
                time.sleep(3600)
            append_line(self.pids, str(forked))
        if "Au" in symbols:
            os.kill(os.getpid(), self.number)
        if "Ag" in symbols:
            os._exit(7)


class TerminatedOnceEMT(CountingEMT):
    """Is ended by SIGTERM the first time, as by a scheduler that preempts the job."""

    def before(self, atoms: Atoms) -> None:
        if not Path(self.calls).exists():
            append_line(self.calls, "terminated")
            os.kill(os.getpid(), signal.SIGTERM)


class ChattyEMT(CountingEMT):
    """Prints without bound, then raises."""

    def before(self, atoms: Atoms) -> None:
        for number in range(20_000):
            print(f"line {number} of very much output")
        raise RuntimeError("enough of it")


def append_line(path: str, line: str) -> None:
    """One write call, so that lines of several processes do not mix."""
    with Path(path).open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def lines_of(path: Path) -> list[str]:
    """What `append_line` wrote; nothing if it never did."""
    return path.read_text().splitlines() if path.exists() else []


def broken_factory(**arguments: Any) -> EMT:
    """Rejects whatever it gets."""
    raise ValueError(f"cannot work with {sorted(arguments)}")


class LicensedEMT(EMT):
    """Fails while the file $HPCFT_TEST_LICENCE is not there, as a code does whose licence server is down."""

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        if not Path(os.environ["HPCFT_TEST_LICENCE"]).exists():
            raise RuntimeError("the licence server does not answer")
        super().calculate(atoms, properties, system_changes)


class LicensedForGoldEMT(CountingEMT):
    """Fails on structures with gold while the file $HPCFT_TEST_LICENCE is not there."""

    def before(self, atoms: Atoms) -> None:
        if "Au" in atoms.get_chemical_symbols() and not Path(os.environ["HPCFT_TEST_LICENCE"]).exists():
            raise RuntimeError('no licence for "Au",\nsays its server')


class ObedientEMT(CountingEMT):
    """Does what the file $HPCFT_TEST_ORDERS says: `go`, or from the Nth finished calculation on `wait N` or `break N`."""

    def before(self, atoms: Atoms) -> None:
        while (order := Path(os.environ["HPCFT_TEST_ORDERS"]).read_text().split()) != ["go"]:
            if len(lines_of(Path(self.calls))) < int(order[1]):
                return
            if order[0] == "break":
                subprocess.run(["/no/such/program"], check=True)  # as where a node lacks the code
            time.sleep(0.02)


class OtherZeroEMT(EMT):
    """EMT whose isolated atoms have another energy, as those of another pseudopotential: `offset` eV more for each atom."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert atoms is not None
        for name in ("energy", "free_energy"):
            self.results[name] += self.offset * len(atoms)

"""The process between a worker and its reference calculations: enforces time limits, leaves nothing behind.

    worker  --socket-->  supervisor  --fork-->  child  --exec-->  pw.x, mpirun, ...

Why a process of its own, and why fork: the worker may have threads, CUDA or MPI in it, where fork is unsafe
and a new interpreter costs seconds; the supervisor imports the calculator's module once, stays
single-threaded, and forks a child in milliseconds whenever one is lost. It is the subreaper of all that the
calculation starts, so it finds even processes that left their session. When the worker dies, however it dies,
the socket closes, and the supervisor kills everything and removes the scratch folder.

A child computes one item after the other, each with a new calculator in a new folder so that no result
depends on the one before, and is replaced at the first failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import psutil

from hpcft.errors import UserError
from hpcft.labelling.causes import Failure, of_signal, output_tails
from hpcft.labelling.child import Answer, Frame, Refusal, become_child, serve
from hpcft.labelling.dotted_path import resolve
from hpcft.labelling.item import Item
from hpcft.labelling.reference import Reference

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KEPT_OUTPUT_BYTES = 100_000
_MEMORY_LOOK_S = 0.25
_MAX_WAIT_FOR_DYING_S = 10.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """How one item ended, and after which wall time."""

    answer: Answer
    wall_s: float


@dataclass(frozen=True)
class Order:
    """What a supervisor is to work with: a scratch folder (None: $TMPDIR) and cores of its own (None: any)."""

    reference: Reference
    scratch: Path | None = None
    cores: tuple[int, ...] | None = None


class _WorkerGone(Exception):
    """The other end of the socket closed."""


class _ChildDied(Exception):
    """The child ended without an answer."""


def main(descriptor: int) -> None:
    """Serve items that come over the socket until the worker closes it or dies."""
    # The worker's end decides about this process; a scheduler's warning signals are the worker's to answer.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    worker = Connection(descriptor)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        order: Order = worker.recv()
    except EOFError:
        return
    try:
        if order.scratch is not None:
            order.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="hpcft-label-", dir=order.scratch))
    except OSError as error:
        where = order.scratch or tempfile.gettempdir()
        worker.send(
            Refusal(f"no scratch folder can be made in {where} ({error.strerror}); give another by $TMPDIR")
        )
        return
    if order.cores is not None:
        os.sched_setaffinity(0, order.cores)
    reference = order.reference
    supervisor = Supervisor(worker, reference, folder, libc)
    try:
        resolve(reference.calculator)
        gc.freeze()  # what the children share would be copied at their first garbage collection
        worker.send(folder)
        while True:
            worker.send(supervisor.compute(*worker.recv()))
    except UserError as error:
        worker.send(Refusal.of(error))
    except (_WorkerGone, EOFError, ConnectionError):
        pass
    finally:
        supervisor.end_child()
        shutil.rmtree(folder, ignore_errors=True)


class Supervisor:
    """Holds the current child, if there is one, and replaces it when it is lost."""

    def __init__(self, worker: Connection, reference: Reference, folder: Path, libc: ctypes.CDLL) -> None:
        self._worker = worker
        self._reference = reference
        self._folder = folder
        self._libc = libc
        self._child: _Child | None = None
        self._child_exited, wakeup = socket.socketpair()
        self._child_exited.setblocking(False)
        wakeup.setblocking(False)
        self._wakeup = wakeup  # kept open: the interpreter writes into it whenever a child ends
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)

    def compute(self, item: Item, known: Sequence[Frame] = ()) -> Outcome | Refusal:
        """Have a child compute one item in a new folder, each of its calculations within the limits.

        The frames of a relaxation go to the worker as they come; those in `known` are not computed again.
        """
        frames = list(known)
        if item.kind == "relaxation":
            importlib.import_module("ase.optimize.bfgs")  # half a second, which every child would pay again
        while True:
            child_is_new = self._child is None
            directory = Path(tempfile.mkdtemp(dir=self._folder))
            start = time.monotonic()
            try:
                answer = self._answer(item, frames, directory)
                if isinstance(answer, Refusal):
                    return answer
                wall_s = time.monotonic() - start
                return Outcome(self._with_output(answer, directory), wall_s)
            except _ChildDied:
                # An older child may have died of what an earlier item left in it: try a new one before
                # blaming this item.
                if child_is_new:
                    wall_s = time.monotonic() - start
                    return Outcome(self._with_output(Answer(self._cause_of_death()), directory), wall_s)
                self.end_child()
            finally:
                shutil.rmtree(directory, ignore_errors=True)

    def end_child(self) -> str:
        """Kill the child and everything that it started; returns the end of what they printed."""
        if self._child is None:
            return ""
        child, self._child = self._child, None
        for end in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):  # killed before it had a group of its own
                end(child.pid, signal.SIGKILL)
        _end_descendants()
        return child.close()

    def _answer(self, item: Item, frames: list[Frame], directory: Path) -> Answer | Refusal:
        """The child's answer for an item, or a failure if it goes over a limit; _ChildDied if it cannot come."""
        child = self._child = self._child or self._fork()
        child.output.clear()
        try:
            child.connection.send((item, frames, directory))
        except OSError as error:
            raise _ChildDied from error
        limit_s = self._reference.time_limit_s
        deadline = time.monotonic() + limit_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            if too_much := self._memory_problem():
                return Answer(Failure("memory", too_much))
            if not self._wait_for(child, remaining_s):
                continue
            try:
                message = child.connection.recv()
            except (EOFError, OSError) as error:
                raise _ChildDied from error
            if isinstance(message, Answer | Refusal):
                return message
            if isinstance(message, Frame):
                frames.insert(0, message.on_this_way())
                self._worker.send(message)
            deadline = time.monotonic() + limit_s  # one calculation of several is finished
        message = f"one calculation exceeded its limit of {limit_s:g} s and was killed"
        return Answer(Failure("time-limit", message))

    def _memory_problem(self) -> str | None:
        """What is wrong when all processes of the calculation together hold more than they may."""
        limit_GB = self._reference.memory_limit_GB
        if limit_GB is None:
            return None
        held = sum(map(_memory_of, psutil.Process().children(recursive=True)))
        if held <= limit_GB * 1e9:
            return None
        return f"the calculation held {held / 1e9:.3g} GB, above its limit of {limit_GB:g} GB, and was killed"

    def _wait_for(self, child: _Child, timeout_s: float) -> bool:
        """Whether the child has sent something; _ChildDied or _WorkerGone if nothing will come."""
        # A grandchild that was forked may hold the connection open, so its end alone would not tell.
        if child.has_exited() and not child.connection.poll():
            raise _ChildDied
        sources: list[Connection | socket.socket | int] = [child.connection, self._worker, self._child_exited]
        if self._reference.memory_limit_GB is not None:
            timeout_s = min(timeout_s, _MEMORY_LOOK_S)
        ready = wait([*sources, *child.open_output()], timeout_s)
        if self._worker in ready:
            raise _WorkerGone
        if child.output_end in ready:
            child.read_output()
        if self._child_exited in ready:
            self._child_exited.recv(4096)
        return child.connection in ready

    def _cause_of_death(self) -> Failure:
        assert self._child is not None
        ended = self._child.wait()
        who = "the process of the calculator"
        if ended.si_code == os.CLD_EXITED:
            return Failure("crash", f"{who} ended itself with exit code {ended.si_status}")
        error = of_signal(ended.si_status, who)
        return Failure(error.cause, str(error))

    def _with_output(self, answer: Answer, directory: Path) -> Answer:
        """A failure with the end of what was printed, its child replaced; any other answer as it is."""
        failure = answer.result
        if not isinstance(failure, Failure):
            return answer
        output = f"{self.end_child()}\n{output_tails(directory, _KEPT_OUTPUT_BYTES)}".strip()
        return replace(answer, result=Failure(failure.cause, failure.message, output))

    def _fork(self) -> _Child:
        connection, connection_of_child = Pipe()
        output_end, output_of_child = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != supervisor_pid:
                    os._exit(1)
                connection.close()
                self._worker.close()
                os.close(output_end)
                become_child(output_of_child)
                serve(connection_of_child, self._reference)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        connection_of_child.close()
        os.close(output_of_child)
        os.set_blocking(output_end, False)
        return _Child(pid, connection, output_end)


class _Child:
    """A forked process as its parent sees it; not reaped here, so that its id and its group stay its own."""

    def __init__(self, pid: int, connection: Connection, output_end: int) -> None:
        self.pid = pid
        self.connection = connection
        self.output_end = output_end
        self.output = bytearray()
        self._prints = True

    def open_output(self) -> list[int]:
        """The descriptor to wait for, unless everyone who could print has closed it."""
        return [self.output_end] if self._prints else []

    def read_output(self) -> None:
        """Take what was printed, keeping only its end: a code may print without bound."""
        try:
            printed = os.read(self.output_end, 65536)
        except BlockingIOError:
            return
        self._prints = bool(printed)
        self.output += printed
        del self.output[:-_KEPT_OUTPUT_BYTES]

    def has_exited(self) -> bool:
        """Whether the process itself is gone, whatever its descendants do."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def wait(self) -> os.waitid_result:
        """How a process ended that is dead or dying."""
        # This changes nothing for a dying process, and ends one that has only closed its connection.
        os.kill(self.pid, signal.SIGKILL)
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        return ended

    def close(self) -> str:
        """Give the descriptors back; returns the end of the output."""
        for _ in range(32):  # more than a pipe holds
            self.read_output()
        os.close(self.output_end)
        self.connection.close()
        return self.output.decode(errors="replace")


def _memory_of(process: psutil.Process) -> int:
    """Bytes, each page shared with others in parts: forked processes and MPI ranks have many in common."""
    try:
        try:
            return int(process.memory_full_info().pss)
        except (psutil.AccessDenied, AttributeError):
            return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _end_descendants() -> None:
    """SIGKILL and reap every descendant, also those that left their session; a subreaper gets its orphans."""
    deadline = time.monotonic() + _MAX_WAIT_FOR_DYING_S
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.001)

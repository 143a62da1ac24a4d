"""A worker's end of a supervisor: started at its first item, gone with all its children when it is closed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from hpcft.labelling.child import Frame, Refusal
from hpcft.labelling.item import Item
from hpcft.labelling.reference import Reference
from hpcft.labelling.supervisor import Order, Outcome

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hpcft.labelling.supervisor import main; main(int(sys.argv[2]))"
)
_MAX_WAIT_S = 30.0
_MARK = "HPCFT_SUPERVISED_BY"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Share:
    """What one worker of several has of a task's cores. `cores`: those it is bound to, None: any of the process's."""

    cores: tuple[int, ...] | None
    threads: int
    """For each process of a calculation."""


def shares(workers: int, ranks: int, num_cores: int | None) -> list[Share]:
    """A share for each worker, whose calculations have so many MPI ranks, of the task's cores (None: all that we may use).

    Workers are bound to cores only where the whole task is: elsewhere other tasks would be bound to the same ones.
    """
    allowed = sorted(os.sched_getaffinity(0))
    total = min(num_cores or len(allowed), len(allowed))
    each = total // workers
    threads = max(1, each // ranks)
    if workers == 1 or each == 0 or total < len(allowed):
        return [Share(None, threads)] * workers
    return [Share(tuple(allowed[number * each : (number + 1) * each]), threads) for number in range(workers)]


class SupervisedCalculator:
    """One item at a time: `begin` it, then `receive` its frames, if it is a relaxation, and its outcome.

    `connection` can be waited for, with those of others.
    """

    def __init__(self, reference: Reference, share: Share, scratch: Path | None = None) -> None:
        self._order = Order(reference, scratch, share.cores)
        self._threads = share.threads
        self._mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._folder: Path | None = None

    @property
    def connection(self) -> Connection:
        """To wait for, once an item has begun."""
        assert self._connection is not None
        return self._connection

    def begin(self, item: Item, known: Sequence[Frame] = ()) -> None:
        """Start on an item; the frames in `known` are not computed again."""
        try:
            connection = self._connection or self._start()
            connection.send((item, known))
        except ConnectionError as error:
            with contextlib.suppress(EOFError, ConnectionError):
                while self.connection.poll():  # its last word may say why
                    self.receive()
            raise self._lost() from error

    def receive(self) -> Frame | Outcome | None:
        """What has come, None if that was only a greeting; UserError if the reference cannot be built."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._lost() from error
        if isinstance(message, Refusal):
            raise message.error
        if isinstance(message, Path):
            self._folder = message
            return None
        assert isinstance(message, Frame | Outcome)
        return message

    def close(self) -> None:
        """End whatever is at work, and leave nothing behind."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(_MAX_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:  # the supervisor has removed it, unless it was killed
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno())]
            self._connection = connection = Connection(ours.detach())
            # Its own session: Ctrl-C reaches this process alone, which then lets the supervisor clean up.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=self._environment(),
            )
        connection.send(self._order)
        return connection

    def _environment(self) -> dict[str, str]:
        """More threads than this share of the cores has would slow all down; fewer are the site's or the user's wish."""
        threads = {name: str(_at_most(os.environ.get(name), self._threads)) for name in _THREADS}
        return {**os.environ, **threads, _MARK: self._mark, **self._order.reference.environment}

    def _lost(self) -> RuntimeError:
        assert self._process is not None
        status = self._process.wait()
        self._end_what_is_left()
        return RuntimeError(
            f"The process that supervises {self._order.reference.calculator} ended with status {status} "
            "(negative: a signal), and nothing was recorded for the present item; see what it printed to "
            "standard error, then run again."
        )

    def _end_what_is_left(self) -> None:
        """The programs of a supervisor that was killed live on: all that it has started bears its mark."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    process.kill()


def _at_most(wish: str | None, threads: int) -> int:
    return min(int(wish), threads) if wish and wish.isdigit() and int(wish) > 0 else threads

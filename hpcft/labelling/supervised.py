"""A worker's end of a supervisor: started at its first item, gone with all its children when it is closed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from hpcft.errors import UserError
from hpcft.labelling.child import Frame, Refusal
from hpcft.labelling.item import Item
from hpcft.labelling.reference import Reference
from hpcft.labelling.supervisor import Order, Outcome

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hpcft.labelling.supervisor import main; main(int(sys.argv[2]))"
)
_MAX_WAIT_S = 30.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def shares_of_cores(workers: int) -> list[tuple[int, ...] | None]:
    """Cores of this process for each worker, none of them twice; None where there is one worker, or too few cores."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // workers
    if workers == 1 or each == 0:
        return [None] * workers
    return [tuple(cores[number * each : (number + 1) * each]) for number in range(workers)]


class SupervisedCalculator:
    """One item at a time: `begin` it, then `receive` its frames, if it is a relaxation, and its outcome.

    `connection` can be waited for, with those of others.
    """

    def __init__(
        self, reference: Reference, scratch: Path | None = None, cores: tuple[int, ...] | None = None
    ) -> None:
        self._order = Order(reference, scratch, cores)
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
            raise self._lost() from error

    def receive(self) -> Frame | Outcome | None:
        """What has come, None if that was only a greeting; UserError if the reference cannot be built."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._lost() from error
        if isinstance(message, Refusal):
            raise UserError(message.message)
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
        """More threads than a worker's share of the cores would slow all of them down."""
        cores = self._order.cores
        threads = {} if cores is None else dict.fromkeys(_THREADS, str(len(cores)))
        return {**os.environ, **threads, **self._order.reference.environment}

    def _lost(self) -> RuntimeError:
        assert self._process is not None
        status = self._process.wait()
        return RuntimeError(
            f"The process that supervises {self._order.reference.calculator} ended with status {status} "
            "(negative: a signal), and nothing was recorded for the present item; see what it printed to "
            "standard error, then run again."
        )

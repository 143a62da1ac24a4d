"""Labels for a list of items: found, computed or failed with a cause, each durable before the next one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from hpcft.errors import LabelError, UserError
from hpcft.labelling.causes import Failure
from hpcft.labelling.child import Refusal
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Journal, Record, journal_path, read_journals
from hpcft.labelling.reference import Reference
from hpcft.labelling.supervisor import Outcome

# Here the machine is at fault: were they recorded, one bad node would turn a whole campaign into failed
# structures.
_CAUSES_OF_THE_MACHINE = {"missing-binary", "disk-full"}

_START_SUPERVISOR = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hpcft.labelling.supervisor import main; main(int(sys.argv[2]))"
)
_MAX_WAIT_FOR_SUPERVISOR_S = 30.0


@dataclass(frozen=True)
class LabelSummary:
    """Where a shard stands; `num_computed` and `num_found` count this run, all else earlier attempts too."""

    num_items: int
    num_done: int
    num_failed: int
    num_computed: int
    num_found: int
    wall_s: float
    causes: Mapping[str, int] = field(default_factory=dict)


def label_items(
    items: Sequence[Item],
    reference: Reference,
    folder: Path,
    *,
    known: Mapping[str, Record] | None = None,
    attempt: int = 0,
    retry_causes: Collection[str] = ("interrupted",),
    scratch: Path | None = None,
    on_progress: Callable[[Record], None] | None = None,
) -> LabelSummary:
    """Bring every item to done or failed, writing one line per item to this attempt's journal in `folder`.

    Items that an earlier attempt finished are left alone, except failures whose cause is in `retry_causes`.
    Results in `known` (by key, from a LabelStore) and results of equal items are taken over instead of
    computed. `on_progress` gets each record once it is durable; whatever it raises ends the run, and the next
    one goes on from there.

    No two processes may run the same attempt number in one folder. `scratch` holds the calculations' files
    while they run (default: $TMPDIR).

    Raises UserError if the reference cannot be built or the folder holds other items, and LabelError if the
    machine is at fault (cause 'missing-binary' or 'disk-full'); neither is recorded as an item's failure.
    """
    start = time.monotonic()
    keys = [item_key(item, reference) for item in items]
    folder.mkdir(parents=True, exist_ok=True)
    finished = read_journals(folder)
    _check_same_items(finished, keys, folder)
    available = dict(known or {}) | {record.key: record for record in finished.values() if record.done}
    num_computed = num_found = 0
    with (
        Journal(journal_path(folder, attempt)) as journal,
        SupervisedCalculator(reference, scratch) as calculator,
    ):
        for index, (item, key) in enumerate(zip(items, keys, strict=True)):
            if index in finished and not _to_retry(finished[index], retry_causes):
                continue
            if key in available:
                record = replace(available[key], index=index, attempt=attempt, found=True)
                num_found += 1
            else:
                record = _computed(index, item, key, calculator, attempt)
                num_computed += 1
            journal.append(record)
            finished[index] = record
            if record.done:
                available[key] = record
            if on_progress is not None:
                on_progress(record)
    causes = Counter(
        record.result.cause for record in finished.values() if isinstance(record.result, Failure)
    )
    num_failed = sum(causes.values())
    return LabelSummary(
        num_items=len(items),
        num_done=len(finished) - num_failed,
        num_failed=num_failed,
        num_computed=num_computed,
        num_found=num_found,
        wall_s=time.monotonic() - start,
        causes=dict(causes),
    )


class SupervisedCalculator:
    """A supervisor process, started at the first item and gone with all its children after `with`."""

    def __init__(self, reference: Reference, scratch: Path | None = None) -> None:
        self._reference = reference
        self._scratch = scratch
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._folder: Path | None = None

    def compute(self, item: Item) -> Outcome:
        """The outcome of one item; UserError if the reference cannot be built."""
        connection = self._connection or self._start()
        answer = self._exchange(connection, item)
        if isinstance(answer, Refusal):
            raise UserError(answer.message)
        assert isinstance(answer, Outcome)
        return answer

    def __enter__(self) -> SupervisedCalculator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(_MAX_WAIT_FOR_SUPERVISOR_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:
            shutil.rmtree(
                self._folder, ignore_errors=True
            )  # the supervisor has done it, unless it was killed

    def _start(self) -> Connection:
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _START_SUPERVISOR, json.dumps(sys.path), str(theirs.fileno())]
            self._connection = connection = Connection(ours.detach())
            # Its own session: Ctrl-C reaches this process alone, which then lets the supervisor clean up.
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        answer = self._exchange(connection, (self._reference, self._scratch))
        if isinstance(answer, Refusal):
            raise UserError(answer.message)
        assert isinstance(answer, Path)
        self._folder = answer
        return connection

    def _exchange(self, connection: Connection, message: object) -> object:
        assert self._process is not None
        try:
            connection.send(message)
            answer: object = connection.recv()
            return answer
        except (EOFError, ConnectionError) as error:
            status = self._process.wait()
            raise RuntimeError(
                f"The process that supervises {self._reference.calculator} ended with status {status} "
                "(negative: a signal), and nothing was recorded for the present item; see what it printed to "
                "standard error, then run again."
            ) from error


def _computed(index: int, item: Item, key: str, calculator: SupervisedCalculator, attempt: int) -> Record:
    outcome = calculator.compute(item)
    if isinstance(outcome.result, Failure) and outcome.result.cause == "interrupted":
        outcome = calculator.compute(
            item
        )  # a scheduler's signal says nothing about the structure; a second one may
    result = outcome.result
    if isinstance(result, Failure) and result.cause in _CAUSES_OF_THE_MACHINE:
        host = os.uname().nodename
        raise LabelError(
            result.cause,
            f"Item {index} could not be computed on {host}: {result.message}. Mend it or the command.",
        )
    atoms = None if isinstance(result, Failure) else item.atoms
    return Record(index, key, item.kind, result, atoms, outcome.wall_s, outcome.rung, attempt)


def _to_retry(record: Record, causes: Collection[str]) -> bool:
    return isinstance(record.result, Failure) and record.result.cause in causes


def _check_same_items(finished: Mapping[int, Record], keys: Sequence[str], folder: Path) -> None:
    for index, record in finished.items():
        if index >= len(keys) or record.key != keys[index]:
            raise UserError(
                f"{folder} holds labels of other structures or of another reference (item {index} differs). "
                "Label into a new folder; results are found again through the label store."
            )

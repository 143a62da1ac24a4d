"""Labels for a list of items: found, computed or failed with a cause, each durable before its worker takes the next one."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

from hpcft.errors import LabelError, UserError
from hpcft.labelling.causes import CAUSES_OF_THE_MACHINE, Failure
from hpcft.labelling.child import Frame
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Entry, Journal, Listing, Record, journal_path, list_journals
from hpcft.labelling.label import Label
from hpcft.labelling.reference import Reference
from hpcft.labelling.supervised import SupervisedCalculator, shares
from hpcft.labelling.supervisor import Outcome


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
    ways: Mapping[int, Sequence[Record]] | None = None,
    attempt: int = 0,
    workers: int = 1,
    ranks: int = 1,
    cores: int | None = None,
    retry_causes: Collection[str] = ("interrupted",),
    scratch: Path | None = None,
    on_progress: Callable[[Record], None] | None = None,
) -> LabelSummary:
    """Bring every item to done or failed, writing one line per item to this attempt's journal in `folder`.

    Items that an earlier attempt finished are left alone, except failures whose cause is in `retry_causes`; a relaxation
    goes on from the last frame that one of them reached. Results in `known` (by key, from a LabelStore) and results of
    equal items are taken over instead of computed, and so are the labels in `ways` (by item index) wherever a relaxation comes
    by them: those of one that began at the same structure and had another criterion. `on_progress` gets each record once it is
    durable; whatever it raises ends the run, and the next one goes on from there.

    `workers` items are computed side by side, in the order given, each with its share of the task's `cores` (default: all
    that this process may use); a calculation has `ranks` MPI ranks, among which it divides that share. No two processes may
    run the same attempt number in one folder. `scratch` holds the calculations' files while they run (default: $TMPDIR).

    Raises UserError if the reference cannot be built or the folder holds other items, and LabelError if the
    machine is at fault (cause 'missing-binary' or 'disk-full'); neither is recorded as an item's failure.
    """
    start = time.monotonic()
    keys = [item_key(item, reference) for item in items]
    folder.mkdir(parents=True, exist_ok=True)
    listing = list_journals(folder)
    _check_same_items(listing, keys, folder, reference)
    with Journal(journal_path(folder, attempt)) as journal:
        shard = _Shard(items, keys, reference, listing, journal, attempt, on_progress, ways or {})
        num_found = shard.take_over(known or {}, retry_causes)
        if shard.waiting:
            calculators = [
                SupervisedCalculator(reference, share, scratch)
                for share in shares(min(workers, len(shard.waiting)), ranks, cores)
            ]
            _compute_all(shard, calculators)
    causes = Counter(cause for cause in shard.ended.values() if cause is not None)
    num_failed = sum(causes.values())
    return LabelSummary(
        num_items=len(items),
        num_done=len(shard.ended) - num_failed,
        num_failed=num_failed,
        num_computed=shard.num_computed,
        num_found=num_found + shard.num_shared,
        wall_s=time.monotonic() - start,
        causes=dict(causes),
    )


def _compute_all(shard: _Shard, calculators: Sequence[SupervisedCalculator]) -> None:
    """Hand the waiting items to idle calculators until none is left."""
    busy: dict[SupervisedCalculator, _Work] = {}
    try:
        while shard.waiting or busy:
            for calculator in calculators:
                if calculator not in busy and shard.waiting:
                    busy[calculator] = work = _Work(shard.waiting.popleft())
                    calculator.begin(shard.items[work.index], shard.known_frames(work.index))
            ready = wait([calculator.connection for calculator in busy])
            for calculator in [one for one in busy if one.connection in ready]:
                _take_message(shard, calculator, busy)
    except BaseException:
        # What the others have finished meanwhile is paid for as well.
        for calculator in list(busy):
            with contextlib.suppress(Exception):
                while calculator in busy and calculator.connection.poll():
                    _take_message(shard, calculator, busy)
        raise
    finally:
        for calculator in calculators:
            calculator.close()


def _take_message(
    shard: _Shard, calculator: SupervisedCalculator, busy: dict[SupervisedCalculator, _Work]
) -> None:
    message, work = calculator.receive(), busy[calculator]
    if isinstance(message, Frame):
        shard.keep_frame(work.index, message)
    elif isinstance(message, Outcome):
        if _was_interrupted(message) and not work.is_second_try:
            # A scheduler's signal says nothing about the structure; a second one may.
            work.is_second_try = True
            calculator.begin(shard.items[work.index], shard.known_frames(work.index))
            return
        del busy[calculator]
        shard.keep(work.index, message)


@dataclass
class _Work:
    index: int
    is_second_try: bool = False


class _Shard:
    """The items of a shard: which wait, how the others ended, and the journal that says so."""

    def __init__(
        self,
        items: Sequence[Item],
        keys: Sequence[str],
        reference: Reference,
        listing: Listing,
        journal: Journal,
        attempt: int,
        on_progress: Callable[[Record], None] | None,
        ways: Mapping[int, Sequence[Record]],
    ) -> None:
        self._ways = ways
        self.items, self._keys, self._attempt = items, keys, attempt
        self._journal, self._on_progress = journal, on_progress
        self._listing, self._reference = listing, reference
        self._frames: dict[int, list[Frame]] = {}
        self.waiting: deque[int] = deque()
        self._equals: dict[str, list[int]] = {}
        """Items that wait for another with the same key."""
        self.ended: dict[int, str | None] = {index: entry.cause for index, entry in listing.items.items()}
        """Cause of the failure, or None for a label, by index."""
        self.num_computed = self.num_shared = 0

    def take_over(self, known: Mapping[str, Record], retry_causes: Collection[str]) -> int:
        """Record what is known already, and let the rest wait; returns how many were known."""
        done = {entry.key: entry for entry in self._listing.items.values() if entry.done}
        num_found, awaited = 0, set[str]()
        for index, key in enumerate(self._keys):
            if index in self.ended and self.ended[index] not in retry_causes:
                continue
            found: Record | Entry | None = known.get(key) or done.get(key)
            if found is not None:
                record = found if isinstance(found, Record) else found.read()
                self._append(replace(record, index=index, attempt=self._attempt, found=True, step=None))
                num_found += 1
            elif key in awaited:
                self._equals.setdefault(key, []).append(index)
            else:
                awaited.add(key)
                self.waiting.append(index)
        return num_found

    def known_frames(self, index: int) -> list[Frame]:
        """What this attempt and those before have on the way of a relaxation, then what another one had on its way."""
        earlier = [entry.read() for entry in self._listing.frames.get(index, ())]
        others = [replace(_as_frame(record), found=True) for record in self._ways.get(index, ())]
        return [*map(_as_frame, earlier), *self._frames.get(index, ()), *others]

    def keep_frame(self, index: int, frame: Frame) -> None:
        """Make a frame of a relaxation durable."""
        key = item_key(Item.single_point(frame.atoms), self._reference)
        frames = self._frames.setdefault(index, [])
        step = len(self._listing.frames.get(index, ())) + len(frames)
        frames.append(frame.on_this_way())
        record = Record(index, key, "single-point", frame.label, frame.atoms, 0.0, step=step)
        self._journal.append(replace(record, attempt=self._attempt, found=frame.found))

    def keep(self, index: int, outcome: Outcome) -> None:
        """Make the outcome of an item durable, and that of the items that are equal to it.

        An equal of one that failed is computed itself: a crash may have been chance.
        """
        answer, item, key = outcome.answer, self.items[index], self._keys[index]
        _refuse_machine(index, answer.result)
        atoms = None if isinstance(answer.result, Failure) else item.atoms
        record = Record(
            index,
            key,
            item.kind,
            answer.result,
            atoms,
            outcome.wall_s,
            answer.rung,
            self._attempt,
            tries=answer.tries,
        )
        self.num_computed += 1
        self._frames.pop(index, None)
        self._append(record)
        equals = self._equals.pop(key, [])
        if not record.done:
            if equals:
                self.waiting.appendleft(equals[0])
                self._equals[key] = equals[1:]
            return
        for equal in equals:
            self._append(replace(record, index=equal, found=True))
            self.num_shared += 1

    def _append(self, record: Record) -> None:
        self._journal.append(record)
        self.ended[record.index] = record.result.cause if isinstance(record.result, Failure) else None
        if self._on_progress is not None:
            self._on_progress(record)


def _as_frame(record: Record) -> Frame:
    assert record.atoms is not None and isinstance(record.result, Label)
    return Frame(record.atoms, record.result)


def _was_interrupted(outcome: Outcome) -> bool:
    result = outcome.answer.result
    return isinstance(result, Failure) and result.cause == "interrupted"


def _refuse_machine(index: int, result: object) -> None:
    if isinstance(result, Failure) and result.cause in CAUSES_OF_THE_MACHINE:
        host = os.uname().nodename
        raise LabelError(
            result.cause,
            f"Item {index} could not be computed on {host}: {result.message}. Mend it or the command.",
        )


def _check_same_items(listing: Listing, keys: Sequence[str], folder: Path, reference: Reference) -> None:
    others = [
        index for index, entry in listing.items.items() if index >= len(keys) or entry.key != keys[index]
    ]
    # A relaxation that was killed has left no key of its own, but frames, whose keys know the reference as well.
    others += [
        index
        for index, frames in listing.frames.items()
        if index >= len(keys) or frames[0].key != _key_of_frame(frames[0].read(), reference)
    ]
    if others:
        raise UserError(
            f"{folder} holds labels of other structures or of another reference (item {min(others)} differs). "
            "Label into a new folder; results are found again through the label store."
        )


def _key_of_frame(frame: Record, reference: Reference) -> str:
    assert frame.atoms is not None
    return item_key(Item.single_point(frame.atoms), reference)

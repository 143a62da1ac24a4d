"""An append-only journal of finished items: after kill -9 it holds all reported ones, and no half of one.

One file per attempt, one JSON line per item with a CRC-32 of its record. Floats are written as their shortest
decimal form that reads back to the same 64 bits, so a label survives the way through the journal exactly.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.labelling.causes import Failure, Try
from hpcft.labelling.item import Kind
from hpcft.labelling.label import Label, Relaxation
from hpcft.storage.atomic import sync_folder

_LONG_OUTPUT = 1000
_BLOCK_BYTES = 1 << 20
_ALWAYS = {"numbers", "positions", "cell", "pbc"}
_COLUMNS: dict[frozenset[str], frozenset[str]] = {}
_JOURNAL_NAME = re.compile(r"journal-(\d+)\.jsonl")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Record:
    """One finished item of a shard. `atoms` is the structure as it was computed, None for failures.

    `wall_s` is what the reference calculation took, `rung` the ladder's rung that gave the result (0: no
    ladder needed), `tries` how those before it failed, and `found` says that the result was not computed here but found
    in a label store or at another item of the shard. With a `step` it is no item but a frame of that step on the way of
    item `index`, a relaxation, and `key` and label are those of a single-point of its own.
    """

    index: int
    key: str
    kind: Kind
    result: Label | Relaxation | Failure
    atoms: Atoms | None
    wall_s: float
    rung: int = 0
    attempt: int = 0
    found: bool = False
    tries: tuple[Try, ...] = ()
    step: int | None = None

    @property
    def done(self) -> bool:
        """Whether the item has its label or converged relaxation."""
        return not isinstance(self.result, Failure)


@dataclass(frozen=True)
class Entry:
    """Where a record stands in a journal, and what must be known of it to go on.

    `cause` is that of a failure, else None; `columns` names what a structure or its label has that others may lack.
    """

    index: int
    key: str
    kind: Kind
    cause: str | None
    step: int | None
    columns: frozenset[str]
    path: Path
    offset: int
    length: int

    @property
    def done(self) -> bool:
        """Whether the item has its label or converged relaxation."""
        return self.cause is None

    def read(self) -> Record:
        """The whole record."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            record = decode_line(file.read(self.length))
        assert record is not None, f"{self.path} has changed while it was read"
        return record


@dataclass(frozen=True)
class Listing:
    """What all attempts at a shard have left: a hundred thousand labels need not be in memory to know of them."""

    items: Mapping[int, Entry]
    """By item index: of several results the first label, or the last failure."""
    frames: Mapping[int, Sequence[Entry]]
    """The frames of each relaxation, in the order of its steps."""


class Journal:
    """Appends records to one file; each is on disk when `append` returns. One writer per file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._cut_torn_line()
            os.fsync(self._file)
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Write one durable line. OSError on a full disk; the journal is then as it was before."""
        line = encode_line(record)
        before = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        """A killed writer may have left half a line, with which the next record would be lost."""
        end = os.fstat(self._file).st_size
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        os.ftruncate(self._file, end)


def journal_path(folder: Path, attempt: int) -> Path:
    """Where attempt number `attempt` at a shard writes."""
    return folder / f"journal-{attempt}.jsonl"


def list_journals(folder: Path) -> Listing:
    """What the journals in a folder hold, in the order of the items."""
    items: dict[int, Entry] = {}
    frames: dict[int, dict[str, Entry]] = defaultdict(dict)
    for entry in _all_entries(folder):
        if entry.step is not None:
            frames[entry.index].setdefault(entry.key, entry)
            continue
        earlier = items.get(entry.index)
        if earlier is None or not earlier.done:
            items[entry.index] = entry
    return Listing(
        dict(sorted(items.items())),
        {index: sorted(of.values(), key=lambda e: e.step or 0) for index, of in sorted(frames.items())},
    )


def read_journals(folder: Path) -> dict[int, Record]:
    """The records of all items, by item index; see `list_journals`."""
    return {index: entry.read() for index, entry in list_journals(folder).items.items()}


def read_journal(path: Path) -> tuple[list[Record], int]:
    """The sound records of one journal, and how many lines are damaged; a torn last line does not count."""
    entries, num_damaged = _entries_of(path)
    return [entry.read() for entry in entries], num_damaged


def _entries_of(path: Path) -> tuple[list[Entry], int]:
    entries, num_damaged, offset = [], 0, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            body = _checked_body(line)
            if body is None:
                num_damaged += 1
            else:
                entries.append(_entry(body, path, offset, len(line) - 1))
            offset += len(line)
    return entries, num_damaged


def _entry(body: Mapping[str, Any], path: Path, offset: int, length: int) -> Entry:
    cause = body["failure"]["cause"] if "failure" in body else None
    columns = set(body.get("structure", ())) - _ALWAYS
    label = body.get("label", {})
    columns |= {"stress"} if label.get("stress") is not None else set()
    # One set for all that are alike: there may be a hundred thousand.
    shared = _COLUMNS.setdefault(frozenset(columns), frozenset(columns))
    return Entry(
        body["index"], body["key"], body["kind"], cause, body.get("step"), shared, path, offset, length
    )


def encode_line(record: Record) -> bytes:
    """One line of a journal, with its newline."""
    body = _compact(_as_json(record))
    return b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(body), body)


def decode_line(line: bytes) -> Record | None:
    """The record of a line without its newline, or None if a bit of it is wrong."""
    body = _checked_body(line)
    return None if body is None else _from_json(body)


def _checked_body(line: bytes) -> dict[str, Any] | None:
    try:
        outer = json.loads(line)
        body: dict[str, Any] = outer["record"]
        return body if outer["crc32"] == f"{zlib.crc32(_compact(body)):08x}" else None
    except (ValueError, KeyError, TypeError):
        return None


def _all_entries(folder: Path) -> Iterator[Entry]:
    numbered = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _JOURNAL_NAME.fullmatch(path.name))
    ]
    for _, path in sorted(numbered):
        entries, num_damaged = _entries_of(path)
        if num_damaged:
            log.warning("%s has %d damaged lines; their items count as not computed", path, num_damaged)
        yield from entries


def _compact(obj: Any) -> bytes:
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


_COMMON = ("index", "key", "kind", "wall_s", "rung", "attempt", "found")


def _as_json(record: Record) -> dict[str, Any]:
    entry = {name: getattr(record, name) for name in _COMMON}
    if record.tries:
        entry["tries"] = [vars(one) for one in record.tries]
    if record.step is not None:
        entry["step"] = record.step
    result = record.result
    if isinstance(result, Failure):
        return entry | {"failure": _failure_as_json(result)}
    assert record.atoms is not None
    entry["structure"] = _structure_as_json(record.atoms)
    if isinstance(result, Label):
        label = {
            "energy": result.energy,
            "energy_kind": result.energy_kind,
            "forces": result.forces_n3.tolist(),
            "stress": None if result.stress_6 is None else result.stress_6.tolist(),
        }
        if result.extra:
            label["extra"] = {name: values.tolist() for name, values in result.extra.items()}
        return entry | {"label": label}
    names = ("energy_start", "energy_relaxed", "energy_kind", "num_steps", "converged", "max_force")
    relaxation = {name: getattr(result, name) for name in names}
    relaxation["relaxed_positions"] = result.relaxed.positions.tolist()
    relaxation["relaxed_cell"] = result.relaxed.cell.array.tolist()
    return entry | {"relaxation": relaxation}


def _from_json(entry: Mapping[str, Any]) -> Record:
    common = {name: entry[name] for name in _COMMON}
    common["tries"] = tuple(Try(**one) for one in entry.get("tries", ()))
    common["step"] = entry.get("step")
    if "failure" in entry:
        return Record(result=_failure_from_json(entry["failure"]), atoms=None, **common)
    atoms = _structure_from_json(entry["structure"])
    if "label" in entry:
        return Record(result=_label_from_json(entry["label"]), atoms=atoms, **common)
    relaxation = dict(entry["relaxation"])
    relaxed = atoms.copy()
    relaxed.set_cell(np.array(relaxation.pop("relaxed_cell", atoms.cell.array), dtype=np.float64))
    relaxed.positions = np.array(relaxation.pop("relaxed_positions"), dtype=np.float64)
    return Record(result=Relaxation(start=atoms, relaxed=relaxed, **relaxation), atoms=atoms, **common)


def _label_from_json(label: Mapping[str, Any]) -> Label:
    arrays = {name: np.array(values, dtype=np.float64) for name, values in label.get("extra", {}).items()}
    stress_6 = None if label["stress"] is None else np.array(label["stress"], dtype=np.float64)
    forces_n3 = np.array(label["forces"], dtype=np.float64)
    return Label(label["energy"], label["energy_kind"], forces_n3, stress_6, arrays)


def _failure_as_json(failure: Failure) -> dict[str, str]:
    """What a code has printed is long and repeats itself."""
    if len(failure.output) < _LONG_OUTPUT:
        return dict(vars(failure))
    packed = base64.b64encode(zlib.compress(failure.output.encode())).decode()
    return {"cause": failure.cause, "message": failure.message, "packed_output": packed}


def _failure_from_json(entry: Mapping[str, str]) -> Failure:
    if "packed_output" not in entry:
        return Failure(**entry)
    output = zlib.decompress(base64.b64decode(entry["packed_output"])).decode()
    return Failure(entry["cause"], entry["message"], output)


def _structure_as_json(atoms: Atoms) -> dict[str, Any]:
    structure = {name: array.tolist() for name, array in atoms.arrays.items()}
    return structure | {"cell": atoms.cell.array.tolist(), "pbc": atoms.pbc.tolist()}


def _structure_from_json(structure: Mapping[str, Any]) -> Atoms:
    atoms = Atoms(**{name: structure[name] for name in _ALWAYS})
    for name in structure.keys() - _ALWAYS:
        atoms.set_array(name, np.array(structure[name], dtype=np.float64))
    return atoms

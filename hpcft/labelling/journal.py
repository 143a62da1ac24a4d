"""An append-only journal of finished items: after kill -9 it holds all reported ones, and no half of one.

One file per attempt, one JSON line per item with a CRC-32 of its record. Floats are written as their shortest
decimal form that reads back to the same 64 bits, so a label survives the way through the journal exactly.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Kind
from hpcft.labelling.label import Label, Relaxation

_JOURNAL_NAME = re.compile(r"journal-(\d+)\.jsonl")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Record:
    """One finished item of a shard. `atoms` is the structure as it was computed, None for failures.

    `wall_s` is what the reference calculation took, `rung` the ladder's rung that gave the result (0: no
    ladder needed), and `found` says that the result was not computed here but found in a label store or at
    another item of the shard.
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

    @property
    def done(self) -> bool:
        """Whether the item has its label or converged relaxation."""
        return not isinstance(self.result, Failure)


class Journal:
    """Appends records to one file; each is on disk when `append` returns. One writer per file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._cut_torn_line()
            os.fsync(self._file)
            _sync_folder(path.parent)
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
        size = os.fstat(self._file).st_size
        content = os.pread(self._file, size, 0)
        os.ftruncate(self._file, content.rfind(b"\n") + 1)


def journal_path(folder: Path, attempt: int) -> Path:
    """Where attempt number `attempt` at a shard writes."""
    return folder / f"journal-{attempt}.jsonl"


def read_journals(folder: Path) -> dict[int, Record]:
    """What all attempts finished, by item index: of several results the first label or the last failure."""
    finished: dict[int, Record] = {}
    for record in _all_records(folder):
        earlier = finished.get(record.index)
        if earlier is None or not earlier.done:
            finished[record.index] = record
    return dict(sorted(finished.items()))


def read_journal(path: Path) -> tuple[list[Record], int]:
    """The sound records of one journal, and how many lines are damaged; a torn last line does not count."""
    records, num_damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        record = decode_line(line)
        if record is None:
            num_damaged += 1
        else:
            records.append(record)
    return records, num_damaged


def encode_line(record: Record) -> bytes:
    """One line of a journal, with its newline."""
    body = _compact(_as_json(record))
    return b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(body), body)


def decode_line(line: bytes) -> Record | None:
    """The record of a line without its newline, or None if a bit of it is wrong."""
    try:
        outer = json.loads(line)
        body = outer["record"]
        if outer["crc32"] != f"{zlib.crc32(_compact(body)):08x}":
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return _from_json(body)


def _all_records(folder: Path) -> list[Record]:
    numbered = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _JOURNAL_NAME.fullmatch(path.name))
    ]
    everything = []
    for _, path in sorted(numbered):
        records, num_damaged = read_journal(path)
        if num_damaged:
            log.warning("%s has %d damaged lines; their items count as not computed", path, num_damaged)
        everything += records
    return everything


def _compact(obj: Any) -> bytes:
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _as_json(record: Record) -> dict[str, Any]:
    entry = {
        name: getattr(record, name) for name in ("index", "key", "kind", "wall_s", "rung", "attempt", "found")
    }
    result = record.result
    if isinstance(result, Failure):
        return entry | {"failure": vars(result)}
    assert record.atoms is not None
    entry["structure"] = _structure_as_json(record.atoms)
    if isinstance(result, Label):
        stress = None if result.stress_6 is None else result.stress_6.tolist()
        label = {
            "energy": result.energy,
            "energy_kind": result.energy_kind,
            "forces": result.forces_n3.tolist(),
            "stress": stress,
        }
        return entry | {"label": label}
    names = ("energy_start", "energy_relaxed", "energy_kind", "num_steps", "converged", "max_force")
    relaxation = {name: getattr(result, name) for name in names}
    relaxation["relaxed_positions"] = result.relaxed.positions.tolist()
    relaxation["relaxed_cell"] = result.relaxed.cell.array.tolist()
    return entry | {"relaxation": relaxation}


def _from_json(entry: Mapping[str, Any]) -> Record:
    common = {name: entry[name] for name in ("index", "key", "kind", "wall_s", "rung", "attempt", "found")}
    if "failure" in entry:
        return Record(result=Failure(**entry["failure"]), atoms=None, **common)
    atoms = _structure_from_json(entry["structure"])
    if "label" in entry:
        label = entry["label"]
        stress_6 = None if label["stress"] is None else np.array(label["stress"], dtype=np.float64)
        forces_n3 = np.array(label["forces"], dtype=np.float64)
        return Record(
            result=Label(label["energy"], label["energy_kind"], forces_n3, stress_6), atoms=atoms, **common
        )
    relaxation = dict(entry["relaxation"])
    relaxed = atoms.copy()
    relaxed.set_cell(np.array(relaxation.pop("relaxed_cell", atoms.cell.array), dtype=np.float64))
    relaxed.positions = np.array(relaxation.pop("relaxed_positions"), dtype=np.float64)
    return Record(result=Relaxation(start=atoms, relaxed=relaxed, **relaxation), atoms=atoms, **common)


def _structure_as_json(atoms: Atoms) -> dict[str, Any]:
    structure = {name: array.tolist() for name, array in atoms.arrays.items()}
    return structure | {"cell": atoms.cell.array.tolist(), "pbc": atoms.pbc.tolist()}


def _structure_from_json(structure: Mapping[str, Any]) -> Atoms:
    names = {"numbers", "positions", "cell", "pbc"}
    atoms = Atoms(**{name: structure[name] for name in names})
    for name in structure.keys() - names:
        atoms.set_array(name, np.array(structure[name], dtype=np.float64))
    return atoms


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

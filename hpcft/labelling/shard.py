"""A shard's journals as files for others: labels.h5, relaxations.h5, failures.json, and shard.json last.

`labels.h5`: structures with info REF_energy, REF_stress (a row of NaN for a structure without stress among
others with it; absent if no structure has one), key, index, energy_kind, wall_s, rung, found; arrays
REF_forces; where they were asked for, arrays REF_magmoms and REF_charges and info REF_dipole. `relaxations.h5`: start
structures with info energy_start, energy_relaxed, num_steps, max_force and the same bookkeeping; arrays
relaxed_positions (not wrapped), info relaxed_cell. `relaxation-frames.h5`: the labels on the way of the relaxations, also of
those that failed, as in labels.h5, with the relaxation's index and the step. `failed-outputs.gz`: what the calculations printed
that failed. A file is absent while it would be empty. `shard.json` lists the keys, row by row, and under `tables` what
the labels are judged by, so that whoever holds those of ten thousand shards against each other opens none of the other files.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Kind, plain_structure
from hpcft.labelling.journal import Entry, Listing, Record, list_journals
from hpcft.labelling.label import EXTRA_SHAPES, Label, Relaxation, with_label
from hpcft.labelling.label_table import LabelTable
from hpcft.storage.atomic import read_json, write_bytes, write_json
from hpcft.storage.seal import check_seal
from hpcft.storage.structures import read_structures, write_structures_in_blocks

SHARD_FILE = "shard.json"
LABELS_FILE = "labels.h5"
RELAXATIONS_FILE = "relaxations.h5"
FRAMES_FILE = "relaxation-frames.h5"
FAILURES_FILE = "failures.json"
OUTPUTS_FILE = "failed-outputs.gz"

_BOOKKEEPING = ("index", "key", "wall_s", "rung", "attempt", "found")
_BLOCK = 1_000  # structures in memory at once
# Characters of a failure's output that stand in failures.json; the rest is in failed-outputs.gz.
_SHOWN_OUTPUT = 4_000
_RELAXATION_VALUES = ("energy_start", "energy_relaxed", "num_steps", "max_force")


def finish_shard(folder: Path, attributes: Mapping[str, Any] | None = None) -> Path:
    """Publish what the journals in `folder` hold, in order of the items; returns the path of `shard.json`.

    May be repeated at any time, also with items missing: the same journals give the same files. `attributes`
    become the provenance of the HDF5 files.
    """
    listing = list_journals(folder)
    _refuse_to_forget(folder, listing)
    done = [entry for entry in listing.items.values() if entry.done]
    labels = [entry for entry in done if entry.kind == "single-point"]
    relaxations = [entry for entry in done if entry.kind == "relaxation"]
    frames = [entry for of in listing.frames.values() for entry in of]
    tables = {
        "labels": _write_labels(folder / LABELS_FILE, labels, attributes),
        "frames": _write_labels(folder / FRAMES_FILE, frames, attributes),
    }
    _write(folder / RELAXATIONS_FILE, relaxations, _relaxed, attributes)
    failures = [entry.read() for entry in listing.items.values() if not entry.done]
    write_json(folder / FAILURES_FILE, [_failed(record) for record in failures])
    if failures:
        write_bytes(folder / OUTPUTS_FILE, _outputs(failures))
    else:
        (folder / OUTPUTS_FILE).unlink(missing_ok=True)
    contents = {
        "format": 1,
        "labels": [entry.key for entry in labels],
        "relaxations": [entry.key for entry in relaxations],
        "frames": [entry.key for entry in frames],
        "num_failures": len(failures),
        "tables": {kind: table.as_json() for kind, table in tables.items()},
    }
    write_json(folder / SHARD_FILE, contents)
    return folder / SHARD_FILE


def _write_labels(path: Path, entries: Sequence[Entry], attributes: Mapping[str, Any] | None) -> LabelTable:
    tables: list[LabelTable] = []

    def note(block: Sequence[Atoms]) -> None:
        tables.append(LabelTable.of([atoms.info["key"] for atoms in block], block))

    _write(path, entries, _labelled, attributes, note)
    return LabelTable.joined(tables)


def _write(
    path: Path,
    entries: Sequence[Entry],
    as_row: Callable[[Record, frozenset[str]], Atoms],
    attributes: Mapping[str, Any] | None,
    note: Callable[[Sequence[Atoms]], None] = lambda block: None,
) -> None:
    """The rows of a file, no more than a block of them in memory, which `note` sees."""
    if not entries:
        return
    columns = frozenset[str]().union(*{entry.columns for entry in entries})

    def blocks() -> Iterator[Sequence[Atoms]]:
        for first in range(0, len(entries), _BLOCK):
            block = [as_row(entry.read(), columns) for entry in entries[first : first + _BLOCK]]
            note(block)
            yield block

    write_structures_in_blocks(path, blocks(), len(entries), attributes)


def _refuse_to_forget(folder: Path, listing: Listing) -> None:
    """A shard may outlive its journals; published labels are never replaced by fewer."""
    if not (folder / SHARD_FILE).exists():
        return
    published = read_json(folder / SHARD_FILE)
    lost = {*published["labels"], *published["relaxations"]} - {entry.key for entry in listing.items.values()}
    if lost:
        raise UserError(
            f"{folder} holds {len(lost)} published labels that its journals do not know; it is left as it is. Another "
            "process has finished it, or the journals were deleted."
        )


def read_shard(folder: Path) -> list[Record]:
    """The labels and converged relaxations that `finish_shard` published, by item index."""
    contents = read_json(folder / SHARD_FILE)
    records = _read(folder / LABELS_FILE, contents["labels"], _label_record)
    records += _read(folder / RELAXATIONS_FILE, contents["relaxations"], _relaxation_record)
    return sorted(records, key=lambda record: record.index)


def read_frames(folder: Path) -> list[Record]:
    """The labels on the way of a published shard's relaxations, by item index and step."""
    keys = read_json(folder / SHARD_FILE).get("frames", [])
    return _read(folder / FRAMES_FILE, keys, _label_record)


def read_table(folder: Path) -> LabelTable:
    """What all labels of a published shard are judged by, those on the way of its relaxations last."""
    contents = read_json(folder / SHARD_FILE)
    tables = []
    for kind, name in (("labels", LABELS_FILE), ("frames", FRAMES_FILE)):
        keys = contents.get(kind)
        if not keys:
            continue
        if (columns := contents.get("tables", {}).get(kind)) is not None:
            tables.append(LabelTable.from_json(keys, columns))
        else:  # a shard of before there were tables
            tables.append(LabelTable.read(folder / name))
    return tables[0] if len(tables) == 1 else LabelTable.joined(tables)


def read_records(folder: Path, keys: Collection[str]) -> list[Record]:
    """What a published shard has under some keys, relaxations and frames among them; no more than that is made of its files."""
    contents = read_json(folder / SHARD_FILE)
    files = {"labels": LABELS_FILE, "relaxations": RELAXATIONS_FILE, "frames": FRAMES_FILE}
    found: list[Record] = []
    for kind, name in files.items():
        rows = [row for row, key in enumerate(contents.get(kind, ())) if key in keys]
        if not rows:
            continue
        check_seal(folder / name)
        to_record = _relaxation_record if kind == "relaxations" else _label_record
        found += [to_record(atoms) for atoms in read_structures(folder / name, rows)]
    if all(record.key in keys for record in found):
        return found
    # A later attempt has published meanwhile: its rows are others.
    return [record for record in (*read_shard(folder), *read_frames(folder)) if record.key in keys]


def _read(path: Path, keys: Sequence[str], to_record: Callable[[Atoms], Record]) -> list[Record]:
    if not keys:
        return []
    records = [to_record(atoms) for atoms in read_structures(path)]
    # A later attempt may publish between our reading of shard.json and of this file; then there is more than
    # was promised.
    if not set(keys) <= {record.key for record in records}:
        raise UserError(
            f"{path} lacks labels that {path.with_name(SHARD_FILE)} lists; call finish_shard on it again."
        )
    return records


def _labelled(record: Record, columns: frozenset[str]) -> Atoms:
    label = record.result
    assert isinstance(label, Label)
    atoms = with_label(_structure(record, columns), label, extra=True)
    atoms.info |= _bookkeeping(record) | {"energy_kind": label.energy_kind}
    if record.step is not None:
        atoms.info["step"] = record.step
    if "stress" in columns:
        atoms.info.setdefault("REF_stress", np.full(6, np.nan))
    return atoms


def _relaxed(record: Record, columns: frozenset[str]) -> Atoms:
    assert isinstance(record.result, Relaxation)
    atoms = _structure(record, columns)
    values = {name: getattr(record.result, name) for name in (*_RELAXATION_VALUES, "energy_kind")}
    atoms.info = _bookkeeping(record) | values
    atoms.set_array("relaxed_positions", record.result.relaxed.positions)
    atoms.info["relaxed_cell"] = record.result.relaxed.cell.array.ravel()
    return atoms


def _structure(record: Record, columns: frozenset[str]) -> Atoms:
    """The structure with all arrays that any has: an initial moment or charge that is not set is 0."""
    assert record.atoms is not None
    atoms = record.atoms.copy()
    for name in sorted(columns - {"stress"} - atoms.arrays.keys()):
        atoms.set_array(name, np.zeros(len(atoms)))
    return atoms


def _failed(record: Record) -> dict[str, Any]:
    names = ("index", "key", "kind", "wall_s", "attempt")
    entry = {name: getattr(record, name) for name in names} | vars(record.result)
    entry["output"] = entry["output"][-_SHOWN_OUTPUT:]
    return entry | {"tries": [vars(one) for one in record.tries]}


def _outputs(failures: Sequence[Record]) -> bytes:
    text = (
        f"===== item {record.index}: {record.result.cause} =====\n{record.result.output}\n"
        for record in failures
        if isinstance(record.result, Failure)
    )
    return gzip.compress("".join(text).encode(), mtime=0)


def _bookkeeping(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _BOOKKEEPING}


def _label_record(atoms: Atoms) -> Record:
    info = atoms.info
    stress_6 = info.get("REF_stress")
    columns = {**info, **atoms.arrays}
    label = Label(
        energy=float(info["REF_energy"]),
        energy_kind=info["energy_kind"],
        forces_n3=atoms.arrays["REF_forces"],
        stress_6=None if stress_6 is None or np.isnan(stress_6).all() else np.asarray(stress_6),
        extra={name: np.asarray(columns[f"REF_{name}"]) for name in EXTRA_SHAPES if f"REF_{name}" in columns},
    )
    return replace(_record(atoms, "single-point", label), step=info.get("step"))


def _relaxation_record(atoms: Atoms) -> Record:
    start = plain_structure(atoms)
    relaxed = start.copy()
    if "relaxed_cell" in atoms.info:  # not in files of before cells could relax
        relaxed.set_cell(np.asarray(atoms.info["relaxed_cell"]).reshape(3, 3))
    relaxed.positions = atoms.arrays["relaxed_positions"]
    values = {name: atoms.info[name] for name in (*_RELAXATION_VALUES, "energy_kind")}
    return _record(atoms, "relaxation", Relaxation(start=start, relaxed=relaxed, converged=True, **values))


def _record(atoms: Atoms, kind: Kind, result: Label | Relaxation) -> Record:
    return Record(
        kind=kind,
        result=result,
        atoms=plain_structure(atoms),
        **{name: atoms.info[name] for name in _BOOKKEEPING},
    )

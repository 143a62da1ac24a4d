"""A shard's journals as files for others: labels.h5, relaxations.h5, failures.json, and shard.json last.

`labels.h5`: structures with info REF_energy, REF_stress (a row of NaN for a structure without stress among
others with it; absent if no structure has one), key, index, energy_kind, wall_s, rung, found; arrays
REF_forces; where they were asked for, arrays REF_magmoms and REF_charges and info REF_dipole. `relaxations.h5`: start
structures with info energy_start, energy_relaxed, num_steps, max_force and the same bookkeeping; arrays
relaxed_positions (not wrapped), info relaxed_cell. `relaxation-frames.h5`: the labels on the way of the relaxations, also of
those that failed, as in labels.h5, with the relaxation's index and the step. `failed-outputs.gz`: what the calculations printed
that failed. A file is absent while it would be empty. `shard.json` lists the keys, row by row.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Kind, plain_structure
from hpcft.labelling.journal import Record, list_journals
from hpcft.labelling.label import EXTRA_SHAPES, Label, Relaxation
from hpcft.storage.atomic import read_json, write_bytes, write_json
from hpcft.storage.structures import read_structures, write_structures

SHARD_FILE = "shard.json"
LABELS_FILE = "labels.h5"
RELAXATIONS_FILE = "relaxations.h5"
FRAMES_FILE = "relaxation-frames.h5"
FAILURES_FILE = "failures.json"
OUTPUTS_FILE = "failed-outputs.gz"

_BOOKKEEPING = ("index", "key", "wall_s", "rung", "attempt", "found")
_SHOWN_OUTPUT = (
    4_000  # characters of a failure's output that stand in failures.json; the rest is in failed-outputs.gz
)
_RELAXATION_VALUES = ("energy_start", "energy_relaxed", "num_steps", "max_force")


def finish_shard(folder: Path, attributes: Mapping[str, Any] | None = None) -> Path:
    """Publish what the journals in `folder` hold, in order of the items; returns the path of `shard.json`.

    May be repeated at any time, also with items missing: the same journals give the same files. `attributes`
    become the provenance of the HDF5 files.
    """
    listing = list_journals(folder)
    records = [entry.read() for entry in listing.items.values()]
    _refuse_to_forget(folder, records)
    frames = [entry.read() for of in listing.frames.values() for entry in of]
    labels = [record for record in records if isinstance(record.result, Label)]
    relaxations = [record for record in records if isinstance(record.result, Relaxation)]
    failures = [record for record in records if isinstance(record.result, Failure)]
    rows = {
        LABELS_FILE: _labelled(labels),
        RELAXATIONS_FILE: [_relaxed(record) for record in relaxations],
        FRAMES_FILE: _labelled(frames),
    }
    for name, structures in rows.items():
        if structures:
            write_structures(folder / name, _same_arrays(structures), attributes)
    write_json(folder / FAILURES_FILE, [_failed(record) for record in failures])
    if failures:
        write_bytes(folder / OUTPUTS_FILE, _outputs(failures))
    contents = {
        "format": 1,
        "labels": [record.key for record in labels],
        "relaxations": [record.key for record in relaxations],
        "frames": [record.key for record in frames],
        "num_failures": len(failures),
    }
    write_json(folder / SHARD_FILE, contents)
    return folder / SHARD_FILE


def _refuse_to_forget(folder: Path, records: Sequence[Record]) -> None:
    """A shard may outlive its journals; published labels are never replaced by fewer."""
    if not (folder / SHARD_FILE).exists():
        return
    published = read_json(folder / SHARD_FILE)
    lost = {*published["labels"], *published["relaxations"]} - {record.key for record in records}
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


def _labelled(records: Sequence[Record]) -> list[Atoms]:
    results = [record.result for record in records if isinstance(record.result, Label)]
    with_stress = any(label.stress_6 is not None for label in results)
    structures = []
    for record, label in zip(records, results, strict=True):
        assert record.atoms is not None
        atoms = record.atoms.copy()
        atoms.info = _bookkeeping(record) | {"REF_energy": label.energy, "energy_kind": label.energy_kind}
        if record.step is not None:
            atoms.info["step"] = record.step
        if with_stress:
            atoms.info["REF_stress"] = np.full(6, np.nan) if label.stress_6 is None else label.stress_6
        atoms.set_array("REF_forces", label.forces_n3)
        for name, values in label.extra.items():
            if EXTRA_SHAPES[name] is not None:
                atoms.info[f"REF_{name}"] = values
            else:
                atoms.set_array(f"REF_{name}", values)
        structures.append(atoms)
    return structures


def _relaxed(record: Record) -> Atoms:
    assert isinstance(record.result, Relaxation)
    atoms = record.result.start.copy()
    values = {name: getattr(record.result, name) for name in (*_RELAXATION_VALUES, "energy_kind")}
    atoms.info = _bookkeeping(record) | values
    atoms.set_array("relaxed_positions", record.result.relaxed.positions)
    atoms.info["relaxed_cell"] = record.result.relaxed.cell.array.ravel()
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


def _same_arrays(structures: Sequence[Atoms]) -> list[Atoms]:
    """Give every structure the arrays that any has: an initial moment or charge that is not set is 0."""
    names: dict[str, Any] = {name: array for atoms in structures for name, array in atoms.arrays.items()}
    for atoms in structures:
        for name in names.keys() - atoms.arrays.keys():
            atoms.set_array(name, np.zeros((len(atoms), *names[name].shape[1:])))
    return list(structures)


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

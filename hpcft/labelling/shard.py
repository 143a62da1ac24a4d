"""A shard's journals as files for others: labels.h5, relaxations.h5, failures.json, and shard.json last.

`labels.h5`: structures with info REF_energy, REF_stress (a row of NaN for a structure without stress among
others with it; absent if no structure has one), key, index, energy_kind, wall_s, rung, found; arrays
REF_forces. `relaxations.h5`: start structures with info energy_start, energy_relaxed, num_steps, max_force
and the same bookkeeping; arrays relaxed_positions (not wrapped), info relaxed_cell. Either file is absent while it would be
empty. `shard.json` lists the keys of both, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Kind, plain_structure
from hpcft.labelling.journal import Record, read_journals
from hpcft.labelling.label import Label, Relaxation
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.structures import read_structures, write_structures

SHARD_FILE = "shard.json"
LABELS_FILE = "labels.h5"
RELAXATIONS_FILE = "relaxations.h5"
FAILURES_FILE = "failures.json"

_BOOKKEEPING = ("index", "key", "wall_s", "rung", "attempt", "found")
_RELAXATION_VALUES = ("energy_start", "energy_relaxed", "num_steps", "max_force")


def finish_shard(folder: Path, attributes: Mapping[str, Any] | None = None) -> Path:
    """Publish what the journals in `folder` hold, in order of the items; returns the path of `shard.json`.

    May be repeated at any time, also with items missing: the same journals give the same files. `attributes`
    become the provenance of the HDF5 files.
    """
    records = list(read_journals(folder).values())
    _refuse_to_forget(folder, records)
    labels = [record for record in records if isinstance(record.result, Label)]
    relaxations = [record for record in records if isinstance(record.result, Relaxation)]
    failures = [record for record in records if isinstance(record.result, Failure)]
    if labels:
        with_stress = any(
            record.result.stress_6 is not None for record in labels if isinstance(record.result, Label)
        )
        structures = [_labelled(record, with_stress) for record in labels]
        write_structures(folder / LABELS_FILE, with_same_arrays(structures), attributes)
    if relaxations:
        structures = [_relaxed(record) for record in relaxations]
        write_structures(folder / RELAXATIONS_FILE, with_same_arrays(structures), attributes)
    write_json(folder / FAILURES_FILE, [_failed(record) for record in failures])
    contents = {
        "format": 1,
        "labels": [record.key for record in labels],
        "relaxations": [record.key for record in relaxations],
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


def _labelled(record: Record, with_stress: bool) -> Atoms:
    assert record.atoms is not None and isinstance(record.result, Label)
    atoms = record.atoms.copy()
    atoms.info = _bookkeeping(record) | {
        "REF_energy": record.result.energy,
        "energy_kind": record.result.energy_kind,
    }
    if with_stress:
        stress_6 = record.result.stress_6
        atoms.info["REF_stress"] = np.full(6, np.nan) if stress_6 is None else stress_6
    atoms.set_array("REF_forces", record.result.forces_n3)
    return atoms


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
    return {name: getattr(record, name) for name in names} | vars(record.result)


def _bookkeeping(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _BOOKKEEPING}


def with_same_arrays(structures: Sequence[Atoms]) -> list[Atoms]:
    """Give every structure the arrays that any has: an initial moment or charge that is not set is 0."""
    names: dict[str, Any] = {name: array for atoms in structures for name, array in atoms.arrays.items()}
    for atoms in structures:
        for name in names.keys() - atoms.arrays.keys():
            atoms.set_array(name, np.zeros((len(atoms), *names[name].shape[1:])))
    return list(structures)


def _label_record(atoms: Atoms) -> Record:
    info = atoms.info
    stress_6 = info.get("REF_stress")
    label = Label(
        energy=float(info["REF_energy"]),
        energy_kind=info["energy_kind"],
        forces_n3=atoms.arrays["REF_forces"],
        stress_6=None if stress_6 is None or np.isnan(stress_6).all() else np.asarray(stress_6),
    )
    return _record(atoms, "single-point", label)


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

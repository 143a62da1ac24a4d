"""A user's own calculations as labels of a store, so that they are never computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase import Atoms

from hpcft.errors import LabelError, UserError
from hpcft.labelling.code_outputs import FoundFrame, read_frames
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Record, encode_line, journal_path
from hpcft.labelling.label import EnergyKind, Label, check_net_force
from hpcft.labelling.labelled_frame import LabelKeys, calculator_results, frame_of, labelled_atoms
from hpcft.labelling.reference import Reference, unknown_elements
from hpcft.labelling.sanity import ABSURD_FORCE, ABSURD_STRESS, absurd_stress, disagreement
from hpcft.labelling.shard import finish_shard
from hpcft.labelling.store import LabelStore
from hpcft.storage.atomic import write_bytes

_SHOWN = 10
_IMPORTS = "imports"


@dataclass(frozen=True)
class Import:
    """What came of an import: labels that are new, that the store (or an earlier frame) had, and frames left out and why."""

    num_new: int
    num_known: int
    skipped: Sequence[str]


@dataclass
class _Gathered:
    records: dict[str, Record] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    num_repeated: int = 0
    faults: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def import_labels(
    store: LabelStore,
    paths: Sequence[Path],
    reference: Reference,
    *,
    keys: LabelKeys | None = None,
    skip_faulty: bool = False,
) -> Import:
    """Make one finished shard, below the store, of all labels in the files that the store does not have; and register it.

    That the numbers are those of `reference` is the user's word. `keys`: the names of the labels in the files; None: REF_energy
    and its like where a file has them, otherwise what ASE has as a calculator's results. May be repeated.

    Raises UserError, with nothing imported, for frames that are no labels (unless `skip_faulty` leaves them out) and for
    structures whose labels differ from each other or from the store's.
    """
    if reference.properties:
        raise UserError(
            f"The reference asks for {', '.join(reference.properties)}, which imported labels do not have; leave "
            "reference.properties out, or have these structures computed."
        )
    gathered = _Gathered()
    for path in paths:
        _gather(path, reference, keys, gathered)
    known = store.find(gathered.records)
    for key, record in known.items():
        _compare(gathered, key, record, "the store")
    _refuse(gathered, skip_faulty)
    new = [record for key, record in gathered.records.items() if key not in known]
    if new:
        _publish(store, new, reference, paths)
    return Import(len(new), len(known) + gathered.num_repeated, gathered.faults)


def _gather(path: Path, reference: Reference, keys: LabelKeys | None, gathered: _Gathered) -> None:
    frames, is_output = read_frames(path)
    keys = keys or _keys_of(frames, is_output, reference)
    for index, frame in enumerate(frames):
        name = f"frame {index} of {path}"
        try:
            record = _record(frame, len(gathered.records), keys, reference)
        except LabelError as error:
            gathered.faults.append(f"{name}: {error}")
            continue
        if record.key in gathered.records:
            gathered.num_repeated += 1
            _compare(gathered, record.key, record, name)
        else:
            gathered.records[record.key], gathered.names[record.key] = record, name


def _keys_of(frames: Sequence[FoundFrame], is_output: bool, reference: Reference) -> LabelKeys:
    """REF_* where a file has it; ASE's results otherwise, of which `energy` may be the one without the electrons' entropy."""
    named = LabelKeys()
    if not is_output and any(
        named.energy in frame.atoms.info or named.forces in frame.atoms.arrays for frame in frames
    ):
        return named
    has_free = any("free_energy" in calculator_results(frame.atoms) for frame in frames)
    energy = "free_energy" if has_free and reference.energy == "free" else "energy"
    return LabelKeys(energy, "forces", "stress")


def _record(frame: FoundFrame, index: int, keys: LabelKeys, reference: Reference) -> Record:
    """LabelError that says why the frame is no label."""
    if frame.fault:
        raise LabelError("unsound", frame.fault)
    atoms = labelled_atoms(frame_of(frame.atoms, keys), "")
    forces_n3 = atoms.arrays["REF_forces"]
    check_net_force(forces_n3)
    if (largest := float(abs(forces_n3).max())) > ABSURD_FORCE:
        raise LabelError(
            "force",
            f"it has a force of {largest:.4g} eV/Å, and no reference gives more than {ABSURD_FORCE:g}",
        )
    stress_6 = atoms.info.get("REF_stress")
    if stress_6 is not None and (largest := float(abs(stress_6).max())) > ABSURD_STRESS:
        raise LabelError("stress", absurd_stress(largest))
    if unknown := unknown_elements(reference, atoms.numbers):
        raise LabelError("element", f"it has {', '.join(unknown)}, which the reference does not know")
    label = Label(
        energy=atoms.info["REF_energy"],
        energy_kind=_energy_kind(frame.atoms, keys, reference),
        forces_n3=forces_n3,
        stress_6=stress_6,
    )
    item = Item.single_point(frame.atoms)
    return Record(index, item_key(item, reference), "single-point", label, item.atoms, wall_s=0.0, found=True)


def _energy_kind(atoms: Atoms, keys: LabelKeys, reference: Reference) -> EnergyKind:
    """As the file says, by the name of its energy or by what hpcft wrote beside it; else what the reference asks for."""
    said: Any = keys.energy if keys.energy in ("energy", "free_energy") else atoms.info.get("energy_kind")
    if said == "energy":
        return "energy"
    return "free_energy" if said == "free_energy" or reference.energy == "free" else "energy"


def _compare(gathered: _Gathered, key: str, other: Record, where: str) -> None:
    one = gathered.records[key].result
    assert isinstance(one, Label)
    assert isinstance(other.result, Label)
    if difference := disagreement(one, other.result):
        gathered.contradictions.append(f"{gathered.names[key]} and {where}: {difference}")


def _refuse(gathered: _Gathered, skip_faulty: bool) -> None:
    if gathered.contradictions:
        raise UserError(
            f"{len(gathered.contradictions)} structures have labels that differ: {_some(gathered.contradictions)}. Nothing was "
            "imported. Labels of one structure by one reference agree: are these files from the reference that you named?"
        )
    count = len(gathered.faults) + len(gathered.records) + gathered.num_repeated
    if gathered.faults and not (skip_faulty and gathered.records):
        remedy = (
            "Correct the files, or import the others with --skip-faulty."
            if gathered.records
            else "Correct the files. Labels of other names are found with --energy-key and --forces-key; structures without any "
            "are labelled by hpcft label."
        )
        raise UserError(
            f"{len(gathered.faults)} of {count} structures are no labels: {_some(gathered.faults)}. Nothing was imported. "
            f"{remedy}"
        )
    if not count:
        raise UserError(
            "The files hold no structure with results; is each of them the output of a finished calculation?"
        )


def _some(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _publish(
    store: LabelStore, records: Sequence[Record], reference: Reference, paths: Sequence[Path]
) -> None:
    """The folder is named by what is in it, so that an import that was killed is completed by repeating it."""
    content = "".join(record.key for record in records)
    folder = store.folder / _IMPORTS / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"imported_from": [str(path.absolute()) for path in paths]}
    journal = journal_path(folder, 0)
    write_bytes(journal, b"".join(map(encode_line, records)))
    finish_shard(folder, reference.provenance() | origin)
    store.register(folder)
    journal.unlink()  # it says all of this once more, in text

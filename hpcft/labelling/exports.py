"""What is in a label store: counted, and as one list of structures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from hpcft.errors import UserError
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Record
from hpcft.labelling.label import Label, with_label
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import (
    FRAMES_FILE,
    LABELS_FILE,
    RELAXATIONS_FILE,
    SHARD_FILE,
    read_frames,
    read_shard,
)
from hpcft.labelling.store import LabelStore
from hpcft.storage.atomic import read_json
from hpcft.storage.structures import read_provenance


@dataclass(frozen=True)
class Contents:
    """`labels` by reference and `origins` (campaigns, imports): each structure counts once, at the first that has it."""

    labels: dict[str, int]
    origins: dict[str, int]
    num_relaxations: int
    num_shards: int


def contents(store: LabelStore) -> Contents:
    """Counts, for which no label is read."""
    labels, origins = Counter[str](), Counter[str]()
    seen, relaxations, num_shards = set[str](), set[str](), 0
    for shard in store.shards():
        listed = read_json(shard / SHARD_FILE)
        new = {*listed["labels"], *listed.get("frames", ())} - seen
        seen |= new
        relaxations.update(listed["relaxations"])
        num_shards += 1
        if new:
            about = _provenance(shard)
            labels[_reference_in(about)] += len(new)
            origins[_origin_in(about)] += len(new)
    return Contents(dict(labels), dict(origins), len(relaxations), num_shards)


def labelled_structures(store: LabelStore, reference: Reference | None = None) -> Iterator[Atoms]:
    """Every label once, as MACE reads it: REF_energy, REF_stress, REF_forces; key, energy_kind and provenance beside them.

    With `reference` those of this reference only. Without it UserError if there are several, whose energies must not be mixed.
    """
    references, seen = set[str](), set[str]()
    for shard in store.shards():
        about = _provenance(shard)
        for record in (*read_shard(shard), *read_frames(shard)):
            if not isinstance(record.result, Label) or record.key in seen or not _is_of(record, reference):
                continue
            seen.add(record.key)
            references.add(_reference_in(about))
            if reference is None and len(references) > 1:
                raise UserError(
                    f"{store.folder} holds labels of several references ({', '.join(sorted(references))}), whose energies "
                    "must not be mixed; say of which one by --reference."
                )
            yield _structure(record, record.result, about)


def _structure(record: Record, label: Label, about: dict[str, Any]) -> Atoms:
    assert record.atoms is not None
    atoms = with_label(record.atoms, label, extra=True)
    atoms.info |= {
        "key": record.key,
        "energy_kind": label.energy_kind,
        "reference": _reference_in(about),
        "origin": _origin_in(about),
    }
    return atoms


def _is_of(record: Record, reference: Reference | None) -> bool:
    if reference is None:
        return True
    return record.atoms is not None and record.key == item_key(Item.single_point(record.atoms), reference)


def _provenance(shard: Path) -> dict[str, Any]:
    for name in (LABELS_FILE, RELAXATIONS_FILE, FRAMES_FILE):
        if (shard / name).is_file():
            return read_provenance(shard / name)
    return {}


def _reference_in(about: dict[str, Any]) -> str:
    """The calculator, and a sign of its settings where the shard has it."""
    calculator = str(about.get("reference", "unknown reference"))
    fingerprint = str(about.get("reference_fingerprint", ""))[:8]
    return f"{calculator} ({fingerprint})" if fingerprint else calculator


def _origin_in(about: dict[str, Any]) -> str:
    if "campaign" in about:
        return f"campaign {about['campaign']}"
    files = about.get("imported_from", ())
    return f"imported from {', '.join(files)}" if len(files) else "unknown origin"

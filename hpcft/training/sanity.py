"""When a training has gone wrong, and which labels may be to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from ase import Atoms

from hpcft.labelling.sanity import ABSURD_FORCE
from hpcft.training.data import LabelledSet

_SHOWN = 5


class NotFinite(RuntimeError):
    """Training met numbers that are none, or absurd; the message says in which step and on which structures."""


def what_to_do(sets: Mapping[str, LabelledSet | None]) -> str:
    """Names the structures whose labels no training can fit; where there are none, the settings that may help."""
    found = [
        f"structure {index} of {name}{_origin(atoms)} {fault}"
        for name, data in sets.items()
        if data is not None
        for index, atoms in enumerate(data.structures)
        for fault in _faults(atoms)
    ]
    if not found:
        return (
            "All labels look sane: lower train.learning_rate, or set train.gradient_clip, in a new campaign."
        )
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{'; '.join(found[:_SHOWN])}{more}. Look at what the reference did there: such labels cannot be learned."


def _faults(atoms: Atoms) -> Iterator[str]:
    forces = np.asarray(atoms.arrays["REF_forces"])
    if not np.isfinite(float(atoms.info["REF_energy"])):
        yield "has an energy that is not finite"
    if not np.isfinite(forces).all():
        yield "has forces that are not finite"
    elif len(forces) and (largest := float(np.linalg.norm(forces, axis=1).max())) > ABSURD_FORCE:
        yield f"has a force of {largest:.3g} eV/Å"


def _origin(atoms: Atoms) -> str:
    return f" ({atoms.info['origin']})" if "origin" in atoms.info else ""

"""What the folder of `hpcft label` starts from, checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from hpcft.campaign.create import check_reference
from hpcft.campaign.new_folder import REFERENCE_COPY, Contents, made_or_found
from hpcft.config.label_run import LabelRun
from hpcft.errors import UserError
from hpcft.labelling.item import Item, plain_structure
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.structures import read_any


def open_or_create_labels(
    run: LabelRun, source: Path, root: Path, *, take_over: bool = False
) -> CampaignFolder:
    """The run's folder, made now or found from an earlier run of the very same command; `source` describes the reference.

    Raises UserError before anything is written, also for a structure that the reference does not know or that cannot be
    relaxed as wished. See `made_or_found`.
    """
    return made_or_found(run, source, root, lambda: _contents(run, source), take_over=take_over)


def _contents(run: LabelRun, source: Path) -> Contents:
    return Contents(files={REFERENCE_COPY: source}, structures={"structures": _plain(read_suitable(run))})


def read_suitable(run: LabelRun) -> list[Atoms]:
    """The structures of a run; UserError for one that the reference does not know or that cannot be relaxed as wished."""
    structures = read_any(run.structures)
    check_reference(run.reference, {run.structures.name: structures})
    if run.relaxation is not None:
        for index, atoms in enumerate(structures):
            _check_relaxation(run, index, atoms)
    return structures


def _check_relaxation(run: LabelRun, index: int, atoms: Atoms) -> None:
    assert run.relaxation is not None
    try:
        Item.relaxation(
            atoms,
            fmax=run.relaxation.fmax,
            max_steps=run.relaxation.max_steps,
            with_cell=run.relaxation.cell,
        )
    except UserError as refusal:
        raise UserError(f"structure {index} of {run.structures.name}: {refusal}") from refusal


def _plain(structures: Sequence[Atoms]) -> list[Atoms]:
    """What decides a label, and texts such as config_type, which need not be the same in every frame."""
    kept = [plain_structure(atoms) for atoms in structures]
    arrays = {name: array for plain in kept for name, array in plain.arrays.items()}
    for plain, atoms in zip(kept, structures, strict=True):
        for name in arrays.keys() - plain.arrays.keys():  # a moment or charge that is not set is 0
            plain.set_array(name, np.zeros((len(plain), *arrays[name].shape[1:])))
        plain.info = {
            key: value for key, value in atoms.info.items() if isinstance(key, str) and isinstance(value, str)
        }
    return kept

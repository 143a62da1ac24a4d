"""What a campaign's folder starts from, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from hpcft.campaign.new_folder import CAMPAIGN_COPY, Contents, made_or_found
from hpcft.config.campaign import Campaign
from hpcft.config.reference import Reference
from hpcft.errors import UserError
from hpcft.labelling.reference import check_arguments, reference_from, unknown_elements, unsuitable
from hpcft.labelling.requirements import missing_data_sets
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.structures import read_any


def open_or_create(
    campaign: Campaign, source: Path, root: Path, *, take_over: bool = False
) -> CampaignFolder:
    """The campaign's folder, made now or found from an earlier run of the very same campaign.

    Raises UserError before anything is written, also for structures with an element that the model or the reference does
    not know, and a reference that cannot be built. See `made_or_found`.
    """
    return made_or_found(campaign, source, root, lambda: _contents(campaign, source), take_over=take_over)


def _contents(campaign: Campaign, source: Path) -> Contents:
    structures = _read_inputs(campaign)
    _check_replay(structures.get("replay", ()))
    _check_elements(campaign, structures)
    _check_plain(structures)
    _check_cells(campaign, structures["structures"])
    foundation = f"foundation{campaign.foundation.suffix}"
    return Contents(
        files={f"inputs/{foundation}": campaign.foundation, CAMPAIGN_COPY: source},
        structures={
            name: [_plain(atoms, name == "replay") for atoms in group] for name, group in structures.items()
        },
        about={"foundation_file": foundation},
    )


def _read_inputs(campaign: Campaign) -> dict[str, Sequence[Atoms]]:
    found: dict[str, Sequence[Atoms]] = {
        name: read_any(path) for name, path in campaign.structure_files().items()
    }
    if campaign.relaxations.cell:
        for name in {"relaxations-train", "relaxations-test"} & found.keys():
            for index, atoms in enumerate(found[name]):
                if not (atoms.pbc.all() and atoms.cell.rank == 3):
                    raise UserError(
                        f"structure {index} of {name} ({atoms.get_chemical_formula()}) is not periodic in all directions, and "
                        "relaxations.cell lets cells relax; leave it out, or relax all at fixed cell"
                    )
    return found


def _check_replay(structures: Sequence[Atoms]) -> None:
    for index, atoms in enumerate(structures):
        if "REF_energy" not in atoms.info or "REF_forces" not in atoms.arrays:
            raise UserError(
                f"structure {index} of train.replay.file has no REF_energy or no REF_forces, so it cannot be replayed; "
                "write its labels under these keys"
            )


def _check_elements(campaign: Campaign, structures: dict[str, Sequence[Atoms]]) -> None:
    from hpcft.models.files import elements_of_file  # torch, and only where a campaign begins

    known_to_model = elements_of_file(campaign.foundation)
    for name, group in structures.items():
        numbers = sorted({int(number) for atoms in group for number in atoms.numbers})
        unlearnt = [chemical_symbols[n] for n in numbers if n not in known_to_model]
        if unlearnt:
            raise UserError(
                f"{name} contains {', '.join(unlearnt)}, which the foundation model {campaign.foundation.name} does not know "
                f"(it knows {', '.join(chemical_symbols[n] for n in sorted(known_to_model))})"
            )
    check_reference(
        campaign.reference, {name: group for name, group in structures.items() if name != "replay"}
    )


def check_reference(wish: Reference, structures: Mapping[str, Sequence[Atoms]]) -> None:
    """UserError for a reference that takes other arguments, lacks a data set, or cannot do one of the structures."""
    reference = reference_from(wish)
    check_arguments(reference)
    for name, group in structures.items():
        numbers: set[int] = set()
        for atoms in group:
            numbers.update(atoms.numbers.tolist())
        if unknown := unknown_elements(reference, numbers):
            raise UserError(f"{name} contains {', '.join(unknown)}, which {wish.calculator} does not know")
        for index, atoms in enumerate(group):
            if problem := unsuitable(reference, atoms):
                raise UserError(
                    f"structure {index} of {name}: {problem}; take it out, or choose another reference"
                )
        missing = missing_data_sets(reference, [chemical_symbols[number] for number in sorted(numbers)])
        if certain := [lack.what for lack in missing if not lack.may_come_later]:
            raise UserError("\n".join(certain))


def _check_plain(structures: dict[str, Sequence[Atoms]]) -> None:
    """What MD, selection and labels would silently drop is refused."""
    for name, group in structures.items():
        for index, atoms in enumerate(group):
            carried = [
                what
                for what, is_there in (
                    ("constraints", bool(atoms.constraints)),
                    ("initial magnetic moments", np.any(atoms.get_initial_magnetic_moments())),
                    ("initial charges", np.any(atoms.get_initial_charges())),
                    ("masses of its own", atoms.has("masses")),
                )
                if is_there
            ]
            if carried:
                raise UserError(
                    f"structure {index} of {name} carries {', '.join(carried)}, which a campaign does not keep yet; its "
                    "results would be those of another system. Remove them if that is what you mean."
                )


def _check_cells(campaign: Campaign, structures: Sequence[Atoms]) -> None:
    """A barostat needs cells that can breathe."""
    if not campaign.explore.ensemble.startswith("npt"):
        return
    for index, atoms in enumerate(structures):
        if not (atoms.pbc.all() and np.linalg.det(atoms.cell.array) > 0):
            raise UserError(
                f"structure {index} of structures ({atoms.get_chemical_formula()}) is not periodic in all directions with a "
                f"right-handed cell, which explore.ensemble: {campaign.explore.ensemble} needs; leave it out, or choose nvt"
            )


def _plain(atoms: Atoms, with_labels: bool) -> Atoms:
    """Structure alone, or with its REF_ labels; a user's other columns need not be the same in every frame."""
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if with_labels:
        plain.info = {key: value for key, value in atoms.info.items() if key in ("REF_energy", "REF_stress")}
        if "REF_forces" in atoms.arrays:
            plain.arrays["REF_forces"] = atoms.arrays["REF_forces"]
    return plain

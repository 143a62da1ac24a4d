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
from hpcft.models.geometry import geometry_problems
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
    structures = read_inputs(campaign)
    _check_model_knows(campaign, structures)
    check_inputs(campaign, structures)
    foundation = f"foundation{campaign.foundation.suffix}"
    return Contents(
        files={f"inputs/{foundation}": campaign.foundation, CAMPAIGN_COPY: source},
        structures={
            name: [_plain(atoms, name == "replay") for atoms in group] for name, group in structures.items()
        },
        about={"foundation_file": foundation},
    )


def read_inputs(campaign: Campaign) -> dict[str, Sequence[Atoms]]:
    """The structures of a campaign, by the name of their copy."""
    return {name: read_any(path) for name, path in campaign.structure_files().items()}


def check_inputs(campaign: Campaign, structures: Mapping[str, Sequence[Atoms]]) -> None:
    """UserError for the first structure with which a campaign could not go on.

    Whether the model knows the elements is left out: that takes torch, and `hpcft check` is to be quick.
    """
    names = _names_for_the_user(campaign)
    for name, group in structures.items():
        if name == "replay":
            _check_replay(names[name], group)
        if name.startswith("relaxations") and campaign.relaxations.cell:
            _check_cells_can_relax(names[name], group)
        _check_plain(names[name], group)
    _check_starts(campaign, names["structures"], structures["structures"])
    labelled = {names[name]: group for name, group in structures.items() if name != "replay"}
    check_reference(campaign.reference, labelled)


def _names_for_the_user(campaign: Campaign) -> dict[str, str]:
    """File and key of each group of structures, as messages call it."""
    keys = {"replay": "train.replay.file"}
    return {
        name: f"{path.name} ({keys.get(name, name.replace('-', '.'))})"
        for name, path in campaign.structure_files().items()
    }


def _check_cells_can_relax(name: str, structures: Sequence[Atoms]) -> None:
    for index, atoms in enumerate(structures):
        if not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise UserError(
                f"structure {index} of {name}, {atoms.get_chemical_formula()}, is not periodic in all directions, and "
                "relaxations.cell lets cells relax; leave it out, or relax all at fixed cell"
            )


def _check_replay(name: str, structures: Sequence[Atoms]) -> None:
    for index, atoms in enumerate(structures):
        if "REF_energy" not in atoms.info or "REF_forces" not in atoms.arrays:
            raise UserError(
                f"structure {index} of {name} has no REF_energy or no REF_forces, so it cannot be replayed; "
                "write its labels under these keys"
            )


def _check_model_knows(campaign: Campaign, structures: dict[str, Sequence[Atoms]]) -> None:
    from hpcft.models.files import elements_of_file  # torch, and only where a campaign begins

    known_to_model = elements_of_file(campaign.foundation)
    names = _names_for_the_user(campaign)
    for name, group in structures.items():
        numbers = sorted({int(number) for atoms in group for number in atoms.numbers})
        unlearnt = [chemical_symbols[n] for n in numbers if n not in known_to_model]
        if unlearnt:
            raise UserError(
                f"{names[name]} contains {', '.join(unlearnt)}, which the foundation model {campaign.foundation.name} does "
                f"not know (it knows {', '.join(chemical_symbols[n] for n in sorted(known_to_model))})"
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


def _check_plain(name: str, structures: Sequence[Atoms]) -> None:
    """What MD, selection and labels would silently drop is refused."""
    for index, atoms in enumerate(structures):
        carried = {
            "constraints": ("set_constraint()", bool(atoms.constraints)),
            "initial magnetic moments": (
                "set_initial_magnetic_moments(None)",
                np.any(atoms.get_initial_magnetic_moments()),
            ),
            "initial charges": ("set_initial_charges(None)", np.any(atoms.get_initial_charges())),
            "masses of its own": ("arrays.pop('masses')", atoms.has("masses")),
        }
        found = {what: remedy for what, (remedy, is_there) in carried.items() if is_there}
        if found:
            raise UserError(
                f"structure {index} of {name} carries {', '.join(found)}, which a campaign does not keep yet; its results "
                "would be those of another system. If that is what you mean, remove them before you write the file: "
                + ", ".join(f"atoms.{remedy}" for remedy in found.values())
            )


def _check_starts(campaign: Campaign, name: str, structures: Sequence[Atoms]) -> None:
    """What would stop a replica at its first step."""
    explore = campaign.explore
    cell_moves = explore.ensemble.startswith("npt")
    found = [
        f"structure {index} ({atoms.get_chemical_formula()}): {problem}"
        for index, atoms in enumerate(structures)
        for problem in geometry_problems(atoms, cell_moves=cell_moves, min_distance=explore.min_distance)
    ]
    if found:
        more = f" (and {len(found) - 10} more)" if len(found) > 10 else ""
        raise UserError(
            f"{name}: {'; '.join(found[:10])}{more}. Mend these structures or leave them out, or change "
            f"explore.ensemble ({explore.ensemble}) or explore.min_distance ({explore.min_distance:g} Å)"
        )


def _plain(atoms: Atoms, with_labels: bool) -> Atoms:
    """Structure alone, or with its REF_ labels; a user's other columns need not be the same in every frame."""
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if with_labels:
        plain.info = {key: value for key, value in atoms.info.items() if key in ("REF_energy", "REF_stress")}
        if "REF_forces" in atoms.arrays:
            plain.arrays["REF_forces"] = atoms.arrays["REF_forces"]
    return plain

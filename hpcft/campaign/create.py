"""A campaign's folder: checked first, filled then, and sealed with campaign.json as the last file."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from hpcft import __version__
from hpcft.campaign.lease import holder, lease
from hpcft.config.campaign import Campaign, differences
from hpcft.errors import UserError
from hpcft.labelling.reference import check_arguments, reference_from, unknown_elements, unsuitable
from hpcft.labelling.requirements import missing_data_sets
from hpcft.storage.atomic import write_bytes, write_json
from hpcft.storage.campaign_folder import FORMAT, CampaignFolder
from hpcft.storage.structures import read_any, write_structures


def open_or_create(
    campaign: Campaign, source: Path, root: Path, *, take_over: bool = False
) -> CampaignFolder:
    """The campaign's folder, made now or found from an earlier run of the very same campaign.

    Raises UserError before anything is written: a folder of another campaign, a folder that others can write,
    structures with an element that the model or the reference does not know, a reference that cannot be built.
    Raises LeaseHeld while another process makes the same folder; for `take_over` see `lease`.
    """
    folder = CampaignFolder(root.absolute())
    refuse_hostile_name(folder.root)
    if folder.identity.exists():
        return _opened(folder, campaign, source)
    if folder.root.exists() and not folder.root.is_dir():
        raise UserError(f"{root} is a file; name a folder with --dir")
    if folder.root.exists() and not _is_unfinished(folder):
        raise UserError(f"{root} exists and is not a campaign folder; name another with --dir, or empty it")
    structures = _read_inputs(campaign)
    _check_replay(structures.get("replay", ()))
    _check_elements(campaign, structures)
    _check_plain(structures)
    _check_cells(campaign, structures["structures"])
    _make_root(folder.root)
    with lease(folder.leases, take_over=take_over):
        if folder.identity.exists():  # by another process, while we read the inputs
            return _opened(folder, campaign, source)
        _fill(folder, campaign, source, structures)
    return folder


def _opened(folder: CampaignFolder, campaign: Campaign, source: Path) -> CampaignFolder:
    _refuse_other_campaign(folder, campaign, source)
    refuse_shared(folder.root)
    identity = folder.read_identity()
    wanted = campaign.model_dump(mode="json")
    if identity["config"] != wanted and holder(folder.leases) is None:
        # Time limits, memory, attempts, tolerance: what may change while a campaign goes on.
        write_json(folder.identity, {**identity, "config": wanted})
    return folder


def _is_unfinished(folder: CampaignFolder) -> bool:
    """Empty, or a creation that was killed half-way: it left inputs and no identity, and is done again."""
    names = {path.name for path in folder.root.iterdir() if not path.name.startswith(".tmp-")}
    # The lease is the first thing that a creation makes: without one these are somebody's own files.
    return not names or ("leases" in names and names <= {"inputs", "campaign.yaml", "leases"})


def _refuse_other_campaign(folder: CampaignFolder, campaign: Campaign, source: Path) -> None:
    identity = folder.read_identity()
    if identity["fingerprint"] == campaign.fingerprint():
        return
    changes = differences(identity["normalised"], campaign.normalised())
    raise UserError(
        f"{folder.root} belongs to another campaign than {source} describes now:\n  "
        + "\n  ".join(changes[:10])
        + "\nGo on with the old one by `hpcft resume DIR`, or give the new one a folder of its own with --dir."
    )


def refuse_hostile_name(root: Path) -> None:
    """Raises UserError for a path that Slurm or submitit would not take as it is written: it stands in batch scripts."""
    if not str(root).isprintable() or {"%", "\\"} & set(str(root)):
        raise UserError(
            f"the campaign folder {str(root)!r} has a control character, % or a backslash in its path, which Slurm "
            "would read as something else; name another with --dir"
        )


def refuse_shared(root: Path) -> None:
    """Raises UserError for a folder that others can write: jobs load pickles from it, and a pickle is code."""
    status = root.stat()
    if status.st_uid != os.getuid():
        raise UserError(f"{root} belongs to another user; run your own copy of the campaign")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{root} can be written by others, who could run code as you; do: chmod go-w {root}")


def _read_inputs(campaign: Campaign) -> dict[str, Sequence[Atoms]]:
    wanted = {"structures": campaign.structures}
    if campaign.relaxations.train is not None:
        wanted["relaxations-train"] = campaign.relaxations.train
    if campaign.relaxations.test is not None:
        wanted["relaxations-test"] = campaign.relaxations.test
    if campaign.train.replay is not None:
        wanted["replay"] = campaign.train.replay.file
    found: dict[str, Sequence[Atoms]] = {name: read_any(path) for name, path in wanted.items()}
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
    wish = campaign.reference
    reference = reference_from(wish)
    from hpcft.models.files import elements_of_file  # torch, and only where a campaign begins

    known_to_model = elements_of_file(campaign.foundation)
    check_arguments(reference)
    for name, group in structures.items():
        numbers = sorted({int(number) for atoms in group for number in atoms.numbers})
        unlearnt = [chemical_symbols[n] for n in numbers if n not in known_to_model]
        if unlearnt:
            raise UserError(
                f"{name} contains {', '.join(unlearnt)}, which the foundation model {campaign.foundation.name} does not know "
                f"(it knows {', '.join(chemical_symbols[n] for n in sorted(known_to_model))})"
            )
        if name == "replay":
            continue
        if unknown := unknown_elements(reference, numbers):
            raise UserError(f"{name} contains {', '.join(unknown)}, which {wish.calculator} does not know")
        for index, atoms in enumerate(group):
            if problem := unsuitable(reference, atoms):
                raise UserError(
                    f"structure {index} of {name}: {problem}; take it out, or choose another reference"
                )
        missing = missing_data_sets(reference, [chemical_symbols[number] for number in numbers])
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


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(root.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
    except OSError as error:
        raise UserError(
            f"the campaign folder {root} cannot be made ({error.strerror}); name another with --dir"
        ) from error


def _fill(
    folder: CampaignFolder, campaign: Campaign, source: Path, structures: dict[str, Sequence[Atoms]]
) -> None:
    folder.inputs.mkdir(exist_ok=True)
    foundation = f"foundation{campaign.foundation.suffix}"
    write_bytes(folder.inputs / foundation, campaign.foundation.read_bytes())
    for name, group in structures.items():
        write_structures(folder.inputs / f"{name}.h5", [_plain(atoms, name == "replay") for atoms in group])
    write_bytes(folder.root / "campaign.yaml", source.read_bytes())
    normalised = campaign.normalised()
    write_json(
        folder.identity,
        {
            "format": FORMAT,
            "name": campaign.name,
            "id": _new_id(folder, normalised),
            "created": time.time(),
            "hpcft_version": __version__,
            "rounds": campaign.rounds,
            "source": str(source.absolute()),
            "foundation_file": foundation,
            "fingerprint": campaign.fingerprint(),
            "normalised": normalised,
            "config": campaign.model_dump(mode="json"),
        },
    )


def _plain(atoms: Atoms, with_labels: bool) -> Atoms:
    """Structure alone, or with its REF_ labels; a user's other columns need not be the same in every frame."""
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if with_labels:
        plain.info = {key: value for key, value in atoms.info.items() if key in ("REF_energy", "REF_stress")}
        if "REF_forces" in atoms.arrays:
            plain.arrays["REF_forces"] = atoms.arrays["REF_forces"]
    return plain


def _new_id(folder: CampaignFolder, normalised: dict[str, Any]) -> str:
    """Eight characters that tell this folder's jobs from those of every other one."""
    return hashlib.sha256(f"{folder.root}{normalised}{time.time_ns()}".encode()).hexdigest()[:8]

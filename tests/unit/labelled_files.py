"""Labelled structures, and files of them in every format that training reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.labelling.journal import Journal, Record, journal_path
from hpcft.labelling.label import Label
from hpcft.labelling.shard import finish_shard
from hpcft.storage.extxyz import write_extxyz
from hpcft.storage.structures import write_structures
from hpcft.training.sources import open_labelled

E0 = {29: -3.0, 79: -30.0, 8: -400.0, 1: -13.0}


def labelled(number: int, symbols: str = "Cu3Au", stress: bool = True) -> Atoms:
    """Four atoms in a box, with labels that might come from a reference."""
    rng = np.random.default_rng(number)
    atoms = bulk("Cu", a=3.8, cubic=True)
    atoms.set_chemical_symbols(Atoms(symbols).get_chemical_symbols())
    atoms.positions += rng.normal(scale=0.1, size=(4, 3))
    atoms.info["REF_energy"] = sum(E0[z] for z in atoms.numbers) + rng.normal()
    if stress:
        atoms.info["REF_stress"] = rng.normal(scale=0.01, size=6)
    atoms.arrays["REF_forces"] = rng.normal(size=(4, 3))
    return atoms


def data_set(num_structures: int = 6) -> list[Atoms]:
    return [labelled(number, ("Cu3Au", "Cu4", "CuAu3")[number % 3]) for number in range(num_structures)]


def assert_same(found: Sequence[Atoms], expected: Sequence[Atoms]) -> None:
    """To the last bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other
        assert one.info["REF_energy"] == other.info["REF_energy"]
        np.testing.assert_array_equal(one.arrays["REF_forces"], other.arrays["REF_forces"])
        assert ("REF_stress" in one.info) == ("REF_stress" in other.info)
        if "REF_stress" in one.info:
            np.testing.assert_array_equal(one.info["REF_stress"], other.info["REF_stress"])


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_labelled([path], **options)
    return str(caught.value)


def write_shard(folder: Path, structures: Sequence[Atoms]) -> None:
    folder.mkdir(parents=True)
    with Journal(journal_path(folder, 0)) as journal:
        for index, atoms in enumerate(structures):
            label = Label(
                atoms.info["REF_energy"],
                "free_energy",
                atoms.arrays["REF_forces"],
                atoms.info.get("REF_stress"),
            )
            bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
            journal.append(Record(index, f"key {index}", "single-point", label, bare, wall_s=1.0))


def write_finished_shard(folder: Path, structures: Sequence[Atoms]) -> None:
    write_shard(folder, structures)
    finish_shard(folder)


def write_by_mace(path: Path, structures: Sequence[Atoms]) -> None:
    """As mace_prepare_data does it."""
    from mace.data import KeySpecification, config_from_atoms_list
    from mace.data.utils import save_configurations_as_HDF5

    configurations = config_from_atoms_list(list(structures), KeySpecification.from_defaults())
    with h5py.File(path, "w") as file:
        file.attrs["drop_last"] = True
        save_configurations_as_HDF5(configurations, 0, file)


def write_as_mace_0_3_6(path: Path, structures: Sequence[Atoms], batch: int = 4) -> None:
    """The older layout, in batches; what is unknown is zero and has no weight."""
    with h5py.File(path, "w") as file:
        for index, atoms in enumerate(structures):
            group = file.create_group(f"config_batch_{index // batch}/config_{index % batch}")
            group["atomic_numbers"], group["positions"] = atoms.numbers, atoms.positions
            group["cell"], group["pbc"] = atoms.cell.array, tuple(atoms.pbc)
            group["weight"] = atoms.info.get("config_weight", 1.0)
            group["config_type"] = atoms.info.get("config_type", "Default")
            labels = {
                "energy": (atoms.info.get("REF_energy"), 0.0),
                "forces": (atoms.arrays.get("REF_forces"), np.zeros((len(atoms), 3))),
                "stress": (atoms.info.get("REF_stress"), np.zeros(6)),
                "virials": (atoms.info.get("REF_virials"), np.zeros((3, 3))),
            }
            for name, (value, substitute) in labels.items():
                group[name] = substitute if value is None else value
                group[f"{name}_weight"] = 0.0 if value is None else 1.0
            group["dipole"], group["charges"] = "None", np.zeros(len(atoms))


WRITERS: dict[str, Callable[[Path, Sequence[Atoms]], None]] = {
    "data.extxyz": write_extxyz,
    "data.h5": write_structures,
    "shard": write_finished_shard,
    "mace.h5": write_by_mace,
    "old-mace.h5": write_as_mace_0_3_6,
}

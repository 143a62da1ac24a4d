"""Training data in files: no label that would spoil a training gets through, and no sound one is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from labelled_files import E0, WRITERS, assert_same, data_set, labelled, refusal, write_by_mace

from hpcft.errors import UserError
from hpcft.storage.extxyz import write_extxyz
from hpcft.storage.structures import write_structures
from hpcft.training.sources import LabelledSource, OutlierPolicy, open_labelled

# --- what is refused -------------------------------------------------------------------------------------------------


def _without_energy(atoms: Atoms) -> None:
    del atoms.info["REF_energy"]


def _without_forces(atoms: Atoms) -> None:
    del atoms.arrays["REF_forces"]


def _energy_is_nan(atoms: Atoms) -> None:
    atoms.info["REF_energy"] = np.nan


def _force_is_infinite(atoms: Atoms) -> None:
    atoms.arrays["REF_forces"][1, 2] = np.inf


def _stress_is_partly_nan(atoms: Atoms) -> None:
    atoms.info["REF_stress"][2] = np.nan


def _stress_without_periodicity(atoms: Atoms) -> None:
    atoms.pbc = (True, True, False)


def _stress_of_four_components(atoms: Atoms) -> None:
    atoms.info["REF_stress"] = np.ones(4)


def _forces_of_one_column(atoms: Atoms) -> None:
    atoms.arrays["REF_forces"] = atoms.arrays["REF_forces"][:, 0]


def _weight_below_zero(atoms: Atoms) -> None:
    atoms.info["config_weight"] = -1.0


def _energy_is_text(atoms: Atoms) -> None:
    atoms.info["REF_energy"] = "failed"


def _position_is_nan(atoms: Atoms) -> None:
    atoms.positions[0, 0] = np.nan


FAULTS: list[tuple[Callable[[Atoms], None], str]] = [
    (_without_energy, "it has no energy"),
    (_without_forces, "it has no forces"),
    (_energy_is_nan, "energy hold NaN or infinity"),
    (_force_is_infinite, "forces hold NaN or infinity"),
    (_stress_is_partly_nan, "stress hold NaN or infinity"),
    (_stress_without_periodicity, r"not periodic in three directions .*remove the stress, or correct pbc"),
    (_stress_of_four_components, r"its stress has shape \(4,\), but must have 6 \(xx, yy, zz, yz, xz, xy\)"),
    (_forces_of_one_column, r"its forces have shape \(4,\), but must have \(4, 3\)"),
    (_weight_below_zero, "its config_weight is -1.0, but must be a number that is 0 or larger"),
    (_energy_is_text, "its energy is 'failed', which is no number"),
    (_position_is_nan, "the positions or the cell of .* hold NaN"),
]
# Columns of our own files are alike in all structures, so some faults cannot be in them.
UNIFORM = [_energy_is_nan, _force_is_infinite, _stress_is_partly_nan, _stress_without_periodicity]
CASES = [
    (name, spoil, said)
    for (spoil, said), name in itertools.product(FAULTS, ["data.extxyz", "mace.h5", "old-mace.h5", "data.h5"])
    if name != "data.h5" or spoil in UNIFORM
]


@pytest.mark.parametrize(("name", "spoil", "said"), CASES, ids=[f"{c[1].__name__[1:]}-{c[0]}" for c in CASES])
def test_a_label_that_cannot_be_learned_is_refused_by_frame_and_file(
    name: str, spoil: Callable[[Atoms], None], said: str, tmp_path: Path
) -> None:
    structures = data_set()
    spoil(structures[4])
    WRITERS[name](tmp_path / name, structures)
    message = refusal(tmp_path / name)
    assert re.search(rf"1 of 6 structures of .*frame 4 of {tmp_path / name}: .*{said}", message), message
    assert message.endswith("Correct these frames, or remove them from the file.")


def test_the_first_of_many_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    structures = data_set(9)
    for atoms in structures[1:]:
        _energy_is_nan(atoms)
    write_extxyz(tmp_path / "data.extxyz", structures)
    message = refusal(tmp_path / "data.extxyz")
    assert message.startswith("8 of 9 structures")
    assert message.count("frame ") == 5
    assert "; and 3 more." in message


def test_a_structure_without_atoms_is_refused(tmp_path: Path) -> None:
    empty = Atoms(cell=np.eye(3) * 5, pbc=True)
    empty.info = {"REF_energy": 0.0, "REF_stress": np.zeros(6)}
    empty.arrays["REF_forces"] = np.zeros((0, 3))
    write_structures(tmp_path / "data.h5", [*data_set(), empty])
    assert f"frame 6 of {tmp_path / 'data.h5'}: the structure has no atoms" in refusal(tmp_path / "data.h5")


def test_a_stress_of_nan_is_no_stress_also_where_nothing_is_periodic(tmp_path: Path) -> None:
    water = molecule("H2O")
    water.info = {"REF_energy": -426.0, "REF_stress": np.full(6, np.nan)}
    water.arrays["REF_forces"] = np.zeros((3, 3))
    write_structures(tmp_path / "data.h5", [*data_set(), water])
    source = open_labelled([tmp_path / "data.h5"])
    assert "REF_stress" not in source[6].info
    assert source.elements == {1, 8, 29, 79}


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    assert re.search(r"absent\.h5 does not exist", refusal(tmp_path / "absent.h5"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("none")
    assert "folder is a folder without HDF5 files" in refusal(tmp_path / "folder")
    (tmp_path / "empty.extxyz").write_text("")
    assert "empty.extxyz is empty" in refusal(tmp_path / "empty.extxyz")
    (tmp_path / "text.h5").write_text("this is no HDF5")
    assert "text.h5 is not a file of hpcft" in refusal(tmp_path / "text.h5")
    write_structures(tmp_path / "nothing.h5", [])
    assert "nothing.h5 has no energy" in refusal(tmp_path / "nothing.h5")
    with pytest.raises(UserError, match="No training data was named"):
        open_labelled([])


@pytest.mark.parametrize("name", ["data.h5", "mace.h5", "data.extxyz"])
def test_a_torn_file_is_refused(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, data_set())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    assert re.search(rf"{name} (is damaged|cannot be read)", refusal(tmp_path / name))


def test_hdf5_files_of_another_kind_are_refused_with_what_they_are(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "graphs.h5", "w") as file:
        file["config_0/node_attrs"] = np.eye(2)
    assert "graphs.h5 is an HDF5 file, but of MACE's graphs" in refusal(tmp_path / "graphs.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["particles/x"] = 1.0
    assert "other.h5 is an HDF5 file, but holds particles: neither" in refusal(tmp_path / "other.h5")


def test_a_configuration_of_mace_that_lacks_its_positions_is_named(tmp_path: Path) -> None:
    write_by_mace(tmp_path / "mace.h5", data_set())
    with h5py.File(tmp_path / "mace.h5", "a") as file:
        del file["config_batch_0/config_3/positions"]
    message = refusal(tmp_path / "mace.h5")
    assert f"frame 3 of {tmp_path / 'mace.h5'} (config_batch_0/config_3) cannot be read" in message
    assert "mace_prepare_data" in message


# --- outliers --------------------------------------------------------------------------------------------------------


def test_few_outliers_are_left_out_and_listed(tmp_path: Path) -> None:
    structures = data_set(400)
    structures[7].arrays["REF_forces"][2] = (0, 60, 80)
    structures[301].info["REF_energy"] += 4 * 500.0
    structures[5].set_chemical_symbols(["O"] * 4)
    structures[5].info["REF_energy"] = 4 * E0[8]
    structures[5].arrays["REF_forces"][0] = (0, 0, 51)
    write_structures(tmp_path / "b.h5", structures)
    write_extxyz(tmp_path / "a.extxyz", data_set(3))
    source = open_labelled([tmp_path / "a.extxyz", tmp_path / "b.h5"])
    assert_same(source, data_set(3) + [atoms for i, atoms in enumerate(structures) if i not in (5, 7, 301)])
    assert len(source) == len(source.num_atoms_each) == 400
    assert source.elements == {29, 79}
    near, force, energy = source.dropped
    assert near == f"frame 5 of {tmp_path / 'b.h5'} has a force of 51 eV/Å, above 50"
    assert force == f"frame 7 of {tmp_path / 'b.h5'} has a force of 100 eV/Å, above 50"
    assert re.search(
        r"frame 301 of .*b\.h5 has an energy that deviates by \+(499|500|501)\S* eV/atom", energy
    )


def test_more_outliers_than_allowed_are_refused_with_the_worst_of_them(tmp_path: Path) -> None:
    structures = data_set(100)
    structures[7].arrays["REF_forces"][2] = (0, 60, 80)
    structures[8].arrays["REF_forces"][2] = (0, 0, -200)
    write_structures(tmp_path / "data.h5", structures)
    message = refusal(tmp_path / "data.h5")
    assert message.startswith("2 of 100 labelled structures are outliers, more than 0.01 of them.")
    assert f"The worst: frame 8 of {tmp_path / 'data.h5'} has a force of 200 eV/Å" in message
    assert "the key max_force (50 eV/Å)" in message
    assert "max_outliers (0.01 of all) in the YAML file of hpcft train --config" in message
    assert len(open_labelled([tmp_path / "data.h5"], outliers=OutlierPolicy(max_share=0.02))) == 98
    assert len(open_labelled([tmp_path / "data.h5"], outliers=OutlierPolicy(max_force=150))) == 99
    assert len(open_labelled([tmp_path / "data.h5"], outliers=OutlierPolicy(max_force=201))) == 100


def test_a_single_outlier_of_few_structures_is_left_out_unless_none_may_be_or_nothing_remains(
    tmp_path: Path,
) -> None:
    structures = data_set(18)
    structures[7].arrays["REF_forces"][2] = (0, 60, 80)
    write_structures(tmp_path / "data.h5", structures)
    write_structures(tmp_path / "alone.h5", structures[7:8])
    source = open_labelled([tmp_path / "data.h5"])
    assert len(source) == 17
    assert source.dropped == [f"frame 7 of {tmp_path / 'data.h5'} has a force of 100 eV/Å, above 50"]
    with pytest.raises(UserError, match="1 of 18 labelled structures are outliers, more than 0 of them"):
        open_labelled([tmp_path / "data.h5"], outliers=OutlierPolicy(max_share=0))
    assert refusal(tmp_path / "alone.h5").startswith("1 of 1 labelled structures are outliers")


def test_energies_in_another_unit_are_refused(tmp_path: Path) -> None:
    structures = [labelled(number, "CuAu3") for number in range(40)]
    for atoms in structures[:10]:
        atoms.info["REF_energy"] *= 1e3 / 4
    write_structures(tmp_path / "data.h5", structures)
    assert re.search(r"10 of 40 .*The worst: frame \d of .* eV/atom", refusal(tmp_path / "data.h5"))


def open_with_energies(path: Path, per_structure: Sequence[tuple[str, float]]) -> LabelledSource:
    structures = [labelled(number, symbols) for number, (symbols, _) in enumerate(per_structure)]
    for atoms, (_, energy) in zip(structures, per_structure, strict=True):
        atoms.info["REF_energy"] = energy
    write_structures(path, structures)
    return open_labelled([path])


@pytest.mark.parametrize("seed", range(3))
def test_sound_energies_pass_whatever_the_elements_and_compositions(seed: int, tmp_path: Path) -> None:
    """All-electron energies, a thousand eV per atom apart, in every composition, some of which occur once."""
    rng = np.random.default_rng(seed)
    atomic = {"H": -13.6, "O": -2041.0, "Cu": -45_000.0, "Au": -530_000.0}
    found = []
    for number in range(60):
        symbols = rng.choice(["Cu", "O"] if number < 50 else list(atomic), size=4)
        found.append(("".join(symbols), sum(atomic[s] for s in symbols) + 4 * rng.normal(scale=8.0)))
    source = open_with_energies(tmp_path / "data.h5", found)
    assert len(source) == 60 and source.dropped == []


def test_a_single_structure_and_a_single_composition_pass(tmp_path: Path) -> None:
    assert len(open_with_energies(tmp_path / "one.h5", [("Cu3Au", -1e5)])) == 1
    energies = np.random.default_rng(0).normal(-1e5, 20.0, size=30)
    assert len(open_with_energies(tmp_path / "same.h5", [("Cu3Au", e) for e in energies])) == 30


def test_strongly_compressed_structures_pass_where_a_data_set_is_of_such(tmp_path: Path) -> None:
    """Dimers on a repulsive wall: their spread is the measure, not 100 eV/atom."""
    walls = 4 * 300.0 * np.random.default_rng(1).uniform(size=50)
    assert len(open_with_energies(tmp_path / "data.h5", [("Cu4", e) for e in walls])) == 50


@pytest.mark.parametrize(
    "options", [{"max_force": 0.0}, {"max_force": 2e3}, {"max_energy": 0.0}, {"max_share": 1.0}]
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="but must"):
        OutlierPolicy(**options)

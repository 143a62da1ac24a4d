"""Training data in files: every format gives the same labels, to the last bit and with little memory."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import voigt_6_to_full_3x3_stress
from labelled_files import (
    WRITERS,
    assert_same,
    data_set,
    labelled,
    refusal,
    write_by_mace,
    write_finished_shard,
    write_shard,
)

from hpcft.storage.extxyz import write_extxyz
from hpcft.storage.structures import write_structures
from hpcft.training.sources import open_labelled

# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_back_the_labels_to_the_last_bit(name: str, tmp_path: Path) -> None:
    structures = data_set(6)
    WRITERS[name](tmp_path / name, structures)
    source = open_labelled([tmp_path / name])
    assert_same(source, structures)
    assert_same(source[1:5:2], structures[1:5:2])
    assert source[-1] == structures[-1]
    assert source.num_atoms_each == [4] * 6
    assert source.elements == {29, 79}
    assert source.dropped == []
    with pytest.raises(IndexError):
        source[6]
    file = tmp_path / name / "labels.h5" if name == "shard" else tmp_path / name
    assert source[3].info["origin"] == f"frame 3 of {file}"
    assert_same(pickle.loads(pickle.dumps(source)), structures)  # noqa: S301


@pytest.mark.parametrize("name", WRITERS)
def test_a_stress_that_is_unknown_is_absent(name: str, tmp_path: Path) -> None:
    structures = [labelled(number, stress=False) for number in range(3)]
    WRITERS[name](tmp_path / name, structures)
    assert_same(open_labelled([tmp_path / name]), structures)


def test_files_of_all_formats_make_one_source_in_their_order(tmp_path: Path) -> None:
    expected = []
    for number, (name, write) in enumerate(WRITERS.items()):
        structures = [labelled(10 * number + i, "CuAu3") for i in range(number + 1)]
        write(tmp_path / name, structures)
        expected += structures
    source = open_labelled([tmp_path / name for name in WRITERS])
    assert_same(source, expected)
    assert source.num_atoms_each == [4] * 15


@pytest.mark.parametrize("name", ["data.h5", "mace.h5"])
def test_a_format_is_told_by_content_and_not_by_suffix(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "data.xyz", data_set())
    assert_same(open_labelled([tmp_path / "data.xyz"]), data_set())


def test_ases_own_extended_xyz_is_read(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "data.extxyz", data_set())
    for found, expected in zip(open_labelled([tmp_path / "data.extxyz"]), data_set(), strict=True):
        np.testing.assert_allclose(found.arrays["REF_forces"], expected.arrays["REF_forces"], atol=1e-8)
        np.testing.assert_allclose(found.info["REF_stress"], expected.info["REF_stress"], atol=1e-8)


def test_mace_itself_reads_the_same_from_its_file(tmp_path: Path) -> None:
    from mace.data import HDF5Dataset
    from mace.tools import AtomicNumberTable

    structures = data_set()
    structures[2].info |= {"config_weight": 2.0, "config_forces_weight": 0.5, "config_stress_weight": 0.25}
    structures[4].info["REF_stress"] = voigt_6_to_full_3x3_stress(structures[4].info["REF_stress"])
    write_by_mace(tmp_path / "mace.h5", structures)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        dataset = HDF5Dataset(tmp_path / "mace.h5", r_max=4.0, z_table=AtomicNumberTable([29, 79]))
        by_mace = [dataset[index] for index in range(len(dataset))]
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(open_labelled([tmp_path / "mace.h5"]), by_mace, strict=True):
        assert ours.info["REF_energy"] == theirs.energy
        np.testing.assert_array_equal(ours.arrays["REF_forces"], theirs.forces)
        np.testing.assert_array_equal(voigt_6_to_full_3x3_stress(ours.info["REF_stress"]), theirs.stress[0])
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        for name in ("weight", "energy_weight", "forces_weight", "stress_weight"):
            assert ours.info[f"config_{name}"] == theirs[name]


def test_a_folder_of_shards_of_mace_is_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    structures = [labelled(number) for number in range(11)]
    (tmp_path / "train").mkdir()
    for number, atoms in enumerate(structures):
        write_by_mace(tmp_path / "train" / f"train_{number}.h5", [atoms])
    assert_same(open_labelled([tmp_path / "train"]), structures)


def test_a_stage_of_label_shards_gives_what_is_published_and_nothing_else(tmp_path: Path) -> None:
    tasks = tmp_path / "round-001" / "label" / "tasks"
    write_finished_shard(tasks / "0000", data_set(3))
    write_shard(tasks / "0001", data_set(2))  # not finished
    write_finished_shard(tasks / "0002", [])  # every label has failed
    write_finished_shard(tasks / "0003", [labelled(20)])
    expected = [*data_set(3), labelled(20)]
    assert_same(open_labelled([tmp_path / "round-001" / "label"]), expected)
    assert_same(open_labelled([tasks / "0003"]), expected[3:])


def test_a_campaign_as_a_whole_is_no_training_data(tmp_path: Path) -> None:
    write_finished_shard(tmp_path / "round-000" / "reference" / "tasks" / "0000", data_set(1))
    write_finished_shard(tmp_path / "round-001" / "label" / "tasks" / "0000", data_set(1))
    message = refusal(tmp_path)
    assert "round-000/reference/tasks, round-001/label/tasks" in message
    assert "such as round-001/label" in message


def test_a_shard_that_lacks_promised_labels_is_refused(tmp_path: Path) -> None:
    write_finished_shard(tmp_path / "one", data_set(2))
    write_finished_shard(tmp_path / "two", data_set(3))
    (tmp_path / "two" / "shard.json").replace(tmp_path / "one" / "shard.json")
    assert re.search(r"one/labels\.h5 lacks labels that .*one/shard\.json lists", refusal(tmp_path / "one"))


# --- virials, weights, isolated atoms --------------------------------------------------------------------------------


def test_virials_become_the_stress_that_mace_computes_beside_them(tmp_path: Path) -> None:
    from mace.modules.utils import compute_forces_virials

    atoms = labelled(0, stress=False)
    positions = torch.tensor(atoms.positions, requires_grad=True)
    strain = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    moved = positions + positions @ (0.5 * (strain[0] + strain[0].T))
    _, virials, stress = compute_forces_virials(
        (moved**3).sum(), positions, strain, torch.tensor(atoms.cell.array), compute_stress=True
    )
    assert virials is not None and stress is not None
    atoms.info["REF_virials"] = virials[0].detach().numpy()
    for name in ("data.extxyz", "data.h5", "mace.h5", "old-mace.h5"):
        WRITERS[name](tmp_path / name, [atoms])
        found = open_labelled([tmp_path / name])[0].info["REF_stress"]
        np.testing.assert_allclose(voigt_6_to_full_3x3_stress(found), stress[0].detach(), rtol=1e-14)


def test_a_stress_goes_before_virials_and_the_virials_weight_goes_with_them(tmp_path: Path) -> None:
    both, virials = labelled(0), labelled(1, stress=False)
    for atoms in (both, virials):
        atoms.info |= {
            "REF_virials": np.arange(6.0),
            "config_virials_weight": 3.0,
            "config_stress_weight": 0.5,
        }
    write_extxyz(tmp_path / "data.extxyz", [both, virials])
    source = open_labelled([tmp_path / "data.extxyz"])
    np.testing.assert_array_equal(source[0].info["REF_stress"], both.info["REF_stress"])
    np.testing.assert_allclose(source[1].info["REF_stress"], -np.arange(6.0) / virials.get_volume())
    assert [atoms.info["config_stress_weight"] for atoms in source] == [0.5, 3.0]


@pytest.mark.parametrize("name", ["data.extxyz", "data.h5", "mace.h5"])
def test_weights_are_handed_on_and_a_stress_without_weight_counts_as_none(name: str, tmp_path: Path) -> None:
    structures = data_set(3)
    for number, atoms in enumerate(structures):
        atoms.info |= {"config_weight": 1.0 + number, "config_stress_weight": float(number > 0)}
    WRITERS[name](tmp_path / name, structures)
    source = open_labelled([tmp_path / name])
    assert [atoms.info["config_weight"] for atoms in source] == [1.0, 2.0, 3.0]
    assert [atoms.info.get("config_stress_weight") for atoms in source] == [None, 1.0, 1.0]
    assert ["REF_stress" in atoms.info for atoms in source] == [False, True, True]


@pytest.mark.parametrize("name", ["data.extxyz", "mace.h5", "old-mace.h5"])
def test_isolated_atoms_may_lie_far_from_all_others_and_need_no_forces(name: str, tmp_path: Path) -> None:
    alone = Atoms("Au", cell=np.eye(3) * 20)
    alone.info = {"REF_energy": 5000.0, "REF_stress": np.zeros(6), "config_type": "IsolatedAtom"}
    WRITERS[name](tmp_path / name, [alone, *data_set()])
    source = open_labelled([tmp_path / name])
    assert len(source) == 7
    assert source[0].info["config_type"] == "IsolatedAtom"
    assert source[0].arrays["REF_forces"].tolist() == [[0, 0, 0]]
    assert "REF_stress" not in source[0].info


# --- keys ------------------------------------------------------------------------------------------------------------


def with_results(atoms: Atoms) -> Atoms:
    """The labels as ASE's own properties."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    bare.calc = SinglePointCalculator(
        bare,
        energy=atoms.info["REF_energy"],
        forces=atoms.arrays["REF_forces"],
        stress=atoms.info["REF_stress"],
    )
    return bare


def test_plain_keys_that_ase_moves_into_a_calculator_are_refused_with_the_options_that_use_them(
    tmp_path: Path,
) -> None:
    structures = [with_results(atoms) for atoms in data_set()]
    structures[0].info["name"] = "first"
    ase.io.write(tmp_path / "data.extxyz", structures)
    message = refusal(tmp_path / "data.extxyz")
    assert "data.extxyz has no energy (REF_energy) and forces (REF_forces) in any frame" in message
    assert "per structure: name; results that ASE put into a calculator: energy, forces" in message
    assert "give --energy-key energy --forces-key forces --stress-key stress, or rename" in message


def test_results_of_a_calculator_are_used_where_that_was_asked_for(tmp_path: Path) -> None:
    structures = [with_results(atoms) for atoms in data_set()]
    for atoms in structures:
        atoms.set_constraint(FixAtoms([0]))  # whose forces ASE's get_forces would hide
    ase.io.write(tmp_path / "data.traj", structures)
    keys = {"energy_key": "energy", "forces_key": "forces"}
    assert_same(open_labelled([tmp_path / "data.traj"], **keys, stress_key="stress"), data_set())
    assert all("REF_stress" not in atoms.info for atoms in open_labelled([tmp_path / "data.traj"], **keys))


@pytest.mark.parametrize("name", ["data.extxyz", "data.h5"])
def test_keys_may_be_named_and_others_than_those_are_listed(name: str, tmp_path: Path) -> None:
    structures = data_set()
    for atoms in structures:
        atoms.info = {
            "dft_energy": atoms.info.pop("REF_energy"),
            "dft_stress": atoms.info.pop("REF_stress"),
        }
        atoms.arrays["dft_forces"] = atoms.arrays.pop("REF_forces")
    WRITERS[name](tmp_path / name, structures)
    message = refusal(tmp_path / name)
    assert "It holds per structure: dft_energy, dft_stress; per atom: dft_forces." in message
    assert "Name what it has with --energy-key and --forces-key" in message
    source = open_labelled(
        [tmp_path / name], energy_key="dft_energy", forces_key="dft_forces", stress_key="dft_stress"
    )
    assert_same(source, data_set())


def test_our_own_files_beside_a_file_with_named_keys_keep_theirs(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "data.traj", [with_results(atoms) for atoms in data_set()])
    write_structures(tmp_path / "data.h5", data_set())
    source = open_labelled(
        [tmp_path / "data.traj", tmp_path / "data.h5"],
        energy_key="energy",
        forces_key="forces",
        stress_key="stress",
    )
    assert_same(source, [*data_set(), *data_set()])


@pytest.mark.parametrize("name", ["data.extxyz", "data.h5"])
def test_energies_without_forces_are_refused_for_the_whole_file(name: str, tmp_path: Path) -> None:
    structures = data_set()
    for atoms in structures:
        del atoms.arrays["REF_forces"]
    WRITERS[name](tmp_path / name, structures)
    assert f"{name} has no forces (REF_forces) in any frame" in refusal(tmp_path / name)


# --- laziness --------------------------------------------------------------------------------------------------------


def many(num_structures: int, num_atoms: int = 32) -> list[Atoms]:
    rng = np.random.default_rng(0)
    positions, numbers = rng.uniform(size=(num_atoms, 3)), rng.choice([29, 79], size=num_atoms)
    structures = []
    for number in range(num_structures):
        atoms = Atoms(numbers, positions + number, cell=np.eye(3) * 9, pbc=True)
        atoms.info["REF_energy"] = -5.0 * num_atoms + 1e-4 * number
        atoms.arrays["REF_forces"] = np.full((num_atoms, 3), 1e-3 * number % 7)
        structures.append(atoms)
    return structures


@pytest.mark.parametrize(("name", "num_structures"), [("data.h5", 4_000), ("mace.h5", 100)])
def test_memory_does_not_grow_with_the_number_of_structures(
    name: str, num_structures: int, tmp_path: Path
) -> None:
    num_atoms = 128 if name == "data.h5" else 2_000
    WRITERS[name](tmp_path / name, many(num_structures, num_atoms))
    labels_alone = num_structures * num_atoms * 3 * 8
    tracemalloc.start()
    try:
        source = open_labelled([tmp_path / name])
        for index in range(0, num_structures, num_structures // 50):
            assert source[index].positions[0, 0] == pytest.approx(source[0].positions[0, 0] + index)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == num_structures
    assert peak < labels_alone / 2
    assert peak < (tmp_path / name).stat().st_size / 4

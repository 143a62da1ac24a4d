"""Structures through our HDF5 and through extended XYZ as ASE reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms, FixedPlane

from hpcft.errors import UserError
from hpcft.storage.inspection import inspect_file, verify_file
from hpcft.storage.seal import DamagedFile
from hpcft.storage.structures import (
    count_structures,
    read_any,
    read_provenance,
    read_structures,
    write_extxyz,
    write_structures,
)


def labelled(count: int = 6, seed: int = 0) -> list[Atoms]:
    """Structures of different sizes, cells and boundaries with all that a label carries."""
    random = np.random.default_rng(seed)
    seeds = [bulk("Cu") * (2, 1, 1), molecule("H2O"), bulk("AuCu", "cesiumchloride", a=3.2) * (2, 2, 1)]
    structures = []
    for index in range(count):
        atoms = seeds[index % len(seeds)].copy()
        atoms.positions += random.normal(scale=0.1, size=(len(atoms), 3))
        atoms.set_velocities(random.normal(size=(len(atoms), 3)))
        if index % 3 == 0:
            atoms.set_constraint(FixAtoms([1]))
        atoms.info = {
            "REF_energy": random.normal() * 1e3,
            "REF_stress": random.normal(size=6) * 1e-7,
            "index": index,
            "converged": index % 2 == 0,
            "config_type": f"kind {index} of Å",
        }
        atoms.set_array("REF_forces", random.normal(size=(len(atoms), 3)) * 10.0 ** random.integers(-12, 3))
        atoms.set_array("tag_names", np.array([f"t{i}" for i in range(len(atoms))]))
        structures.append(atoms)
    return structures


def assert_equal_to_the_bit(found: Atoms, expected: Atoms) -> None:
    assert found.arrays.keys() == expected.arrays.keys()
    for key, values in expected.arrays.items():
        assert found.arrays[key].dtype == values.dtype, key
        assert found.arrays[key].tobytes() == values.tobytes(), key
    assert found.cell.array.tobytes() == expected.cell.array.tobytes()
    assert found.pbc.tolist() == expected.pbc.tolist()
    assert found.info.keys() == expected.info.keys()
    for key, value in expected.info.items():
        np.testing.assert_array_equal(found.info[key], value, strict=True)
        assert isinstance(found.info[key], type(value))
    assert [c.index.tolist() for c in found.constraints] == [c.index.tolist() for c in expected.constraints]


def test_every_bit_of_ragged_structures_comes_back(tmp_path: Path) -> None:
    structures = labelled()
    write_structures(
        tmp_path / "labels.h5", structures, {"reference": "EMT", "settings": {"kpts": [2, 2, 2]}}
    )
    for found, expected in zip(read_structures(tmp_path / "labels.h5"), structures, strict=True):
        assert_equal_to_the_bit(found, expected)
    assert count_structures(tmp_path / "labels.h5") == len(structures)
    assert read_provenance(tmp_path / "labels.h5") == {"reference": "EMT", "settings": {"kpts": [2, 2, 2]}}


@pytest.mark.parametrize(
    "indices", [slice(1, 5, 2), slice(None, None, -1), [4], [3, 0, -1, 3], [], slice(9, 3)]
)
def test_a_selection_comes_back_in_the_order_asked_for(tmp_path: Path, indices: Any) -> None:
    structures = labelled()
    write_structures(tmp_path / "labels.h5", structures)
    wanted = structures[indices] if isinstance(indices, slice) else [structures[index] for index in indices]
    for found, expected in zip(read_structures(tmp_path / "labels.h5", indices), wanted, strict=True):
        assert_equal_to_the_bit(found, expected)


def test_structures_that_are_read_share_no_memory(tmp_path: Path) -> None:
    write_structures(tmp_path / "labels.h5", labelled())
    first, again = read_structures(tmp_path / "labels.h5", [0, 0])
    first.positions += 1
    first.info["REF_stress"] += 1
    assert not np.allclose(first.positions, again.positions)
    assert not np.allclose(first.info["REF_stress"], again.info["REF_stress"])


def test_an_empty_list_comes_back_empty(tmp_path: Path) -> None:
    write_structures(tmp_path / "none.h5", [])
    assert read_structures(tmp_path / "none.h5") == []
    assert count_structures(tmp_path / "none.h5") == 0
    with pytest.raises(UserError, match="holds no structure"):
        read_any(tmp_path / "none.h5")


def test_a_string_that_some_structures_lack_stays_missing_in_them(tmp_path: Path) -> None:
    structures = [Atoms("H"), Atoms("He"), Atoms("Li")]
    structures[1].info["note"] = ""
    write_structures(tmp_path / "notes.h5", structures)
    assert [atoms.info for atoms in read_structures(tmp_path / "notes.h5")] == [{}, {"note": ""}, {}]


def test_results_of_a_calculator_are_not_taken_for_labels(tmp_path: Path) -> None:
    from ase.calculators.emt import EMT

    atoms = bulk("Cu")
    atoms.calc = EMT()
    atoms.get_potential_energy()
    write_structures(tmp_path / "plain.h5", [atoms])
    (found,) = read_structures(tmp_path / "plain.h5")
    assert found.calc is None and not found.info


def without_energy(structures: list[Atoms]) -> None:
    del structures[2].info["REF_energy"]


def with_another_stress(structures: list[Atoms]) -> None:
    structures[2].info["REF_stress"] = np.zeros((3, 3))


def without_forces(structures: list[Atoms]) -> None:
    del structures[2].arrays["REF_forces"]


def with_a_dictionary(structures: list[Atoms]) -> None:
    structures[2].info["index"] = {"a": 1}


def with_text_for_a_number(structures: list[Atoms]) -> None:
    structures[2].info["index"] = "two"


def with_a_plane(structures: list[Atoms]) -> None:
    structures[2].set_constraint(FixedPlane([0], [0, 0, 1]))


def with_an_array_called_fixed(structures: list[Atoms]) -> None:
    for atoms in structures:
        atoms.set_array("fixed", np.zeros(len(atoms), dtype=int))


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (without_energy, "Frame 2 has no info 'REF_energy'"),
        (
            with_another_stress,
            r"info 'REF_stress' is \('numbers', 6\) in frame 0 but \('numbers', 3, 3\) in frame 2",
        ),
        (without_forces, "Frame 2 has no array 'REF_forces'"),
        (with_a_dictionary, "info 'index' of frame 2 cannot be stored"),
        (with_text_for_a_number, "info 'index' is .* in frame 0 but .*text.* in frame 2"),
        (with_a_plane, "Frame 2 has a constraint FixedPlane"),
        (with_an_array_called_fixed, "use ASE's FixAtoms"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    tmp_path: Path, spoil: Any, complaint: str
) -> None:
    structures = labelled()
    spoil(structures)
    with pytest.raises(UserError, match=complaint):
        write_structures(tmp_path / "labels.h5", structures)
    assert list(tmp_path.iterdir()) == []


def test_ase_reads_our_extended_xyz_with_every_digit_and_the_labels(tmp_path: Path) -> None:
    structures = labelled()
    write_extxyz(tmp_path / "labels.extxyz", structures)
    for found, expected in zip(ase.io.read(tmp_path / "labels.extxyz", ":"), structures, strict=True):
        assert found.calc is None
        assert found.get_chemical_symbols() == expected.get_chemical_symbols()
        for key in ("positions", "momenta", "REF_forces"):
            assert found.arrays[key].tobytes() == expected.arrays[key].tobytes(), key
        assert found.arrays["tag_names"].tolist() == expected.arrays["tag_names"].tolist()
        np.testing.assert_array_equal(found.cell.array, expected.cell.array)
        assert found.pbc.tolist() == expected.pbc.tolist()
        assert found.info.keys() == expected.info.keys()
        for key, value in expected.info.items():
            np.testing.assert_array_equal(found.info[key], value)
        assert [c.index.tolist() for c in found.constraints] == [
            c.index.tolist() for c in expected.constraints
        ]


def test_structures_survive_the_way_from_xyz_to_hdf5_and_back(tmp_path: Path) -> None:
    write_extxyz(tmp_path / "labels.extxyz", labelled())
    write_structures(tmp_path / "labels.h5", read_any(tmp_path / "labels.extxyz"))
    write_extxyz(tmp_path / "again.extxyz", read_any(tmp_path / "labels.h5"))
    assert (tmp_path / "again.extxyz").read_text() == (tmp_path / "labels.extxyz").read_text()


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("missing.xyz", None, "does not exist"),
        ("empty.extxyz", b"", "is empty"),
        ("garbage.extxyz", b"not a structure\n", "cannot be read by ASE"),
        ("cut.extxyz", b"3\nProperties=species:S:1:pos:R:3\nH 0 0 0\n", "cannot be read by ASE"),
        ("unknown.foo", b"what is this?\n", "cannot be read by ASE"),
        ("garbage.h5", b"not HDF5", "not a file of hpcft, or its first bytes are damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{complaint}"):
        read_any(tmp_path / name)


def test_an_index_out_of_range_is_named(tmp_path: Path) -> None:
    write_structures(tmp_path / "labels.h5", labelled())
    with pytest.raises(UserError, match="holds 6 structures, so there is no structure 6"):
        read_structures(tmp_path / "labels.h5", [0, 6])


def test_inspection_summarises_labels_in_json(tmp_path: Path) -> None:
    structures = labelled()
    write_structures(tmp_path / "labels.h5", structures, {"reference": "EMT"})
    report = json.loads(json.dumps(inspect_file(tmp_path / "labels.h5")))
    assert report["kind"] == "structures"
    assert report["provenance"] == {"reference": "EMT"}
    summary = report["structures"]
    assert summary["num_structures"] == 6
    assert summary["elements"] == ["Au", "Cu", "H", "O"]
    energies = [atoms.info["REF_energy"] / len(atoms) for atoms in structures]
    assert summary["energy_per_atom_eV"]["mean"] == pytest.approx(np.mean(energies))
    largest = max(np.linalg.norm(atoms.arrays["REF_forces"], axis=1).max() for atoms in structures)
    assert summary["max_force_eV_per_Angstrom"] == pytest.approx(largest)
    positions = next(entry for entry in report["datasets"] if entry["name"] == "/positions")
    assert positions == {"name": "/positions", "shape": [26, 3], "dtype": "float64", "unit": "Angstrom"}


def test_inspection_lists_what_any_other_hdf5_file_holds(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["group/x"] = np.arange(3)
    report = inspect_file(tmp_path / "foreign.h5")
    assert report["kind"] == "other"
    assert report["datasets"] == [{"name": "/group/x", "shape": [3], "dtype": "int64", "unit": None}]
    with pytest.raises(DamagedFile, match="not a file of hpcft"):
        verify_file(tmp_path / "foreign.h5")


def test_inspection_says_of_damage_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "labels.h5"
    write_structures(path, labelled())
    assert verify_file(path) == "structures"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"labels.h5 is damaged: its SHA-256.*Restore it from a backup"):
        inspect_file(path)
    path.write_bytes(content[:1000])
    with pytest.raises(DamagedFile, match="1000 bytes, but"):
        inspect_file(path)
    path.write_bytes(b"not HDF5 at all")
    with pytest.raises(DamagedFile, match="damaged or is no HDF5 file"):
        inspect_file(path)
    with pytest.raises(UserError, match="does not exist"):
        inspect_file(tmp_path / "missing.h5")

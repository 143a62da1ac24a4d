"""Labels that look wrong are told from those that do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT

from hpcft.errors import LabelError
from hpcft.labelling.label import Label
from hpcft.labelling.label_table import LabelTable
from hpcft.labelling.sanity import disagreement, suspects, symmetric_voigt
from hpcft.storage.structures import write_structures


def labelled(symbols: str, seed: int, rattle: float = 0.1) -> Atoms:
    """Four atoms of a strained and rattled crystal, with the labels that EMT gives."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", a=3.8 * rng.uniform(0.97, 1.03), cubic=True)
    atoms.set_chemical_symbols(symbols.split("-"))
    atoms.positions += rng.normal(scale=rattle, size=(4, 3))
    return with_labels(atoms)


def with_labels(atoms: Atoms) -> Atoms:
    atoms.calc = EMT()
    atoms.info["REF_energy"] = atoms.get_potential_energy()
    atoms.arrays["REF_forces"] = atoms.get_forces()
    atoms.calc = None
    return atoms


ALLOYS = ("Cu-Cu-Cu-Au", "Cu-Cu-Au-Au", "Cu-Cu-Cu-Cu")


def sane(count: int = 30) -> list[Atoms]:
    return [labelled(ALLOYS[number % 3], number) for number in range(count)]


def found_in(structures: Sequence[Atoms], keys: Sequence[str] | None = None) -> dict[int, str]:
    return suspects(LabelTable.of(keys or [str(number) for number in range(len(structures))], structures))


def test_a_sane_campaign_has_no_suspects() -> None:
    assert found_in(sane()) == {}
    assert found_in([]) == {}


def test_atoms_that_are_squeezed_are_high_in_energy_and_right() -> None:
    squeezed = labelled(ALLOYS[0], 50)
    squeezed.set_cell(squeezed.cell * 0.7, scale_atoms=True)
    with_labels(squeezed)
    structures = [*sane(), squeezed]
    usual = np.mean([atoms.info["REF_energy"] for atoms in structures[:30:3]])
    assert squeezed.info["REF_energy"] - usual > 4 * 2.0, "it would be outside the window by its energy alone"
    assert found_in(structures) == {}


@pytest.mark.parametrize("error", [-300.0, -8.0, 16.0, 300.0])
def test_a_wrong_energy_among_right_ones_is_found_whatever_its_sign(error: float) -> None:
    structures = sane()
    structures[7].info["REF_energy"] += error
    [(row, reason)] = found_in(structures).items()
    assert row == 7
    off = float(reason.split("off by ")[1].split(" eV/atom")[0])
    assert off == pytest.approx(error / 4, abs=0.5)


def test_a_tenth_of_wrong_energies_is_found_and_does_not_hide_itself() -> None:
    structures = sane(60)
    wrong = [3, 14, 22, 40, 41, 59]
    for row in wrong:
        structures[row].info["REF_energy"] += 40.0
    assert list(found_in(structures)) == wrong


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_minority_that_is_far_from_all_else_is_unusual_and_not_wrong(count: int) -> None:
    """Isolated atoms lie above a crystal by the cohesive energy: 3.5 eV."""
    atoms = [with_labels(Atoms("Cu", cell=[9 + n, 9, 9], pbc=True)) for n in range(count)]
    structures = [*sane(), *atoms]
    assert found_in(structures) == {}
    if count > 1:
        atoms[0].info["REF_energy"] += 50.0
        assert list(found_in(structures)) == [30]


def dimer(distance: float, box: float | None) -> Atoms:
    return with_labels(
        Atoms("Cu2", [[0, 0, 0], [distance, 0, 0]], cell=box and [box, box, box], pbc=box is not None)
    )


@pytest.mark.parametrize("box", [None, 12.0])
def test_dimers_beside_crystals_of_the_same_formula_are_molecules_and_not_wrong(box: float | None) -> None:
    """Near its equilibrium a dimer has no force that would explain why it lies above the crystal."""
    rng = np.random.default_rng(1)
    crystals = []
    for _ in range(30):
        atoms = bulk("Cu", a=3.6 * rng.uniform(0.97, 1.03)).repeat((2, 1, 1))
        atoms.rattle(0.1, rng=rng)
        crystals.append(with_labels(atoms))
    dimers = [dimer(distance, box) for distance in np.linspace(1.7, 3.0, 9)]
    assert min(a.info["REF_energy"] for a in dimers) / 2 > 1.5 + np.mean(
        [a.info["REF_energy"] / 2 for a in crystals]
    )
    slab = with_labels(fcc111("Cu", (1, 1, 2), a=3.6, vacuum=5.0))
    assert found_in([*crystals, *dimers, slab]) == {}
    dimers[8].info["REF_energy"] += 30.0
    crystals[3].info["REF_energy"] -= 30.0
    assert list(found_in([*crystals, *dimers, slab])) == [3, 38]


def test_a_wrong_energy_of_a_strained_crystal_is_not_excused_as_one_of_another_density() -> None:
    structures = sane()
    structures[0].set_cell(structures[0].cell * 1.15, scale_atoms=True)  # half as large again
    with_labels(structures[0]).info["REF_energy"] += 60.0
    assert list(found_in(structures)) == [0]


def test_a_stress_in_kbar_is_found_among_however_few_labels(tmp_path: Path) -> None:
    structures = sane(3)
    for atoms, pressure in zip(structures, (np.nan, 0.03, -52.0), strict=True):
        atoms.info |= {"REF_stress": np.array([pressure] * 3 + [0.0] * 3), "key": str(pressure)}
    structures[0].info["REF_stress"][:] = np.nan
    write_structures(tmp_path / "labels.h5", structures)
    assert suspects(LabelTable.read(tmp_path / "labels.h5")).keys() == {2}


def test_an_element_that_only_one_structure_has_makes_it_no_suspect() -> None:
    oxide = labelled(ALLOYS[0], 70)
    oxide.set_chemical_symbols(["Cu", "Cu", "Cu", "O"])
    oxide.info["REF_energy"] = -400.0
    assert found_in([*sane(), oxide]) == {}


def test_a_few_labels_say_nothing_about_energies() -> None:
    structures = sane(9)
    structures[0].info["REF_energy"] += 100.0
    assert found_in(structures) == {}


def test_absurd_forces_are_found_among_however_few_labels() -> None:
    structures = sane(2)
    structures[1].arrays["REF_forces"][2, 0] = 1e4
    assert list(found_in(structures)) == [1]
    assert "1e+04 eV/Å" in found_in(structures)[1]


def test_labels_of_one_structure_that_disagree_are_all_suspect_and_equal_ones_are_not() -> None:
    structures = sane(6)
    structures[4] = structures[1].copy()
    structures[5] = structures[2].copy()
    structures[5].info["REF_energy"] += 4 * 1e-3
    assert list(found_in(structures, ["a", "b", "c", "d", "b", "c"])) == [2, 5]


def test_tables_of_different_elements_are_joined_in_order() -> None:
    first, second = sane(3), [labelled("Ag-Ag-Cu-Cu", 9), labelled("Ag-Ag-Ag-Ag", 10)]
    whole = LabelTable.of(["0", "1", "2", "3", "4"], [*first, *second])
    joined = LabelTable.joined(
        [LabelTable.of(["0", "1", "2"], first), LabelTable.of([], []), LabelTable.of(["3", "4"], second)]
    )
    assert joined.keys == whole.keys
    for name in (
        "energies_s",
        "max_forces_s",
        "mean_forces_s",
        "max_stresses_s",
        "num_periodic_s",
        "volumes_s",
        "numbers_k",
        "counts_sk",
    ):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_two_labels_agree_within_what_convergence_leaves_open() -> None:
    forces = np.random.default_rng(0).normal(size=(4, 3))
    label = Label(-10.0, "free_energy", forces, np.zeros(6))
    assert disagreement(label, Label(-10.0 + 2e-4, "energy", forces + 1e-3, None)) is None
    assert disagreement(label, Label(-10.1, "free_energy", forces, None)) == "energy by 0.025 eV/atom"
    other = Label(-10.0, "free_energy", forces + 0.1, np.full(6, 0.01))
    assert disagreement(label, other) == "forces by up to 0.1 eV/Å and stress by up to 0.01 eV/Å³"


def test_a_stress_that_is_not_symmetric_is_refused() -> None:
    stress = np.array([[1.0, 0.2, 0.3], [0.2, 2.0, 0.4], [0.3, 0.4, 3.0]])
    np.testing.assert_array_equal(symmetric_voigt(stress), [1.0, 2.0, 3.0, 0.4, 0.3, 0.2])
    stress[0, 1] = -0.2
    with pytest.raises(LabelError, match=r"not symmetric.*0\.4"):
        symmetric_voigt(stress)

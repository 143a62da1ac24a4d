"""One label, one relaxation: what comes out, in which convention, and what is never let through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, SCFError, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from hpcft.errors import LabelError
from hpcft.labelling.label import Label, compute_label, relax


class Fixed(Calculator):
    """Gives the results that it is given, for the properties that it is asked for."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, error: Exception | None = None, **results: Any) -> None:
        super().__init__()
        self.given = results
        self.error = error
        self.requests: list[list[str]] = []

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.requests.append(list(properties))
        if self.error is not None:
            raise self.error
        self.results = dict(self.given)


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms


def dimer() -> Atoms:
    return Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.5]], cell=[9, 9, 9], pbc=True)


def opposite(force: float) -> np.ndarray[Any, Any]:
    return np.array([[0, 0, force], [0, 0, -force]])


def labels_of(calculator: Calculator) -> Callable[[Atoms], Label]:
    return lambda atoms: compute_label(atoms, calculator)


def cause_of(atoms: Atoms, calculator: Calculator) -> str:
    with pytest.raises(LabelError) as caught:
        compute_label(atoms, calculator)
    return caught.value.cause


def test_a_label_is_what_ase_computes() -> None:
    atoms = copper()
    label = compute_label(atoms, EMT())
    atoms.calc = EMT()
    assert label.energy == atoms.get_potential_energy()
    assert label.energy_kind == "free_energy"
    np.testing.assert_array_equal(label.forces_n3, atoms.get_forces())
    assert label.stress_6 is not None
    np.testing.assert_array_equal(label.stress_6, atoms.get_stress())


def test_all_properties_come_from_one_calculation() -> None:
    calculator = Fixed(energy=1.0, forces=opposite(0.5), stress=np.zeros(6))
    compute_label(dimer(), calculator)
    assert calculator.requests == [["energy", "forces", "stress"]]


def test_the_energy_that_belongs_to_the_forces_is_preferred_and_the_choice_recorded() -> None:
    results = {"forces": opposite(0.5), "stress": np.zeros(6)}
    with_both = compute_label(dimer(), Fixed(energy=1.0, free_energy=2.0, **results))
    with_one = compute_label(dimer(), Fixed(energy=1.0, **results))
    assert (with_both.energy, with_both.energy_kind) == (2.0, "free_energy")
    assert (with_one.energy, with_one.energy_kind) == (1.0, "energy")


def test_a_molecule_has_no_stress() -> None:
    atoms = molecule("H2O")
    atoms.center(vacuum=4.0)
    assert compute_label(atoms, EMT()).stress_6 is None


def test_a_stress_tensor_comes_out_in_voigt_order() -> None:
    tensor = np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3]])
    label = compute_label(dimer(), Fixed(energy=1.0, forces=opposite(0.5), stress=tensor))
    np.testing.assert_array_equal(label.stress_6, [1, 2, 3, 4, 5, 6])


def test_a_code_that_refuses_stress_after_all_is_asked_without_it() -> None:
    class NoStress(Fixed):
        def calculate(
            self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes
        ) -> None:
            if "stress" in properties:
                raise PropertyNotImplementedError("stress")
            super().calculate(atoms, properties, system_changes)

    assert compute_label(dimer(), NoStress(energy=1.0, forces=opposite(0.5))).stress_6 is None


def test_constraints_do_not_touch_the_forces() -> None:
    free, fixed = copper(), copper()
    fixed.set_constraint(FixAtoms([0, 1]))
    np.testing.assert_array_equal(compute_label(fixed, EMT()).forces_n3, compute_label(free, EMT()).forces_n3)


@pytest.mark.parametrize(
    "results",
    [
        {"energy": np.nan, "forces": opposite(0.5)},
        {"energy": 1.0, "forces": opposite(np.inf)},
        {"energy": 1.0, "forces": opposite(0.5), "stress": np.full(6, np.nan)},
        {"energy": 1.0, "free_energy": np.inf, "forces": opposite(0.5)},
    ],
)
def test_nothing_but_finite_numbers_is_a_label(results: dict[str, Any]) -> None:
    assert cause_of(dimer(), Fixed(**results)) == "non-finite"


def test_forces_that_do_not_add_up_to_zero_are_no_label() -> None:
    assert cause_of(dimer(), Fixed(energy=1.0, forces=np.ones((2, 3)))) == "net-force"


def test_a_net_force_of_rounding_size_is_let_through() -> None:
    compute_label(dimer(), Fixed(energy=1.0, forces=opposite(0.5) + 1e-3))
    compute_label(bulk("Cu"), Fixed(energy=1.0, forces=np.full((1, 3), 1e-9)))


@pytest.mark.parametrize(
    "results", [{"energy": 1.0}, {"forces": opposite(1)}, {"energy": 1.0, "forces": np.ones(3)}]
)
def test_a_result_without_energy_or_with_other_forces_is_no_label(results: dict[str, Any]) -> None:
    assert cause_of(dimer(), Fixed(**results)) == "calculator"


def test_a_calculator_that_knows_itself_unconverged_gives_no_label() -> None:
    calculator = Fixed(energy=1.0, forces=opposite(0.5))
    calculator.converged = False  # as ASE's VASP calculator does, which reads the numbers all the same
    assert cause_of(dimer(), calculator) == "scf"


def test_an_exception_of_the_code_becomes_its_cause() -> None:
    assert cause_of(dimer(), Fixed(SCFError("no"))) == "scf"
    assert cause_of(bulk("Si"), EMT()) == "bad-input"


@pytest.mark.parametrize(
    "atoms",
    [
        Atoms(),
        Atoms("Cu", positions=[[np.nan, 0, 0]]),
        Atoms("Cu", pbc=True),
        Atoms("Cu", cell=[[1, 0, 0], [1, 0, 0], [0, 0, 1]], pbc=True),
        Atoms("X"),
    ],
)
def test_an_impossible_structure_is_not_even_tried(atoms: Atoms) -> None:
    calculator = Fixed(energy=1.0)
    assert cause_of(atoms, calculator) == "geometry"
    assert calculator.requests == []


def test_a_vacancy_relaxes_to_the_force_limit_at_fixed_cell() -> None:
    atoms = bulk("Cu", cubic=True).repeat(2)
    del atoms[0]
    places = []

    def label_of(structure: Atoms) -> Label:
        places.append(structure.positions.tobytes())
        return compute_label(structure, calculator)

    calculator = EMT()
    relaxation = relax(atoms, label_of, 0.01, 100)
    assert relaxation.converged
    assert relaxation.max_force < 0.01
    assert relaxation.energy_relaxed < relaxation.energy_start
    assert len(places) == len(set(places)) == relaxation.num_steps + 1
    np.testing.assert_array_equal(relaxation.start.positions, atoms.positions)
    np.testing.assert_array_equal(relaxation.relaxed.cell, atoms.cell)
    assert compute_label(relaxation.relaxed, EMT()).energy == pytest.approx(
        relaxation.energy_relaxed, abs=1e-9
    )


def test_a_strained_crystal_relaxes_with_its_cell_to_no_stress_at_all() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array @ np.diag([1.03, 0.99, 1.01]), scale_atoms=True)
    relaxation = relax(atoms, labels_of(EMT()), 0.001, 100, with_cell=True)
    assert relaxation.converged
    stress_6 = compute_label(relaxation.relaxed, EMT()).stress_6
    assert stress_6 is not None
    assert np.abs(stress_6).max() < 1e-4
    np.testing.assert_allclose(relaxation.relaxed.cell.lengths(), 3.59, atol=0.02)
    np.testing.assert_array_equal(relaxation.start.cell.array, atoms.cell.array)


def test_a_relaxation_that_runs_out_of_steps_says_so() -> None:
    relaxation = relax(copper(), labels_of(EMT()), 1e-6, 2)
    assert not relaxation.converged
    assert relaxation.num_steps == 2
    assert relaxation.max_force > 1e-6


def test_a_structure_at_rest_needs_no_step() -> None:
    relaxation = relax(bulk("Cu"), labels_of(EMT()), 0.01, 10)
    assert (relaxation.converged, relaxation.num_steps) == (True, 0)


def test_a_relaxation_stops_at_the_first_number_that_is_not_finite() -> None:
    calculator = Fixed(energy=1.0, forces=opposite(np.nan))
    with pytest.raises(LabelError, match="NaN") as caught:
        relax(dimer(), labels_of(calculator), 0.01, 100)
    assert caught.value.cause == "non-finite"

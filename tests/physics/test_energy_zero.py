"""The zero of energy: found by a fit that wrong frames do not spoil, or from isolated atoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers
from small_models import small_mace

from hpcft.errors import UserError
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, evaluate
from hpcft.training.energy_zero import fitted_shifts, shifted, shifts_to

AL, CU, AG = 13, 29, 47
WANTED = {AL: -56.7, CU: 112.3}


def potential() -> MorsePotential:
    return MorsePotential([AL, CU, AG], cutoff=4.0).double()


def alloys(model: Potential, shifts: dict[int, float], number: int = 12) -> list[Atoms]:
    """Labels of `model` with another zero of energy, and an error of some 10 meV/atom."""
    random = np.random.default_rng(0)
    found = []
    for seed in range(number):
        atoms = bulk("Cu", a=3.7, cubic=True).repeat((2, 1, 1))
        atoms.numbers[random.permutation(8)[: 1 + seed % 7]] = AL
        atoms.rattle(0.1, seed=seed)
        result = evaluate(model, build_graph([atoms], model.cutoff))
        atoms.info["REF_energy"] = float(result.energies_b[0]) + 8 * random.normal(0, 0.01)
        atoms.arrays["REF_forces"] = result.forces_n3.numpy()
        found.append(atoms)
    return shifted(found, shifts)


def test_a_zero_hundreds_of_eV_away_is_found_element_by_element() -> None:
    shifts = fitted_shifts(potential(), alloys(potential(), WANTED))
    assert shifts.keys() == {AL, CU}  # no structure holds silver
    assert shifts == pytest.approx(WANTED, abs=0.02)


def test_frames_that_the_model_does_not_understand_do_not_set_the_zero() -> None:
    """Fails with ordinary least squares: two wild frames of twelve move it by half an eV."""
    structures = alloys(potential(), WANTED)
    for atoms in structures[:2]:
        atoms.info["REF_energy"] += 3.0 * len(atoms)
    assert fitted_shifts(potential(), structures) == pytest.approx(WANTED, abs=0.05)


def test_one_composition_shifts_its_elements_alike() -> None:
    structures = [
        atoms for atoms in alloys(potential(), {AL: 1.0, CU: 3.0}, 40) if len(atoms.symbols.search("Al")) == 4
    ]
    shifts = fitted_shifts(potential(), structures)
    assert shifts == pytest.approx({AL: 2.0, CU: 2.0}, abs=0.05)


@pytest.mark.parametrize("architecture", ["morse", "mace"])
def test_a_shifted_model_says_what_the_shifted_labels_say_and_forces_stay(
    architecture: str,
) -> None:
    model: Potential = potential() if architecture == "morse" else small_mace()
    numbers = model.elements[:2]
    shifts = {numbers[0]: -2.5, numbers[1]: 40.0}
    atoms = bulk("Cu", a=3.7, cubic=True)
    atoms.numbers[:] = [numbers[0], numbers[1], numbers[1], numbers[0]]
    atoms.rattle(0.1, seed=1)
    graph = build_graph([atoms], model.cutoff, dtype=torch.float64)
    before = evaluate(model, graph)
    atoms.info["REF_energy"] = float(before.energies_b[0])
    model.shift_energies(shifts)
    after = evaluate(model, graph)
    assert float(after.energies_b[0]) == pytest.approx(
        shifted([atoms], shifts)[0].info["REF_energy"], abs=1e-9
    )
    assert atoms.info["REF_energy"] == float(before.energies_b[0])  # copies were shifted
    torch.testing.assert_close(after.forces_n3, before.forces_n3, rtol=0, atol=1e-12)


def test_isolated_atoms_get_the_energies_of_the_reference() -> None:
    mace_model = small_mace()
    symbol = Atoms(numbers=[mace_model.elements[0]]).symbols[0]
    mace_model.shift_energies(shifts_to(mace_model, {symbol: -213.25}))
    graph = build_graph([Atoms(symbol)], mace_model.cutoff, dtype=torch.float64)
    assert float(mace_model.energies(graph).detach()[0]) == pytest.approx(-213.25, abs=1e-9)


def test_an_element_that_the_model_does_not_know_is_refused() -> None:
    assert atomic_numbers["Xe"] not in potential().elements
    with pytest.raises(UserError, match="energy_zero names Xe"):
        shifts_to(potential(), {"Xe": -1.0})

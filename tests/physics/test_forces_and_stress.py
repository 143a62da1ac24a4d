"""Forces and stress are the derivatives of the energy, for every architecture and every kind of structure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

from hpcft.errors import UserError
from hpcft.models.graph import build_graph, concatenate
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, evaluate


def energies(potential: Potential, structures: list[Atoms]) -> np.ndarray:
    return evaluate(potential, build_graph(structures, potential.cutoff)).energies_b.numpy()


def test_forces_are_the_derivative_of_the_energy_in_a_mixed_batch(
    potential: Potential, mixed_structures: list[Atoms]
) -> None:
    forces = evaluate(potential, build_graph(mixed_structures, potential.cutoff)).forces_n3.numpy()
    step = 1e-4
    offsets = np.cumsum([0] + [len(atoms) for atoms in mixed_structures])
    for number in range(max(len(atoms) for atoms in mixed_structures)):
        # One atom of every structure at a time: the structures do not see each other.
        atom = np.array([number % len(atoms) for atoms in mixed_structures])
        for axis in range(3):
            ends = []
            for sign in (-1, 1):
                moved = [atoms.copy() for atoms in mixed_structures]
                for atoms, index in zip(moved, atom, strict=True):
                    atoms.positions[index, axis] += sign * step
                ends.append(energies(potential, moved))
            slope = (ends[1] - ends[0]) / (2 * step)
            np.testing.assert_allclose(-forces[offsets[:-1] + atom, axis], slope, rtol=1e-5, atol=2e-7)
    assert np.abs(forces).max() > 0.1  # the structures are not at rest


def test_stress_is_the_derivative_of_the_energy_with_respect_to_strain(
    potential: Potential, mixed_structures: list[Atoms]
) -> None:
    structures = [atoms for atoms in mixed_structures if atoms.cell.rank == 3]
    assert len(structures) == 3
    stress = evaluate(potential, build_graph(structures, potential.cutoff), stress=True).stress_b33
    assert stress is not None
    volumes = np.array([atoms.get_volume() for atoms in structures])
    step = 1e-5
    for i, j in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
        strain = np.zeros((3, 3))
        strain[i, j] += 0.5 * step
        strain[j, i] += 0.5 * step
        ends = []
        for sign in (-1, 1):
            strained = [atoms.copy() for atoms in structures]
            for atoms in strained:
                atoms.set_cell(atoms.cell.array @ (np.eye(3) + sign * strain), scale_atoms=True)
            ends.append(energies(potential, strained))
        slope = (ends[1] - ends[0]) / (2 * step) / volumes
        np.testing.assert_allclose(stress[:, i, j].numpy(), slope, atol=1e-8)
        np.testing.assert_allclose(stress[:, j, i].numpy(), slope, atol=1e-8)
    assert stress.abs().max() > 1e-3


def test_a_structure_without_a_volume_has_no_stress_and_spoils_no_gradient(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    structures = [make_alloy(), Atoms("Cu2", positions=[[0, 0, 0], [2.2, 0, 0]])]
    result = evaluate(morse, build_graph(structures, morse.cutoff), stress=True, create_graph=True)
    assert result.stress_b33 is not None
    assert torch.equal(result.stress_b33[1], torch.zeros(3, 3, dtype=torch.float64))
    gradients = torch.autograd.grad((result.stress_b33**2).sum(), list(morse.parameters()), allow_unused=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
    assert gradients[0] is not None and gradients[0].abs().max() > 0


def test_a_batch_gives_the_results_of_its_structures_one_by_one(
    potential: Potential, mixed_structures: list[Atoms]
) -> None:
    together = evaluate(potential, build_graph(mixed_structures, potential.cutoff))
    alone = [evaluate(potential, build_graph([atoms], potential.cutoff)) for atoms in mixed_structures]
    joined = concatenate([build_graph([atoms], potential.cutoff) for atoms in mixed_structures])
    for result in (together, evaluate(potential, joined)):
        torch.testing.assert_close(
            result.energies_b, torch.cat([one.energies_b for one in alone]), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            result.forces_n3, torch.cat([one.forces_n3 for one in alone]), rtol=0, atol=1e-12
        )


def test_a_supercell_has_the_energy_of_its_cells_wherever_its_atoms_are_written_down(
    potential: Potential, mixed_structures: list[Atoms]
) -> None:
    cells = [atoms for atoms in mixed_structures if atoms.pbc.any() and len(atoms) < 8]
    assert len(cells) == 3
    random = np.random.default_rng(0)
    repeats, others = [], []
    for atoms in cells:
        repeats.append(np.where(atoms.pbc, [2, 3, 2], 1))
        other = atoms.repeat(repeats[-1])
        other.positions += (random.integers(-2, 3, other.positions.shape) * other.pbc) @ other.cell.array
        others.append(other)
    before, after = (evaluate(potential, build_graph(a, potential.cutoff)) for a in (cells, others))
    expected = before.energies_b.numpy() * [np.prod(repeat) for repeat in repeats]
    np.testing.assert_allclose(after.energies_b.numpy(), expected, atol=1e-10)
    lengths = [len(atoms) for atoms in cells]
    tiled = [
        np.tile(f, (np.prod(r), 1)) for f, r in zip(before.forces_n3.split(lengths), repeats, strict=True)
    ]
    np.testing.assert_allclose(after.forces_n3.numpy(), np.concatenate(tiled), atol=1e-10)


def test_energy_and_descriptors_do_not_change_when_a_structure_is_turned_or_permuted(
    potential: Potential, mixed_structures: list[Atoms]
) -> None:
    rotation = Rotation.from_rotvec([0.4, -0.9, 0.3]).as_matrix()
    random = np.random.default_rng(0)
    turned, orders, offset = [], [], 0
    for atoms in mixed_structures:
        order = random.permutation(len(atoms))
        copy = atoms[order]
        copy.set_cell(atoms.cell.array @ rotation)
        copy.positions = copy.positions @ rotation + [0.3, 0.2, -0.1]
        turned.append(copy)
        orders.append(order + offset)
        offset += len(atoms)
    before = build_graph(mixed_structures, potential.cutoff)
    after = build_graph(turned, potential.cutoff)
    np.testing.assert_allclose(
        potential.energies(after).detach(), potential.energies(before).detach(), atol=1e-11
    )
    features = potential.descriptors(before)
    np.testing.assert_allclose(potential.descriptors(after), features[np.concatenate(orders)], atol=1e-11)
    assert features.std(dim=0).max() > 1e-3


def test_an_atom_alone_feels_no_force_and_has_its_own_energy(potential: Potential) -> None:
    result = evaluate(potential, build_graph([Atoms("Al"), Atoms("Cu")], potential.cutoff))
    assert torch.count_nonzero(result.forces_n3) == 0
    assert abs(float(result.energies_b[0] - result.energies_b[1])) > 1e-3


@pytest.mark.parametrize("symbol", ["Ni", "Au"])
def test_an_element_that_the_model_does_not_know_is_an_error_and_not_another_element(
    potential: Potential, symbol: str
) -> None:
    with pytest.raises((UserError, RuntimeError, IndexError)):
        potential.energies(build_graph([Atoms(symbol)], potential.cutoff))

"""Delta Q, the mass-weighted distance between two structures: values by hand and invariances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.models.graph import build_graph
from hpcft.relaxation import cell_distance, delta_q, displacements, minimum_image, rmsd, with_cells

CU, AL = 63.546, 26.9815385  # amu


def distances(pairs: list[tuple[Atoms, Atoms]]) -> list[float]:
    """Delta Q of each (final, target)."""
    graph = build_graph([final for final, _ in pairs], 0.1)
    target = torch.from_numpy(np.concatenate([target.get_positions() for _, target in pairs]))
    return [float(d) for d in delta_q(graph.positions_n3, target, graph)]


def distance(final: Atoms, target: Atoms) -> float:
    return distances([(final, target)])[0]


def moved(atoms: Atoms, *displacements: tuple[int, list[float]]) -> Atoms:
    copy = atoms.copy()
    for index, vector in displacements:
        copy.positions[index] += vector
    return copy


def test_the_distance_of_a_molecule_is_the_one_computed_by_hand() -> None:
    molecule = Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 2.5]])
    end = moved(molecule, (0, [0.3, 0.0, -0.4]), (1, [0.0, 0.1, 0.0]))
    assert distance(molecule, end) == pytest.approx(np.sqrt(CU * 0.25 + AL * 0.01), rel=1e-9)


def test_in_a_periodic_cell_the_common_drift_does_not_count() -> None:
    cell = Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 2.5]], cell=[6, 6, 6], pbc=True)
    end = moved(cell, (0, [0.4, 0.0, 0.0]))
    drift = CU * 0.4 / (CU + AL)
    assert distance(cell, end) == pytest.approx(np.sqrt(CU * (0.4 - drift) ** 2 + AL * drift**2), rel=1e-9)
    assert distance(cell, moved(cell, (0, [0.4, 0.1, 0]), (1, [0.4, 0.1, 0]))) == pytest.approx(0.0, abs=1e-5)


def test_drift_counts_where_a_direction_is_open() -> None:
    slab = Atoms("Cu", positions=[[0, 0, 0]], cell=[6, 6, 6], pbc=[True, True, False])
    assert distance(slab, moved(slab, (0, [0.0, 0.0, 0.5]))) == pytest.approx(np.sqrt(CU) * 0.5, rel=1e-9)
    # Along the open direction a whole cell is a real distance, along a periodic one it is none.
    assert distance(slab, moved(slab, (0, [0.0, 0.0, 6.0]))) == pytest.approx(np.sqrt(CU) * 6.0, rel=1e-9)
    assert distance(slab, moved(slab, (0, [6.0, -12.0, 0.0]))) == pytest.approx(0.0, abs=1e-5)


@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), skewed=st.booleans())
def test_translations_and_lattice_vectors_change_nothing_in_a_periodic_cell(seed: int, skewed: bool) -> None:
    random = np.random.default_rng(seed)
    cell = bulk("Cu", a=3.7).repeat(3) if skewed else bulk("Cu", a=3.7, cubic=True).repeat(2)
    cell.numbers[::3] = 13
    end = cell.copy()
    end.positions += random.normal(0, 0.2, end.positions.shape)
    expected = distance(cell, end)
    assert expected > 1.0
    # Together with the displacements a translation has to stay below half the cell: beyond, images are ambiguous.
    shifted = end.copy()
    shifted.positions += random.uniform(-0.15, 0.15, 3) @ cell.cell.array
    assert distance(cell, shifted) == pytest.approx(expected, rel=1e-9)
    assert distance(shifted, end) == pytest.approx(0.0, abs=1e-5)
    wrapped = end.copy()
    wrapped.positions += random.integers(-2, 3, end.positions.shape) @ cell.cell.array
    assert distance(cell, wrapped) == pytest.approx(expected, rel=1e-9)
    assert distance(wrapped, cell) == pytest.approx(expected, rel=1e-9)


def test_exchanging_two_atoms_is_a_distance(make_alloy: Callable[..., Atoms]) -> None:
    cell = make_alloy((2, 2, 2))
    order = list(range(len(cell)))
    order[1], order[3] = 3, 1  # both Cu
    exchanged = cell[order]
    assert list(exchanged.numbers) == list(cell.numbers)
    apart = float(cell.get_distance(1, 3, mic=True))
    assert distance(cell, exchanged) == pytest.approx(np.sqrt(2 * CU) * apart, rel=1e-9)


def test_each_structure_of_a_batch_has_its_own_distance(
    mixed_structures: list[Atoms],
) -> None:
    pairs = []
    for number, atoms in enumerate(mixed_structures):
        end = atoms.copy()
        end.rattle(0.1 + 0.1 * number, seed=number)
        pairs.append((atoms, end))
    together = distances(pairs)
    assert together == pytest.approx([distance(*pair) for pair in pairs], rel=1e-12)
    assert len({round(d, 3) for d in together}) == len(pairs)


def test_the_gradient_stays_finite_where_two_structures_coincide(make_alloy: Callable[..., Atoms]) -> None:
    graph = build_graph([make_alloy()], 0.1)
    final = graph.positions_n3.clone().requires_grad_(True)
    result = delta_q(final, graph.positions_n3, graph)
    (gradient,) = torch.autograd.grad(result.sum(), final)
    assert float(result.detach()) < 1e-5
    assert torch.isfinite(gradient).all()


@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_vectors_shorter_than_half_the_cells_width_come_back_from_any_image(seed: int) -> None:
    random = np.random.default_rng(seed)
    cell = np.eye(3) * random.uniform(5.0, 8.0, 3) + random.uniform(-2.0, 2.0, (3, 3))
    atoms = Atoms("Cu", cell=cell, pbc=random.integers(0, 2, 3).astype(bool))
    width = (1.0 / np.linalg.norm(atoms.cell.reciprocal(), axis=1)).min()
    vector = random.normal(size=3)
    vector *= random.uniform(0, 0.499) * width / np.linalg.norm(vector)
    image = vector + (random.integers(-3, 4, 3) * atoms.pbc) @ cell
    found = minimum_image(torch.from_numpy(image[None]), build_graph([atoms], 0.1))
    np.testing.assert_allclose(found.numpy()[0], vector, atol=1e-12)


def cubic(length: float = 6.0) -> Atoms:
    return Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 2.5]], cell=[length] * 3, pbc=True)


def test_in_an_anchored_cell_the_common_drift_counts() -> None:
    """Its fixed atoms say where it is."""
    start, end = cubic(), moved(cubic(), (0, [0.4, 0.1, 0]), (1, [0.4, 0.1, 0]))
    graph = build_graph([start, start], 0.1)
    target = torch.from_numpy(np.concatenate([end.positions, end.positions]))
    found = delta_q(graph.positions_n3, target, graph, anchored_b=torch.tensor([True, False]))
    assert found.tolist() == pytest.approx([np.sqrt((CU + AL) * 0.17), 0.0], abs=1e-5)


def test_the_rmsd_is_the_one_computed_by_hand() -> None:
    molecule = Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 2.5]])
    graph = build_graph([molecule, cubic()], 0.1)
    step = torch.tensor([[0.3, 0, -0.4], [0, 0.1, 0], [0.3, 0, 0], [0, 0, 0]], dtype=torch.float64)
    drift = CU * 0.3 / (CU + AL)  # the centre of mass is what stays, in a cell
    expected = [np.sqrt((0.25 + 0.01) / 2), np.sqrt(((0.3 - drift) ** 2 + drift**2) / 2)]
    found = rmsd(graph.positions_n3, graph.positions_n3 + step, graph)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_pure_strain_is_a_distance_of_cells_and_none_of_atoms(make_alloy: Callable[..., Atoms]) -> None:
    target = make_alloy((2, 1, 1), seed=1)
    final = target.copy()
    final.set_cell(target.cell.array @ np.diag([1.03, 1.0, 0.98]), scale_atoms=True)
    graph, there = build_graph([final], 0.1), build_graph([target], 0.1)
    found = delta_q(graph.positions_n3, there.positions_n3, there, final_cell_b33=graph.cell_b33)
    assert float(found) == pytest.approx(0.0, abs=1e-5)
    assert float(delta_q(graph.positions_n3, there.positions_n3, there)) > 0.1
    # By hand: the strain (C - 1) / 2 of the stretched lengths, in units of the mass and of the distance of neighbours.
    strain = np.array([1.03**2 - 1, 0.0, 0.98**2 - 1]) / 2
    spacing = (target.get_volume() / len(target)) ** (1 / 3)
    expected = np.sqrt(4 * (CU + AL)) * spacing * np.linalg.norm(strain)
    assert float(cell_distance(graph.cell_b33, there)) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_how_a_cell_is_turned_does_not_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    target = bulk("Cu", a=3.7, cubic=True).repeat((2, 1, 1))
    target.set_cell(target.cell.array + random.uniform(-0.3, 0.3, (3, 3)), scale_atoms=True)
    final = target.copy()
    final.set_cell(final.cell.array @ (np.eye(3) + random.uniform(-0.05, 0.05, (3, 3))), scale_atoms=True)
    final.rattle(0.1, seed=seed)
    turned = final.copy()
    turned.rotate(float(random.uniform(0, 360)), random.normal(size=3), rotate_cell=True)
    there = build_graph([target], 0.1)
    distances = []
    for atoms in (final, turned):
        graph = build_graph([atoms], 0.1)
        within = delta_q(graph.positions_n3, there.positions_n3, there, final_cell_b33=graph.cell_b33)
        distances.append([float(within), float(cell_distance(graph.cell_b33, there))])
    assert min(distances[0]) > 0.1
    assert distances[1] == pytest.approx(distances[0], rel=1e-9)


def test_open_structures_have_no_distance_of_cells_and_may_stand_beside_others(
    make_alloy: Callable[..., Atoms],
) -> None:
    """Fails if a missing cell is inverted."""
    structures = [make_alloy((1, 1, 1)), Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 2.5]])]
    graph = build_graph(structures, 0.1)
    final = graph.positions_n3.clone().requires_grad_(True)
    cells = (1.01 * graph.cell_b33).requires_grad_(True)
    within = delta_q(final, graph.positions_n3 + 0.1, graph, final_cell_b33=cells)
    apart = cell_distance(cells, graph)
    assert float(within[1].detach()) == pytest.approx(np.sqrt((CU + AL) * 0.03), rel=1e-9)
    assert float(apart[0].detach()) > 0.1
    assert float(apart[1].detach()) == pytest.approx(0.0, abs=1e-5)
    gradients = torch.autograd.grad((within + apart).sum(), [final, cells])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_all_gradients_stay_finite_where_structures_and_cells_coincide(
    make_alloy: Callable[..., Atoms],
) -> None:
    graph = build_graph([make_alloy()], 0.1)
    final = graph.positions_n3.clone().requires_grad_(True)
    cells = graph.cell_b33.clone().requires_grad_(True)
    same = with_cells(graph, graph.cell_b33)
    for distance in (
        delta_q(final, graph.positions_n3, same, final_cell_b33=cells),
        rmsd(final, graph.positions_n3, same, final_cell_b33=cells),
        cell_distance(cells, same),
    ):
        assert float(distance.detach()) < 1e-5
        found = torch.autograd.grad(distance.sum(), [final, cells], allow_unused=True, materialize_grads=True)
        assert all(torch.isfinite(gradient).all() for gradient in found)


def test_displacements_lead_from_the_end_to_the_target_within_its_cell() -> None:
    start, end = cubic(), moved(cubic(), (0, [0.3, 0, 0]), (1, [-0.3 * CU / AL, 0, 0]))
    graph = build_graph([start], 0.1)
    found = displacements(graph.positions_n3, torch.from_numpy(end.positions), graph)
    np.testing.assert_allclose(found.numpy(), end.positions - start.positions, atol=1e-12)
    larger = 1.1 * graph.cell_b33
    found = displacements(
        1.1 * graph.positions_n3, torch.from_numpy(end.positions), graph, final_cell_b33=larger
    )
    np.testing.assert_allclose(found.numpy(), end.positions - start.positions, atol=1e-12)

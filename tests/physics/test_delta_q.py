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
from hpcft.relaxation import delta_q, minimum_image

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


@settings(max_examples=60, deadline=None, derandomize=True)
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


@settings(max_examples=40, deadline=None, derandomize=True)
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

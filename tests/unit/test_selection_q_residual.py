"""The Q-residual against its definition, written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.selection.q_residual import (
    EXPLAINED,
    Q_RESIDUAL,
    principal_space,
    q_observer,
    space_of_structures,
)


def by_definition(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|x - m - P P^T (x - m)|^2 in units of the reference's largest, by a singular-value decomposition."""
    mean = reference.mean(0)
    _, singular, rows = np.linalg.svd(reference - mean)
    explained = np.cumsum(singular**2) / (singular**2).sum()
    components = rows[: int(np.argmax(explained >= EXPLAINED)) + 1].T

    def rest(points: np.ndarray) -> np.ndarray:
        centred = points - mean
        return np.asarray(((centred - centred @ components @ components.T) ** 2).sum(1))

    return rest(features) / rest(reference).max()


def test_it_is_the_squared_distance_from_the_space_in_units_of_the_references_largest() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=(200, 6)) * [5, 3, 1, 0.1, 0.05, 0.01] + 7
    others = random.normal(size=(30, 6)) * 4
    space = principal_space(torch.from_numpy(reference))
    found = space.residuals_n(torch.from_numpy(others)).numpy()
    np.testing.assert_allclose(found, by_definition(others, reference), rtol=1e-9)
    assert float(space.residuals_n(torch.from_numpy(reference)).max()) == pytest.approx(1.0)
    scaled = principal_space(torch.from_numpy(1000 * reference))  # another model's unit
    np.testing.assert_allclose(scaled.residuals_n(torch.from_numpy(1000 * others)).numpy(), found, rtol=1e-6)


def test_moving_within_the_space_costs_nothing_and_leaving_it_does() -> None:
    random = np.random.default_rng(1)
    plane, normal = np.array([[1.0, 1, 0, 0], [0, 1, -1, 0]]), np.array([0.0, 0, 0, 1])
    reference = random.normal(size=(50, 2)) @ plane + 1e-3 * random.normal(size=(50, 1)) * normal
    space = principal_space(torch.from_numpy(reference))
    assert space.components_dk.shape == (4, 2)
    within, outside = 3 * plane[0], 3 * plane[0] + 0.1 * normal
    residuals = space.residuals_n(torch.from_numpy(np.stack([within, outside]))).numpy()
    assert residuals[0] < 1 < 100 < residuals[1]


def test_where_all_reference_atoms_are_alike_rounding_is_not_taken_for_something_new() -> None:
    row = torch.linspace(1.0, 2.0, 8)
    space = principal_space(row.repeat(20, 1))
    assert float(space.residuals_n((row * (1 + 1e-6))[None])) < 1e-3
    assert float(space.residuals_n(1.1 * row[None])) > 100


def test_one_strange_atom_counts_in_a_structure_of_any_size() -> None:
    """Fails if it is a mean over atoms, which thins out what is new in a large cell."""
    potential = MorsePotential([29], cutoff=4.0).double()
    known = []
    for seed in range(4):
        known.append(bulk("Cu", a=3.6, cubic=True).repeat((2, 2, 1)))
        known[-1].rattle(0.05, seed=seed)
    observe = q_observer(potential, space_of_structures(potential, known))
    small, large = known[0].copy(), known[0].repeat((2, 2, 2))
    for atoms in (small, large):
        atoms.positions[0] += [0.9, 0.0, 0.0]
    found = observe(build_graph([*known, small, large], 4.0))[Q_RESIDUAL]
    assert found[:4].max() == pytest.approx(1.0)
    assert (found[4:] > 3).all()
    assert found[5] == pytest.approx(found[4], rel=0.5)


def test_a_reference_without_atoms_or_with_a_foreign_element_is_refused_by_its_number() -> None:
    potential = MorsePotential([29], cutoff=4.0).double()
    with pytest.raises(UserError, match="no atom to make the space"):
        space_of_structures(potential, [Atoms()])
    with pytest.raises(UserError, match=r"structure 1 .* holds Au, which the model does not know"):
        space_of_structures(potential, [bulk("Cu"), bulk("Au")])

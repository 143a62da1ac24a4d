"""What the tests of physics share: two potentials, structures of every kind, and ASE's view of a potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from small_models import alloy, small_mace, small_morse

from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, dtype_of, evaluate


class PotentialCalculator(Calculator):
    """A potential as an ASE calculator, so that ASE's optimisers can be asked for a second opinion."""

    implemented_properties = ("energy", "forces")  # type: ignore[assignment]

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        graph = build_graph([self.atoms], self.potential.cutoff, dtype=dtype_of(self.potential))
        result = evaluate(self.potential, graph)
        self.results = {"energy": float(result.energies_b[0]), "forces": result.forces_n3.double().numpy()}


@pytest.fixture
def as_calculator() -> Callable[[Potential], Calculator]:
    return PotentialCalculator


@pytest.fixture
def morse() -> MorsePotential:
    return small_morse()


@pytest.fixture(scope="session")
def tiny_mace() -> Any:
    """One for all tests, which must leave it as it is."""
    return small_mace()


@pytest.fixture(params=["morse", "tiny_mace"])
def potential(request: pytest.FixtureRequest) -> Any:
    """Each architecture in turn."""
    return request.getfixturevalue(request.param)


def every_kind() -> list[Atoms]:
    """Periodic, skewed and so small that atoms see their own images; open; alone; periodic in two directions."""
    small = bulk("Cu", a=3.7)
    small.set_cell(small.cell.array @ (np.eye(3) + 0.03 * np.random.default_rng(0).normal(size=(3, 3))))
    cluster = Atoms("Cu3Al", positions=[[0, 0, 0], [2.4, 0, 0], [0, 2.6, 0.3], [1, 1, 2.1]])
    slab = alloy((1, 1, 1), seed=3)
    slab.pbc = [True, True, False]
    wire = Atoms("CuAl", positions=[[0, 0, 0], [0.3, 1.9, 1.3]], cell=[0, 0, 2.9], pbc=[False, False, True])
    return [alloy(), small, cluster, Atoms("Al"), slab, wire]


@pytest.fixture
def mixed_structures() -> list[Atoms]:
    return every_kind()


@pytest.fixture
def make_alloy() -> Callable[..., Atoms]:
    return alloy

"""What the tests of physics share: two potentials, structures of every kind, and ASE's view of a potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes

from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, dtype_of, evaluate

CUTOFF = 4.0  # Å, of both potentials


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
    """A Morse potential of Al and Cu that tells the two apart in every parameter, float64."""
    torch.manual_seed(0)
    potential = MorsePotential([13, 29], cutoff=CUTOFF).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return potential


@pytest.fixture(scope="session")
def tiny_mace() -> Any:
    """A MACE of Al and Cu with random weights and vector features, float64; no test may change it."""
    from hpcft.models.mace import build_mace

    torch.manual_seed(0)
    block = "RealAgnosticResidualInteractionBlock"
    return build_mace(
        {
            "r_max": CUTOFF,
            "num_bessel": 4,
            "num_polynomial_cutoff": 5.0,
            "max_ell": 2,
            "interaction_cls": block,
            "interaction_cls_first": block,
            "num_interactions": 2,
            "num_elements": 2,
            "hidden_irreps": "4x0e+4x1o",
            "MLP_irreps": "4x0e",
            "gate": "silu",
            "readout_cls": "NonLinearReadoutBlock",
            "atomic_energies": [[1.0, -2.0]],
            "avg_num_neighbors": 10.0,
            "atomic_numbers": [13, 29],
            "correlation": 2,
            "radial_type": "bessel",
            "radial_MLP": [8],
            "atomic_inter_scale": 10.0,
            "atomic_inter_shift": 0.1,
            "heads": ["Default"],
        },
        torch.float64,
    )


@pytest.fixture(params=["morse", "tiny_mace"])
def potential(request: pytest.FixtureRequest) -> Any:
    """Each architecture in turn."""
    return request.getfixturevalue(request.param)


def alloy(repeat: tuple[int, int, int] = (2, 1, 1), rattle: float = 0.1, seed: int = 0) -> Atoms:
    """A periodic fcc cell of Cu with every second atom Al, off its lattice sites."""
    atoms = bulk("Cu", a=3.7, cubic=True).repeat(repeat)
    atoms.numbers[::2] = 13
    atoms.rattle(rattle, seed=seed)
    return atoms


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

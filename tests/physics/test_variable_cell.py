"""Relaxation of the cell together with the atoms: its forces, where it ends, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcft.models.graph import Graph, build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Potential, evaluate
from hpcft.relaxation import Coordinates, Descent, relax, unroll

TIGHT = {"fmax": 1e-5, "max_stress": 1e-6, "with_cell": True, "max_steps": 2000}


class StressCalculator(Calculator):
    """A potential as an ASE calculator with stress."""

    implemented_properties = ("energy", "forces", "stress")  # type: ignore[assignment]

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        result = evaluate(self.potential, build_graph([self.atoms], self.potential.cutoff), stress=True)
        assert result.stress_b33 is not None
        self.results = {
            "energy": float(result.energies_b[0]),
            "forces": result.forces_n3.numpy(),
            "stress": full_3x3_to_voigt_6_stress(result.stress_b33[0].numpy()),
        }


def stress_of(potential: Potential, atoms: Atoms) -> np.ndarray:
    stress_b33 = evaluate(potential, build_graph([atoms], potential.cutoff), stress=True).stress_b33
    assert stress_b33 is not None
    return np.asarray(stress_b33[0])


def slab(make_alloy: Callable[..., Atoms]) -> Atoms:
    atoms = make_alloy((1, 1, 1), seed=3)
    atoms.center(vacuum=6.0, axis=2)
    atoms.pbc = [True, True, False]
    return atoms


def energy_at(potential: Potential, coordinates: Coordinates, rows: Tensor) -> float:
    listed = coordinates.list_at(rows, coordinates.neighbours(potential.cutoff))
    return float(coordinates.energies_and_forces(potential, rows, listed)[0].sum())


def test_the_forces_on_every_row_are_those_of_finite_differences_in_a_strained_cell_too(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    graph = build_graph([make_alloy((1, 1, 1), seed=1), slab(make_alloy)], potential.cutoff)
    coordinates = Coordinates.of(graph, with_cell=True)
    random = torch.Generator().manual_seed(0)
    rows = coordinates.first_rows()
    rows = rows + 0.1 * torch.randn(rows.shape, generator=random, dtype=rows.dtype)
    listed = coordinates.list_at(rows, coordinates.neighbours(potential.cutoff))
    forces = coordinates.forces(potential, rows, listed)
    assert float(forces[coordinates.is_cell_r].abs().max()) > 0.1
    for row in [0, *torch.nonzero(coordinates.is_cell_r).ravel().tolist()]:
        for axis in range(3):
            step = torch.zeros_like(rows)
            step[row, axis] = 1e-4
            near, far = (
                (
                    energy_at(potential, coordinates, rows + n * step)
                    - energy_at(potential, coordinates, rows - n * step)
                )
                / (2e-4 * n)
                for n in (1, 2)
            )
            assert float(forces[row, axis]) == pytest.approx(-(4 * near - far) / 3, rel=1e-6, abs=1e-7)


def test_forces_and_stress_read_off_the_rows_are_the_real_ones(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    """At a large strain, where the rows' own forces are another thing."""
    graph = build_graph([make_alloy((1, 1, 1), seed=1), make_alloy(seed=2)], potential.cutoff)
    coordinates = Coordinates.of(graph, with_cell=True)
    random = torch.Generator().manual_seed(0)
    rows = coordinates.first_rows()
    rows = rows + 0.3 * torch.randn(rows.shape, generator=random, dtype=rows.dtype)
    listed = coordinates.list_at(rows, coordinates.neighbours(potential.cutoff))
    forces = coordinates.forces(potential, rows, listed)
    here = coordinates.graph_at(rows, listed, potential.cutoff)
    real = evaluate(potential, here, stress=True)
    assert real.stress_b33 is not None
    torch.testing.assert_close(coordinates.forces_on_atoms(rows, forces), real.forces_n3)
    largest = real.stress_b33.abs().amax(dim=(1, 2))
    torch.testing.assert_close(coordinates.largest_stress(rows, forces), largest)
    lengths = real.forces_n3.norm(dim=1)
    expected = torch.stack([lengths[graph.structure_n == b].max() for b in range(2)])
    torch.testing.assert_close(coordinates.largest_force(rows, forces), expected)


@pytest.mark.parametrize("optimiser", ["fire", "lbfgs"])
def test_a_relaxation_with_its_cell_ends_where_ase_ends(
    morse: MorsePotential, make_alloy: Callable[..., Atoms], optimiser: str
) -> None:
    assert_as_ase(morse, [make_alloy((1, 1, 1), seed=1), make_alloy(seed=2)], optimiser)


def test_a_relaxation_with_its_cell_ends_where_ase_ends_for_mace(
    tiny_mace: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    """Random weights make many minima: both begin near one."""
    (end,) = relax(tiny_mace, [make_alloy((1, 1, 1), seed=1)], optimiser="lbfgs", **TIGHT)
    start = end.atoms
    start.set_cell(start.cell.array @ (np.eye(3) + 0.01 * np.diag([1.0, -0.5, 0.7])), scale_atoms=True)
    start.rattle(0.02, seed=3)
    assert_as_ase(tiny_mace, [start], "lbfgs")


def assert_as_ase(potential: Potential, starts: list[Atoms], optimiser: str) -> None:
    for start, result in zip(starts, relax(potential, starts, optimiser=optimiser, **TIGHT), strict=True):
        reference = start.copy()
        reference.calc = StressCalculator(potential)
        BFGS(FrechetCellFilter(reference), logfile=None).run(fmax=1e-5, steps=2000)
        assert result.converged
        assert result.energy == pytest.approx(reference.get_potential_energy(), abs=1e-6)
        assert np.abs(stress_of(potential, result.atoms)).max() < 1e-6
        np.testing.assert_allclose(result.atoms.cell.cellpar(), reference.cell.cellpar(), atol=2e-3)
        apart = result.atoms.get_all_distances(mic=True) - reference.get_all_distances(mic=True)
        assert np.abs(apart).max() < 2e-3


def test_only_the_periodic_directions_are_strained_however_the_cell_is_turned(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    """A slab and a wire along the axes, and the same turned: equal energies, and nothing happens across."""
    wire = make_alloy((1, 1, 1), seed=4)
    wire.center(vacuum=6.0, axis=(0, 1))
    wire.pbc = [False, False, True]
    for atoms in (slab(make_alloy), wire):
        turned = atoms.copy()
        turned.rotate(40, (1, 2, 3), rotate_cell=True)
        along, across = relax(morse, [atoms, turned], optimiser="lbfgs", **TIGHT)
        assert along.converged
        assert across.converged
        assert across.energy == pytest.approx(along.energy, abs=1e-8)
        np.testing.assert_allclose(across.atoms.cell.cellpar(), along.atoms.cell.cellpar(), atol=1e-4)
        change = np.linalg.solve(atoms.cell.array, along.atoms.cell.array) - np.eye(3)
        both = np.outer(atoms.pbc, atoms.pbc)
        assert np.abs(change[both]).max() > 0.01
        assert np.abs(change[~both]).max() == 0.0


def test_fixed_atoms_keep_their_place_in_the_cell(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    atoms = make_alloy((2, 1, 1), seed=1)
    atoms.set_constraint(FixAtoms([0, 3]))
    (end,) = relax(morse, [atoms], optimiser="lbfgs", **TIGHT)
    before = atoms.cell.scaled_positions(atoms.positions)
    after = end.atoms.cell.scaled_positions(end.atoms.positions)
    assert end.converged
    np.testing.assert_allclose(after[[0, 3]], before[[0, 3]], atol=1e-10)
    assert np.abs(after - before)[[1, 2, 4, 5, 6, 7]].max() > 1e-3
    assert abs(end.atoms.get_volume() / atoms.get_volume() - 1) > 0.01
    assert end.atoms.constraints[0].index.tolist() == [0, 3]


def test_positions_and_cells_are_the_inverse_of_rows(make_alloy: Callable[..., Atoms]) -> None:
    graph = build_graph([make_alloy(), slab(make_alloy)], 4.0)
    coordinates = Coordinates.of(graph, with_cell=True)
    rows = coordinates.first_rows()
    rows = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    there = coordinates.positions_and_cells(rows)
    back = coordinates.positions_and_cells(coordinates.rows_at(*there))
    for found, expected in zip(back, there, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_cell_that_a_model_pulls_together_ends_before_it_has_no_room(
    make_alloy: Callable[..., Atoms],
) -> None:
    """Or its neighbours would fill all memory."""

    class Shrinking(MorsePotential):
        def energies(self, graph: Graph) -> Tensor:
            return 30.0 * torch.linalg.det(graph.cell_b33).abs() + 0.0 * super().energies(graph)

    model = Shrinking([13, 29], cutoff=4.0).double()
    small, large = relax(model, [make_alloy((1, 1, 1)), make_alloy()], with_cell=True)
    for end in (small, large):
        assert not end.converged
        assert end.num_steps < 100
    graph = build_graph([make_alloy((1, 1, 1))], model.cutoff)
    end = unroll(model, graph, Descent(0.05), 300, with_cell=True)
    assert end.valid_b.tolist() == [False]


def pairs_of(graph: Graph) -> list[tuple[int, ...]]:
    edges = torch.cat([graph.senders_e[:, None], graph.receivers_e[:, None], graph.shifts_e3.long()], dim=1)
    return sorted(tuple(row) for row in edges.tolist())


@settings(max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    strain=st.floats(0.0, 0.2),
    step=st.floats(0.0, 0.4),
    skin=st.floats(0.1, 1.5),
)
def test_a_list_with_a_skin_gives_the_edges_of_a_fresh_list_while_the_cell_changes(
    seed: int, strain: float, step: float, skin: float
) -> None:
    random = np.random.default_rng(seed)
    structures = []
    for count in (1, 4):
        cell = np.eye(3) * random.uniform(3.0, 5.0, 3) + random.uniform(-0.8, 0.8, (3, 3))
        structures.append(
            Atoms(
                "Cu" * count,
                positions=random.uniform(0, 4, (count, 3)),
                cell=cell,
                pbc=random.integers(0, 2, 3) > 0,
            )
        )
    neighbours = VerletList(structures, 3.5, skin=skin)
    for _ in range(6):
        for atoms in structures:
            change = np.eye(3) + strain * random.uniform(-1, 1, (3, 3)) / 3
            atoms.set_cell(atoms.cell.array @ change, scale_atoms=bool(random.integers(0, 2)))
            atoms.positions += step * random.normal(size=atoms.positions.shape)
        expected = build_graph(structures, 3.5)
        found = neighbours.graph_at(expected.positions_n3, expected.cell_b33)
        assert pairs_of(found) == pairs_of(expected)

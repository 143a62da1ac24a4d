"""Batched relaxation ends where ASE's optimisers end, each structure on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.optimize import BFGS, FIRE
from ase.optimize.optimize import Optimizer

from hpcft.models.graph import Graph, build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, evaluate
from hpcft.relaxation import delta_q, relax


@pytest.fixture
def starts(morse: MorsePotential, make_alloy: Callable[..., Atoms]) -> list[Atoms]:
    """At rest already (to 1e-4 eV/Å); a vacancy; a cluster; far from its minimum."""
    (at_rest,) = relax(morse, [make_alloy((1, 1, 1))], fmax=1e-4)
    vacancy = make_alloy((2, 2, 1), rattle=0.1, seed=1)
    del vacancy[3]
    cluster = Atoms("Cu3Al", positions=[[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0.3], [1.3, 1, 2.4]])
    far = make_alloy(rattle=0.3, seed=2)
    return [at_rest.atoms, vacancy, cluster, far]


def distance(a: Atoms, b: Atoms) -> float:
    graph = build_graph([a], 0.1)
    return float(delta_q(graph.positions_n3, torch.from_numpy(b.get_positions()), graph))


@pytest.mark.parametrize("optimiser", [BFGS, FIRE])
def test_relaxations_end_in_the_minimum_that_ase_finds(
    morse: MorsePotential,
    starts: list[Atoms],
    as_calculator: Callable[[Potential], Calculator],
    optimiser: type[Optimizer],
) -> None:
    before = [atoms.copy() for atoms in starts]
    results = relax(morse, starts, fmax=1e-4)
    assert all(a.positions.tolist() == b.positions.tolist() for a, b in zip(starts, before, strict=True))
    for start, result in zip(starts, results, strict=True):
        reference = start.copy()
        reference.calc = as_calculator(morse)
        optimiser(reference, logfile=None).run(fmax=1e-4, steps=2000)
        assert result.converged
        assert result.energy == pytest.approx(reference.get_potential_energy(), abs=2e-6)
        if start.pbc.any():
            assert distance(result.atoms, reference) < 0.01
        # A cluster may turn on its way, and BFGS and FIRE turn it differently.
        difference = result.atoms.get_all_distances(mic=True) - reference.get_all_distances(mic=True)
        assert np.abs(difference).max() < 0.003
        forces = evaluate(morse, build_graph([result.atoms], morse.cutoff)).forces_n3
        assert result.max_force == pytest.approx(float(forces.norm(dim=1).max()), rel=1e-6)
        assert result.max_force < 1e-4
    assert distance(starts[3], results[3].atoms) > 3.0


def test_each_structure_takes_as_many_steps_as_alone_and_ends_at_the_same_place(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    together = relax(morse, starts, fmax=0.01)
    assert together[0].num_steps == 0
    assert len({result.num_steps for result in together}) >= 3
    for start, result in zip(starts, together, strict=True):
        (alone,) = relax(morse, [start], fmax=0.01)
        assert (result.num_steps, result.converged) == (alone.num_steps, True)
        np.testing.assert_allclose(result.atoms.positions, alone.atoms.positions, atol=1e-9)
        assert result.energy == pytest.approx(alone.energy, abs=1e-10)


def test_a_relaxation_that_runs_out_of_steps_says_that_it_has_not_converged(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    results = relax(morse, starts, fmax=1e-3, max_steps=5)
    assert [(result.converged, result.num_steps) for result in results] == [(True, 0)] + [(False, 5)] * 3
    assert all(result.max_force >= 1e-3 for result in results[1:])


def test_a_structure_whose_forces_are_not_finite_ends_at_once_and_the_others_converge(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    class Spoilt(torch.nn.Module):
        """Infinite energy where a structure has four atoms and is open."""

        architecture, cutoff, elements = "spoilt", morse.cutoff, morse.elements

        def __init__(self) -> None:
            super().__init__()
            self.inner = morse
            self.descriptors, self.configuration = morse.descriptors, morse.configuration

        def energies(self, graph: Graph) -> torch.Tensor:
            factor = torch.where(graph.periodic_b3.any(dim=1), 1.0, float("nan"))
            return self.inner.energies(graph) * factor

    potential: Potential = Spoilt()
    results = relax(potential, starts, fmax=0.01)
    assert [result.converged for result in results] == [True, True, False, True]
    assert results[2].num_steps == 0
    assert np.isfinite(results[2].atoms.positions).all()


def test_nothing_to_relax_gives_nothing(morse: MorsePotential) -> None:
    assert relax(morse, []) == []

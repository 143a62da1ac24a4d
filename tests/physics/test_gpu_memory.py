"""A GPU without enough memory for all: smaller batches, and the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import alloy, small_morse

from hpcft.errors import UserError
from hpcft.md import Dynamics, Replica, Simulation, thermal_velocities
from hpcft.models.graph import Graph
from hpcft.models.morse import MorsePotential
from hpcft.relaxation import relax


class Cramped(MorsePotential):
    """Runs out of memory from its sixth evaluation on, wherever more than so many atoms come together."""

    most_atoms, calls = 16, 0

    @classmethod
    def of(cls, potential: MorsePotential, most_atoms: int) -> Cramped:
        potential.__class__ = cls
        potential.most_atoms = most_atoms  # type: ignore[attr-defined]
        return potential  # type: ignore[return-value]

    def energies(self, graph: Graph) -> torch.Tensor:
        self.calls += 1
        if self.calls > 5 and len(graph.numbers_n) > self.most_atoms:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().energies(graph)


def simulation(potential: Any, number: int = 5) -> Simulation:
    replicas = []
    for index in range(number):
        atoms, random = alloy(rattle=0.05, seed=index), np.random.default_rng([3, index])
        replicas.append(Replica(index, atoms, thermal_velocities(atoms, 300, random), random))
    return Simulation(potential, replicas, Dynamics(), keep_last=True)


def test_dynamics_that_do_not_fit_go_back_to_the_start_of_their_batch_and_on_in_smaller_ones() -> None:
    """Fails if a frame is kept twice, a step counted twice, or a random number lost on the way."""
    roomy, cramped = simulation(small_morse()), simulation(Cramped.of(small_morse(), 16))
    for steps in (2, 20, 7):
        expected, found = roomy.run(steps, 3), cramped.run(steps, 3)
        assert [block.replica for block in found] == [block.replica for block in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.step.tolist() == theirs.step.tolist()
            np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-10)
    assert cramped.max_atoms == 20
    for one, other in zip(cramped.replicas, roomy.replicas, strict=True):
        assert (one.step, one.time_fs, one.stopped) == (29, 29.0, "")
        assert one.random.bit_generator.state == other.random.bit_generator.state


def test_a_replica_that_does_not_fit_alone_is_named() -> None:
    with pytest.raises(UserError, match="replica 0, of 8 atoms, does not fit into the memory of the GPU"):
        simulation(Cramped.of(small_morse(), 7)).run(20, 5)


def test_relaxations_that_do_not_fit_start_again_in_smaller_batches() -> None:
    starts = [alloy(seed=index) for index in range(5)]
    expected = relax(small_morse(), starts, fmax=0.05, max_steps=40)
    told: list[int] = []
    found = relax(
        Cramped.of(small_morse(), 16),
        starts,
        fmax=0.05,
        max_steps=40,
        on_done=lambda number, _: told.append(number),
    )
    assert sorted(told) == [0, 1, 2, 3, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.num_steps, ours.converged) == (theirs.num_steps, theirs.converged)
        np.testing.assert_allclose(ours.atoms.positions, theirs.atoms.positions, rtol=0, atol=1e-9)
    with pytest.raises(torch.OutOfMemoryError):
        relax(Cramped.of(small_morse(), 7), starts)

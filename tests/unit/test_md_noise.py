"""Random numbers that are drawn ahead are those that would be drawn step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from hpcft.md.noise import Noise
from hpcft.md.replica import Replica
from hpcft.md.thermostat import random_part, rescaling_factors

SIZES, HAS_FRICTION = (2, 1, 3), (True, False, True)


def batch() -> list[Replica]:
    return [
        Replica(i, Atoms(["Cu"] * n), np.zeros((n, 3)), np.random.default_rng([5, i]))
        for i, n in enumerate(SIZES)
    ]


def step_by_step(replicas: list[Replica]) -> np.ndarray:
    return np.concatenate(
        [
            replica.random.standard_normal((n, 3)) if draws else np.zeros((n, 3))
            for replica, n, draws in zip(replicas, SIZES, HAS_FRICTION, strict=True)
        ]
    )


@pytest.mark.parametrize("num_steps", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("alone", [True, False])
def test_each_replica_gets_its_own_numbers_and_its_generator_back_where_it_belongs(
    num_steps: int, alone: bool
) -> None:
    ours, theirs = batch(), batch()
    noise = Noise(ours, HAS_FRICTION, torch.from_numpy, alone=alone)
    for _ in range(num_steps):
        np.testing.assert_array_equal(noise.next().numpy(), step_by_step(theirs))
        noise.prepare()
    noise.give_back()
    noise.give_back()  # nothing is left to give
    for one, other in zip(ours, theirs, strict=True):
        assert one.random.bit_generator.state == other.random.bit_generator.state


def test_where_others_draw_in_between_nothing_is_drawn_ahead() -> None:
    (ours, *rest), (theirs, *others) = batch(), batch()
    noise = Noise([ours, *rest], HAS_FRICTION, torch.from_numpy, alone=False)
    for _ in range(3):
        np.testing.assert_array_equal(noise.next().numpy(), step_by_step([theirs, *others]))
        noise.prepare()
        assert ours.random.random() == theirs.random.random()


def test_velocities_without_energy_or_with_none_that_is_a_number_are_not_rescaled() -> None:
    normal, others = random_part(9, np.random.default_rng(0))
    kinetic = np.array([0.0, np.nan, 1.0])
    factors = rescaling_factors(
        kinetic, np.ones(3), np.full(3, 9.0), np.full(3, 0.1), np.full(3, normal), np.full(3, others)
    )
    assert factors[:2].tolist() == [1.0, 1.0]
    assert factors[2] > 0
    assert factors[2] != 1.0

"""A hot liquid: each element and direction has its share of the kinetic energy, and atoms diffuse as fast as in ASE."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from scipy import stats

from hpcft.md import Dynamics, Guards, Replica, Simulation, thermal_velocities
from hpcft.models.morse import MorsePotential
from hpcft.storage.frames import FrameBlock

KELVIN, TIMESTEP_FS, FRICTION_PER_PS = 3500.0, 2.0, 5.0
MELTING, STEPS, EVERY, REPLICAS = 300, 1500, 10, 12
# Long enough for a straight line, short enough for many of them.
LAG = 30


@pytest.fixture(scope="module")
def potential() -> MorsePotential:
    return MorsePotential([13, 29], cutoff=5.0, depth=0.3, width=1.4, length=2.7).double()


def replicas() -> list[Replica]:
    """Light and heavy atoms in turn, in a crystal that is too wide and too hot to last."""
    found = []
    for index in range(REPLICAS):
        random = np.random.default_rng([8, index])
        atoms = bulk("Cu", "fcc", a=4.1, cubic=True) * (2, 2, 2)
        atoms.numbers[random.permutation(len(atoms))[: len(atoms) // 2]] = 13
        atoms.set_masses("defaults")
        found.append(Replica(index, atoms, thermal_velocities(atoms, 2 * KELVIN, random), random))
    return found


@pytest.fixture(scope="module")
def liquid(potential: MorsePotential) -> list[FrameBlock]:
    dynamics = Dynamics(KELVIN, TIMESTEP_FS, FRICTION_PER_PS)
    simulation = Simulation(potential, replicas(), dynamics, Guards(max_temperature_K=1e9, min_distance=0.1))
    simulation.run(MELTING, MELTING)
    return simulation.run(STEPS, EVERY)


def test_each_element_has_its_share_of_the_kinetic_energy_in_each_direction(liquid: list[FrameBlock]) -> None:
    for number in (13, 29):
        shares = []
        for block in liquid:
            chosen = block.numbers == number
            velocities = block.velocities[:, chosen] / units.fs
            energies = 0.5 * block.masses[chosen][:, None] * velocities**2
            shares.append(energies.mean((0, 1)) / (0.5 * units.kB * KELVIN))
        mean, error = np.mean(shares, 0), stats.sem(shares, 0)
        assert (error < 0.02).all()
        assert (np.abs(mean - 1) < 4 * error + 0.005).all(), (number, mean, error)


@pytest.mark.nightly
def test_atoms_diffuse_as_fast_as_in_ase_s_langevin_dynamics_of_the_same_model(
    liquid: list[FrameBlock],
    potential: MorsePotential,
    as_calculator: Callable[[MorsePotential], Calculator],
) -> None:
    ours = [diffusion(block.positions) for block in liquid]
    theirs = [diffusion(positions_in_ase(r, as_calculator(potential))) for r in replicas()]
    difference = np.mean(ours) - np.mean(theirs)
    error = np.hypot(stats.sem(ours), stats.sem(theirs))
    assert error < 0.05 * np.mean(theirs)  # twice the friction takes a quarter off
    assert abs(difference) < 4 * error, (np.mean(ours), np.mean(theirs), error)


def positions_in_ase(start: Replica, calculator: Calculator) -> np.ndarray:
    """[frames, atoms, 3] Å."""
    atoms: Atoms = start.atoms
    atoms.calc = calculator
    atoms.set_velocities(start.velocities / units.fs)
    dynamics = Langevin(
        atoms,
        TIMESTEP_FS * units.fs,
        temperature_K=KELVIN,
        friction=FRICTION_PER_PS / (1000 * units.fs),
        fixcm=False,
        rng=start.random,
    )
    frames = []
    dynamics.run(MELTING)
    dynamics.attach(lambda: frames.append(atoms.get_positions()), interval=EVERY)
    dynamics.run(STEPS)
    return np.array(frames)


def diffusion(positions_fn3: np.ndarray) -> float:
    """Å^2/fs, by Einstein's relation, over LAG frames; the centre of mass, which ASE lets drift too, included."""
    moved = positions_fn3[LAG:] - positions_fn3[:-LAG]
    return float((moved**2).sum(-1).mean() / (6 * LAG * EVERY * TIMESTEP_FS))

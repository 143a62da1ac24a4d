"""Molecular dynamics against exact results: free flight, harmonic sites, conservation of energy, temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from scipy import stats
from torch import Tensor

from hpcft.md import Dynamics, Replica, Simulation, thermal_velocities
from hpcft.models.graph import Graph
from hpcft.models.protocol import Potential

STIFFNESS = 5.0  # eV/Å^2


class EinsteinCrystal(torch.nn.Module):
    """Every atom bound to its own site by the same spring: all averages are known in closed form."""

    architecture = "einstein"
    cutoff = 0.1
    elements = (13, 29)

    def __init__(self, sites_n3: np.ndarray, stiffness: float = STIFFNESS) -> None:
        super().__init__()
        self.stiffness = torch.nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))
        self.sites_n3 = torch.from_numpy(sites_n3)

    def energies(self, graph: Graph) -> Tensor:
        energy_n = 0.5 * self.stiffness * ((graph.positions_n3 - self.sites_n3) ** 2).sum(-1)
        return torch.zeros(graph.num_structures, dtype=energy_n.dtype).index_add(
            0, graph.structure_n, energy_n
        )

    def descriptors(self, graph: Graph) -> Tensor:
        raise NotImplementedError

    def configuration(self) -> Mapping[str, Any]:
        raise NotImplementedError


def replica_of(atoms: Atoms, velocities: np.ndarray, seed: int = 0) -> Replica:
    return Replica(0, atoms, velocities, np.random.default_rng(seed))


def grid(per_side: int) -> Atoms:
    """Al and Cu by turns, 10 Å apart."""
    sites = 10.0 * np.stack(np.meshgrid(*[np.arange(per_side)] * 3), axis=-1).reshape(-1, 3)
    numbers = np.where(np.arange(len(sites)) % 2, 13, 29)
    return Atoms(numbers, positions=sites)


def test_a_free_atom_flies_at_its_velocity_when_there_is_no_friction() -> None:
    atom = Atoms("Cu", positions=[[1.0, 2.0, 3.0]])
    replica = replica_of(atom, np.array([[0.01, -0.02, 0.005]]))
    settings = Dynamics(temperature_K=300, timestep=0.5, friction_per_ps=0)
    Simulation(EinsteinCrystal(atom.positions, 0.0), [replica], settings).run(40, 40)
    np.testing.assert_allclose(replica.atoms.positions, [[1.2, 1.6, 3.1]], atol=1e-12)  # 20 fs
    assert (replica.step, replica.time_fs) == (40, 20.0)


def test_friction_slows_a_free_atom_at_the_rate_that_was_asked_for() -> None:
    atom = Atoms("Cu", positions=[[0.0, 0.0, 0.0]])
    replica = replica_of(atom, np.array([[0.01, 0.0, 0.0]]))
    settings = Dynamics(temperature_K=0, timestep=2.0, friction_per_ps=10)
    Simulation(EinsteinCrystal(atom.positions, 0.0), [replica], settings).run(50, 50)
    np.testing.assert_allclose(replica.velocities, [[0.01 * np.exp(-1.0), 0, 0]], rtol=1e-12)  # 100 fs


def test_an_atom_on_a_spring_swings_at_its_frequency() -> None:
    site = np.zeros((1, 3))
    atom = Atoms("Al", positions=[[0.1, 0.0, 0.0]])
    omega = np.sqrt(STIFFNESS / atom.get_masses()[0]) * units.fs  # per fs
    quarter = 0.5 * np.pi / omega
    replica = replica_of(atom, np.zeros((1, 3)))
    settings = Dynamics(temperature_K=0, timestep=quarter / 400, friction_per_ps=0)
    Simulation(EinsteinCrystal(site), [replica], settings).run(400, 400)
    np.testing.assert_allclose(replica.atoms.positions, 0.0, atol=1e-6)
    np.testing.assert_allclose(replica.velocities[0, 0], -0.1 * omega, rtol=1e-5)


def test_without_friction_the_error_of_the_total_energy_is_of_second_order_in_the_time_step(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    start = make_alloy()
    velocities = thermal_velocities(start, 800, np.random.default_rng(1))

    def fluctuation(timestep: float, num_steps: int) -> float:
        replica = replica_of(start.copy(), velocities)
        settings = Dynamics(800, timestep, friction_per_ps=0)
        (block,) = Simulation(potential, [replica], settings).run(num_steps, 1)
        speed_n = (block.velocities / units.fs) ** 2
        kinetic = 0.5 * (block.masses[:, None] * speed_n).sum(axis=(1, 2))
        return float(np.std(block.potential_energy + kinetic))

    coarse, fine = fluctuation(2.0, 60), fluctuation(1.0, 120)
    assert coarse > 1e-5  # far above rounding
    assert coarse / fine == pytest.approx(4.0, rel=0.12)


def test_langevin_dynamics_samples_the_canonical_distribution_of_an_einstein_crystal() -> None:
    temperature, crystal = 500.0, grid(12)
    sites = crystal.positions.copy()
    replica = replica_of(crystal, thermal_velocities(crystal, temperature, np.random.default_rng(2)), seed=3)
    settings = Dynamics(temperature, timestep=2.0, friction_per_ps=100)
    simulation = Simulation(EinsteinCrystal(sites), [replica], settings)
    simulation.run(200, 200)  # nine times the slowest relaxation time, 43 fs
    (block,) = simulation.run(1200, 60)  # correlation of squares between frames: exp(-5.6)
    mass = block.masses[:, None]
    kinetic = np.sqrt(mass) * block.velocities / units.fs / np.sqrt(units.kB * temperature)
    # BAOAB's positions are exact for a spring at any time step; its velocities are low by (omega dt)^2 / 4 = 0.2 %.
    displacement = (block.positions - sites) * np.sqrt(STIFFNESS / (units.kB * temperature))
    for name, sample in (("velocities", kinetic), ("displacements", displacement)):
        for elements in ((13,), (29,), (13, 29)):
            values = sample[:, np.isin(block.numbers, elements)].ravel()
            mean_square, error = (values**2).mean(), np.sqrt(2 / len(values))
            assert abs(mean_square - 1) < 4 * error + 0.002, f"{name} of elements {elements}: {mean_square}"
            assert stats.kstest(values, "norm").pvalue > 1e-3, f"{name} of elements {elements}"
    expected = (mass * (block.velocities / units.fs) ** 2).sum(axis=(1, 2)) / (3 * len(crystal) * units.kB)
    np.testing.assert_allclose(block.temperature_K, expected, rtol=1e-12)


def test_start_velocities_have_the_temperature_and_no_drift() -> None:
    crystal, temperature = grid(12), 700.0
    velocities = thermal_velocities(crystal, temperature, np.random.default_rng(5)) / units.fs
    mass = crystal.get_masses()[:, None]
    np.testing.assert_allclose((mass * velocities).sum(axis=0), 0, atol=1e-9)
    for element in (13, 29):
        chosen = crystal.numbers == element
        values = (np.sqrt(mass) * velocities / np.sqrt(units.kB * temperature))[chosen].ravel()
        assert abs((values**2).mean() - 1) < 4 * np.sqrt(2 / len(values))

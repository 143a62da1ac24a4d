"""Thermostats and barostats against distributions that are known exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.morse import MorsePotential as AseMorse
from ase.constraints import FixAtoms
from ase.md.verlet import VelocityVerlet
from scipy import stats
from torch import Tensor

from hpcft.md import Dynamics, Guards, Ramp, Replica, Simulation, disturbed, thermal_velocities
from hpcft.models.graph import Graph
from hpcft.models.morse import MorsePotential


class Box(torch.nn.Module):
    """Atoms that feel nothing, in a box that resists strain: energy stiffness / 8 |F^T F - 1|^2 with F from a unit cell."""

    architecture = "box"
    cutoff = 0.1
    elements = (29,)

    def __init__(self, side: float, stiffness: float) -> None:
        super().__init__()
        self.side = side
        self.stiffness = torch.nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))

    def energies(self, graph: Graph) -> Tensor:
        f_b33 = graph.cell_b33 / self.side
        strain_b33 = f_b33 @ f_b33.transpose(1, 2) - torch.eye(3, dtype=f_b33.dtype)
        nothing_n = 0.0 * graph.positions_n3.sum(-1)
        energy_b = self.stiffness / 8 * (strain_b33**2).sum((1, 2))
        return energy_b.index_add(0, graph.structure_n, nothing_n)

    def descriptors(self, graph: Graph) -> Tensor:
        raise NotImplementedError

    def configuration(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def shift_energies(self, shifts: Mapping[int, float]) -> None:
        raise NotImplementedError


KELVIN, ATOMS, SIDE, GPA = 600.0, 6, 9.0, 0.4


def boxes(number: int, seed: int, temperature: float = KELVIN) -> list[Replica]:
    found = []
    for index in range(number):
        random = np.random.default_rng([seed, index])
        atoms = Atoms("Cu6", positions=SIDE * random.random((ATOMS, 3)), cell=3 * [SIDE], pbc=True)
        found.append(Replica(index, atoms, thermal_velocities(atoms, temperature, random), random))
    return found


def close(values: np.ndarray, expected: float, per_replica: np.ndarray, name: str) -> None:
    """Within four standard errors; replicas are independent, so their means tell the error."""
    error = float(np.std(per_replica, ddof=1) / np.sqrt(len(per_replica)))
    assert abs(float(np.mean(values)) - expected) < 4 * error + 1e-3 * abs(expected), (
        f"{name}: {np.mean(values)} +- {error}, not {expected}"
    )


@pytest.mark.parametrize(
    ("barostat", "thermostat"),
    [
        ("isotropic", "langevin"),
        ("full", "svr"),
        pytest.param("isotropic", "svr", marks=pytest.mark.nightly),
        pytest.param("full", "langevin", marks=pytest.mark.nightly),
    ],
)
def test_volumes_and_shapes_have_the_isothermal_isobaric_distribution(barostat: Any, thermostat: Any) -> None:
    stiffness = 20.0  # eV: strains of a few per cent
    dynamics = Dynamics(
        KELVIN,
        timestep=2.0,
        friction_per_ps=50,
        thermostat=thermostat,
        thermostat_fs=40,
        barostat=barostat,
        pressure_GPa=GPA,
        barostat_fs=60,
        compressibility_per_GPa=0.3,
    )
    replicas = boxes(48, seed=4)
    simulation = Simulation(Box(SIDE, stiffness), replicas, dynamics)
    simulation.run(300, 300)
    blocks = simulation.run(900, 15)
    cells = np.stack([block.cell for block in blocks])  # [replica, frame, 3, 3]
    volumes = np.abs(np.linalg.det(cells))
    strain = np.einsum("rfij,rfkj->rfik", cells, cells) / SIDE**2 - np.eye(3)
    squares = (strain**2).sum((-1, -2))

    # The same averages by quadrature over the volume, or by importance sampling over all components of the cell.
    # With svr the centre of mass stands still: one atom less that pushes the walls.
    free = ATOMS if thermostat == "langevin" else ATOMS - 1
    thermal, pressure = units.kB * KELVIN, GPA * units.GPa
    random = np.random.default_rng(0)
    if barostat == "isotropic":
        scale = np.linspace(0.5, 1.6, 20001)
        cell = scale[:, None, None] * np.eye(3)
        log_measure = 2 * np.log(scale)  # dV
    else:
        # A cell is a rotation, which nothing depends on, times a symmetric one: d(cell) = product of (l_i + l_j) d(symmetric).
        normal = random.standard_normal((400_000, 3, 3))
        normal = 0.5 * (normal + normal.transpose(0, 2, 1))  # off the diagonal with half the variance
        cell = 0.92 * np.eye(3) + 0.06 * normal
        length = np.linalg.eigvalsh(cell)
        cell, normal, length = (part[length[:, 0] > 0] for part in (cell, normal, length))
        pairs = length[:, [0, 0, 1]] + length[:, [1, 2, 2]]
        log_measure = 0.5 * (normal**2).sum((1, 2)) + np.log(pairs).sum(1) - 2 * np.log(length).sum(1)
    volume = np.linalg.det(cell) * SIDE**3
    strained = np.einsum("sij,skj->sik", cell, cell) - np.eye(3)
    square = (strained**2).sum((1, 2))
    log_weight = free * np.log(volume) - (stiffness / 8 * square + pressure * volume) / thermal + log_measure
    weight = np.exp(log_weight - log_weight.max())
    for name, found, exact in (
        ("volume", volumes, volume),
        ("squared volume", volumes**2, volume**2),
        ("squared strain", squares, square),
    ):
        close(found, float((weight * exact).sum() / weight.sum()), found.mean(1), name)
    kinetic = np.concatenate([block.temperature_K for block in blocks])
    close(kinetic, KELVIN, np.stack([b.temperature_K for b in blocks]).mean(1), "temperature")


def test_velocity_rescaling_gives_the_kinetic_energy_its_canonical_distribution() -> None:
    dynamics = Dynamics(KELVIN, timestep=1.0, thermostat="svr", thermostat_fs=10)
    replicas = boxes(64, seed=1, temperature=2 * KELVIN)  # twice as hot as they shall be
    simulation = Simulation(Box(SIDE, 0.0), replicas, dynamics)
    simulation.run(100, 100)
    blocks = simulation.run(400, 40)
    freedom = 3 * ATOMS - 3
    ratios = np.concatenate([block.temperature_K for block in blocks]) / KELVIN * freedom
    assert stats.kstest(ratios, stats.chi2(freedom).cdf).pvalue > 1e-3
    for block in blocks:
        momentum = (block.masses[:, None] * block.velocities).sum(1)
        np.testing.assert_allclose(momentum, 0, atol=1e-10)


def test_without_a_thermostat_it_goes_where_ase_goes(make_alloy: Callable[..., Atoms]) -> None:
    """The same pair potential in ASE's own code, integrated by ASE."""
    morse = MorsePotential([29], cutoff=6.0, depth=0.35, width=1.4, length=2.7).double()
    atoms = Atoms("Cu4", positions=[[0, 0, 0], [2.6, 0, 0], [0, 2.7, 0.2], [1.3, 1.2, 2.2]])
    velocities = thermal_velocities(atoms, 900, np.random.default_rng(3))
    replica = Replica(0, atoms.copy(), velocities, np.random.default_rng(0))
    (block,) = Simulation(morse, [replica], Dynamics(timestep=1.5, thermostat="none")).run(200, 50)
    theirs = atoms.copy()
    theirs.calc = _calculator(morse)
    theirs.set_velocities(velocities / units.fs)
    VelocityVerlet(theirs, 1.5 * units.fs).run(200)
    np.testing.assert_allclose(block.positions[-1], theirs.positions, atol=1e-8)
    np.testing.assert_allclose(block.velocities[-1] / units.fs, theirs.get_velocities(), atol=1e-9)


def _calculator(potential: MorsePotential) -> Any:
    from ase.calculators.calculator import Calculator, all_changes

    from hpcft.models.graph import build_graph
    from hpcft.models.protocol import evaluate

    class Ours(Calculator):
        implemented_properties = ("energy", "forces")

        def calculate(
            self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
        ) -> None:
            super().calculate(atoms, properties, system_changes)
            result = evaluate(potential, build_graph([self.atoms], potential.cutoff))
            self.results = {"energy": float(result.energies_b[0]), "forces": result.forces_n3.numpy()}

    assert AseMorse.implemented_properties  # ase has a Morse potential too, without our smooth cutoff
    return Ours()


def test_a_temperature_ramp_is_followed_by_each_replica_at_its_own_pace() -> None:
    ramps = [Ramp(100, 900, 400), Ramp(900, 300, 200)]
    replicas = boxes(64, seed=2, temperature=500.0)
    dynamics = [
        Dynamics(ramps[r.index % 2], timestep=1.0 + r.index % 2, friction_per_ps=200) for r in replicas
    ]
    blocks = Simulation(Box(SIDE, 0.0), replicas, dynamics).run(400, 100)
    assert [r.time_fs for r in replicas[:2]] == [400.0, 800.0]
    for kind, targets in ((0, [300, 500, 700, 900]), (1, [600, 300, 300, 300])):
        found = np.stack([b.temperature_K for b in blocks if b.replica % 2 == kind])
        for frame, target in enumerate(targets):
            lag = (
                12.0 if kind == 0 else 30.0
            )  # the thermostat is 5 or 2.5 steps behind its ramp of 2 or 3 K a step
            error = float(np.std(found[:, frame], ddof=1) / np.sqrt(len(found)))
            assert abs(float(found[:, frame].mean()) - target) < 4 * error + lag


@pytest.mark.parametrize("thermostat", ["langevin", "svr", "none"])
def test_fixed_atoms_stay_and_the_others_have_the_temperature(
    morse: MorsePotential, make_alloy: Callable[..., Atoms], thermostat: Any
) -> None:
    atoms = make_alloy((2, 1, 1), rattle=0.05)
    atoms.set_constraint(FixAtoms([0, 3]))
    random = np.random.default_rng(0)
    replica = Replica(0, atoms, thermal_velocities(atoms, 600, random), random)
    assert not replica.velocities[[0, 3]].any()
    start = atoms.positions.copy()
    dynamics = Dynamics(600, 2.0, 50, thermostat=thermostat, fix_centre_of_mass=True)
    (block,) = Simulation(morse, [replica], dynamics).run(60, 20)
    np.testing.assert_array_equal(block.positions[:, [0, 3]], np.repeat(start[None, [0, 3]], 3, 0))
    assert np.abs(block.positions[-1] - start)[[1, 2]].min() > 1e-3
    moving = (block.masses[:, None] * (block.velocities / units.fs) ** 2)[-1].sum()
    assert block.temperature_K[-1] == pytest.approx(moving / (3 * (len(atoms) - 2) * units.kB), rel=1e-9)


def test_the_centre_of_mass_stands_still_where_it_is_told_to(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    def drift(fixed: bool) -> float:
        atoms, random = make_alloy(), np.random.default_rng(0)
        replica = Replica(0, atoms, thermal_velocities(atoms, 600, random), random)
        dynamics = Dynamics(600, 2.0, 50, fix_centre_of_mass=fixed)
        (block,) = Simulation(morse, [replica], dynamics).run(40, 40)
        centre = (block.masses[:, None] * (block.positions[-1] - make_alloy().positions)).sum(0)
        return float(np.abs(centre).max() / block.masses.sum())

    assert drift(True) < 1e-12
    assert drift(False) > 1e-3


def test_a_cell_that_collapses_or_flies_apart_stops_its_replica() -> None:
    dynamics = Dynamics(KELVIN, 2.0, 50, barostat="isotropic", pressure_GPa=50.0, barostat_fs=20)
    replicas = boxes(2, seed=9)
    calm = Dynamics(KELVIN, 2.0, 50)
    Simulation(Box(SIDE, 0.0), replicas, [dynamics, calm], Guards(max_volume_change=3.0)).run(400, 400)
    assert [r.stopped for r in replicas] == ["volume", ""]
    assert replicas[0].step < 400 == replicas[1].step
    assert 0.25 < replicas[0].atoms.get_volume() / SIDE**3 < 0.35


def test_a_run_under_pressure_is_continued_bit_for_bit() -> None:
    dynamics = Dynamics(KELVIN, 2.0, 50, barostat="full", pressure_GPa=GPA, barostat_fs=100)

    def run(parts: list[int]) -> bytes:
        replicas = boxes(3, seed=5)
        for steps in parts:
            Simulation(Box(SIDE, 1.0), replicas, dynamics).run(steps, steps)
            again = boxes(3, seed=5)
            for old, new in zip(replicas, again, strict=True):
                new.restore(old.state())
            replicas = again
        return b"".join(r.atoms.cell.array.tobytes() + r.atoms.positions.tobytes() for r in replicas)

    assert run([20, 20]) == run([20, 20])
    single = boxes(3, seed=5)
    simulation = Simulation(Box(SIDE, 1.0), single, dynamics)
    simulation.run(20, 20)
    simulation.run(20, 20)
    assert run([20, 20]) == b"".join(
        r.atoms.cell.array.tobytes() + r.atoms.positions.tobytes() for r in single
    )


def test_disturbed_structures_keep_what_is_fixed() -> None:
    atoms = Atoms("Cu3", positions=np.eye(3), cell=3 * [5.0], pbc=True, constraint=FixAtoms([1]))
    rattled = disturbed(atoms, np.random.default_rng(0), rattle=0.1)
    assert np.abs(rattled.positions - atoms.positions)[[0, 2]].min() > 1e-4
    np.testing.assert_array_equal(rattled.positions[1], atoms.positions[1])
    strained = disturbed(atoms, np.random.default_rng(0), strain=0.02)
    gradient = np.linalg.solve(atoms.cell.array, strained.cell.array)
    np.testing.assert_allclose(gradient, gradient.T, atol=1e-12)
    assert 1e-3 < np.abs(gradient - np.eye(3)).max() < 0.1
    np.testing.assert_allclose(strained.get_scaled_positions(), atoms.get_scaled_positions(), atol=1e-12)

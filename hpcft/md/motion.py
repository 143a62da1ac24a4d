"""A batch of replicas while it moves: one step of every one, with one force call.

Shape suffixes: n atoms of the whole batch, r replicas. Inside, time is in ASE's unit (Å sqrt(amu/eV)); outside it is fs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import units
from torch import Tensor

from hpcft.md.barostat import deformation
from hpcft.md.replica import Replica, fixed_indices
from hpcft.md.settings import Dynamics
from hpcft.md.thermostat import rescaling_factor
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Evaluation, Potential, device_of, dtype_of, evaluate


class Motion:
    """Positions, velocities and forces of a batch; `step` makes new tensors, so that what was read before stays as it was."""

    def __init__(self, potential: Potential, batch: Sequence[Replica], dynamics: Sequence[Dynamics]) -> None:
        self.potential, self.batch, self.dynamics = potential, list(batch), list(dynamics)
        self._dtype, self._device = dtype_of(potential), device_of(potential)
        self.neighbours = VerletList(
            [r.atoms for r in batch], potential.cutoff, dtype=self._dtype, device=self._device
        )
        self.graph = self.neighbours.graph_at(None)
        self.offsets = np.concatenate([[0], np.cumsum([len(r.atoms) for r in batch])])
        self.velocities_n3 = self._tensor(np.concatenate([r.velocities for r in batch]) / units.fs)
        self.mass_n1 = self._tensor(np.concatenate([r.atoms.get_masses() for r in batch]))[:, None]
        self._fixed_r = [fixed_indices(r.atoms) for r in batch]
        self._movable_n1 = self._movable()
        self._has_barostat = any(d.barostat != "none" for d in self.dynamics)
        self.freedom_r = np.array([self._freedom(r) for r in range(len(self.batch))], dtype=float)
        self._set_parameters()
        self.evaluation = self._evaluate()

    # ---- constants of the batch ---------------------------------------------------------------------------------------

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=self._dtype, device=self._device)

    def _per_atom(self, values: Sequence[float]) -> Tensor:
        return self._tensor(np.repeat(np.asarray(values, dtype=float), np.diff(self.offsets)))[:, None]

    def _movable(self) -> Tensor | None:
        if not any(len(fixed) for fixed in self._fixed_r):
            return None
        movable = np.ones(self.offsets[-1])
        for first, fixed in zip(self.offsets, self._fixed_r, strict=False):
            movable[first + fixed] = 0.0
        return self._tensor(movable)[:, None]

    def _freedom(self, r: int) -> int:
        """Degrees of freedom of the velocities: less three where nothing moves the centre of mass."""
        dynamics, num_free = self.dynamics[r], len(self.batch[r].atoms) - len(self._fixed_r[r])
        drifts = dynamics.thermostat == "langevin" and not dynamics.fix_centre_of_mass
        conserved = 0 if drifts or len(self._fixed_r[r]) else 3
        return max(3 * num_free - conserved, 1)

    def _set_parameters(self) -> None:
        """Per atom: half a time step, and what Langevin keeps of a velocity and adds to it."""
        timesteps = [d.timestep * units.fs for d in self.dynamics]
        decays = [
            float(np.exp(-d.friction_per_ps / (1000.0 * units.fs) * dt))
            if d.thermostat == "langevin"
            else 1.0
            for d, dt in zip(self.dynamics, timesteps, strict=True)
        ]
        temperatures = [d.temperature_at(r.step) for d, r in zip(self.dynamics, self.batch, strict=True)]
        self._timesteps = timesteps
        self._half_n1 = self._per_atom([0.5 * dt for dt in timesteps])
        self._has_friction = any(decay < 1.0 for decay in decays)
        if self._has_friction:
            spread = [
                (1.0 - decay**2) * units.kB * kelvin
                for decay, kelvin in zip(decays, temperatures, strict=True)
            ]
            self._decay_n1 = self._per_atom(decays)
            self._spread_n1 = torch.sqrt(self._per_atom(spread) / self.mass_n1)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        if any(not isinstance(d.temperature_K, float | int) for d in self.dynamics):
            self._set_parameters()
        half = self._half_n1
        strain = self._strain() if self._has_barostat else None
        velocities = self.velocities_n3 + half * self._forces() / self.mass_n1
        positions = self.graph.positions_n3 + half * velocities
        if self._has_friction:
            velocities = self._decay_n1 * velocities + self._spread_n1 * self._noise()
            velocities = self._without_drift(velocities)
        positions = positions + half * velocities
        cell_b33 = None
        if strain is not None:
            positions, velocities, cell_b33 = self._strained(strain, positions, velocities)
        self.graph = self.neighbours.graph_at(positions, cell_b33)
        self.evaluation = self._evaluate()
        self.velocities_n3 = self._rescaled(velocities + half * self._forces() / self.mass_n1)

    def _evaluate(self) -> Evaluation:
        return evaluate(self.potential, self.graph, stress=self._has_barostat)

    def _forces(self) -> Tensor:
        forces_n3 = self.evaluation.forces_n3
        return forces_n3 if self._movable_n1 is None else forces_n3 * self._movable_n1

    def _noise(self) -> Tensor:
        """Each replica's own random numbers; none are drawn for one without friction."""
        counts = np.diff(self.offsets)
        noise = np.concatenate(
            [
                replica.random.standard_normal((n, 3)) if d.thermostat == "langevin" else np.zeros((n, 3))
                for replica, d, n in zip(self.batch, self.dynamics, counts, strict=True)
            ]
        )
        noise_n3 = self._tensor(noise)
        return noise_n3 if self._movable_n1 is None else noise_n3 * self._movable_n1

    def _without_drift(self, velocities_n3: Tensor) -> Tensor:
        """Fixed atoms would be dragged along, and they hold the rest in place anyway."""
        is_held = [
            d.fix_centre_of_mass and not len(fixed)
            for d, fixed in zip(self.dynamics, self._fixed_r, strict=True)
        ]
        if not any(is_held):
            return velocities_n3
        held = self._tensor(np.array(is_held, dtype=float))[:, None]
        structure_n = self.graph.structure_n
        zeros = torch.zeros(len(self.batch), 3, dtype=self._dtype, device=self._device)
        momentum_r3 = zeros.index_add(0, structure_n, self.mass_n1 * velocities_n3)
        mass_r1 = zeros[:, :1].index_add(0, structure_n, self.mass_n1)
        return velocities_n3 - (held * momentum_r3 / mass_r1)[structure_n]

    def _rescaled(self, velocities_n3: Tensor) -> Tensor:
        """Stochastic velocity rescaling of those replicas that have it."""
        if all(d.thermostat != "svr" for d in self.dynamics):
            return velocities_n3
        kinetic_r = 0.5 * self._twice_kinetic_r(velocities_n3).cpu().double().numpy()
        factors = [
            rescaling_factor(
                float(kinetic_r[r]),
                0.5 * self.freedom_r[r] * units.kB * dynamics.temperature_at(replica.step),
                int(self.freedom_r[r]),
                dynamics.timestep / dynamics.thermostat_fs,
                replica.random,
            )
            if dynamics.thermostat == "svr"
            else 1.0
            for r, (replica, dynamics) in enumerate(zip(self.batch, self.dynamics, strict=True))
        ]
        return velocities_n3 * self._per_atom(factors)

    def _strain(self) -> np.ndarray:
        """Deformation of each replica's cell in this step, [r, 3, 3], by the pressure at its start."""
        assert self.evaluation.stress_b33 is not None
        stress_r33 = self.evaluation.stress_b33.cpu().double().numpy()
        kinetic_r33 = self._kinetic_tensor_r33().cpu().double().numpy()
        cells_r33 = self.graph.cell_b33.cpu().double().numpy()
        return np.stack(
            [
                deformation(dynamics, replica.step, cell, kinetic, stress, timestep, replica.random)
                for dynamics, replica, cell, kinetic, stress, timestep in zip(
                    self.dynamics,
                    self.batch,
                    cells_r33,
                    kinetic_r33,
                    stress_r33,
                    self._timesteps,
                    strict=True,
                )
            ]
        )

    def _kinetic_tensor_r33(self) -> Tensor:
        """Sum of m v v over each replica, eV."""
        outer_n33 = (self.mass_n1 * self.velocities_n3)[:, :, None] * self.velocities_n3[:, None, :]
        zeros = torch.zeros(len(self.batch), 3, 3, dtype=self._dtype, device=self._device)
        found: Tensor = zeros.index_add(0, self.graph.structure_n, outer_n33)
        return found

    def _strained(
        self, strain_r33: np.ndarray, positions_n3: Tensor, velocities_n3: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions and cells follow the (symmetric) deformation, velocities its inverse: phase space keeps its volume."""
        forward, back = self._tensor(strain_r33), self._tensor(np.linalg.inv(strain_r33))
        structure_n = self.graph.structure_n
        return (
            torch.einsum("ni,nij->nj", positions_n3, forward[structure_n]),
            torch.einsum("ni,nij->nj", velocities_n3, back[structure_n]),
            self.graph.cell_b33 @ forward,
        )

    # ---- what is read off --------------------------------------------------------------------------------------------

    def rows(self, r: int) -> slice:
        return slice(int(self.offsets[r]), int(self.offsets[r + 1]))

    def cell(self, r: int) -> np.ndarray:
        """In Å; where none relaxes, as it was given and not rounded."""
        if self._has_barostat:
            return as_numpy(self.graph.cell_b33[r])
        return np.array(self.batch[r].atoms.cell.array)

    def _twice_kinetic_r(self, velocities_n3: Tensor) -> Tensor:
        twice_kinetic_n = (self.mass_n1 * velocities_n3**2).sum(-1)
        zeros = torch.zeros(len(self.batch), dtype=twice_kinetic_n.dtype, device=twice_kinetic_n.device)
        summed: Tensor = zeros.index_add(0, self.graph.structure_n, twice_kinetic_n)
        return summed

    def temperature_r(self) -> Tensor:
        """Instantaneous temperature in K of the degrees of freedom that are free."""
        freedom_r = self._tensor(self.freedom_r)
        return self._twice_kinetic_r(self.velocities_n3) / (freedom_r * float(units.kB))

    def nearest_r(self) -> Tensor:
        """Shortest interatomic distance (Å) of each replica; infinite where nothing is within the cutoff."""
        length_e = self.graph.vectors_e3.norm(dim=-1)
        start = torch.full(
            (self.graph.num_structures,), float("inf"), dtype=length_e.dtype, device=length_e.device
        )
        edges_r = self.graph.structure_n[self.graph.senders_e]
        nearest_r: Tensor = start.scatter_reduce(0, edges_r, length_e, "amin")
        return nearest_r

    def largest_force_r(self) -> Tensor:
        norm_n = self.evaluation.forces_n3.norm(dim=-1)
        zeros = torch.zeros(self.graph.num_structures, dtype=norm_n.dtype, device=norm_n.device)
        return zeros.scatter_reduce(0, self.graph.structure_n, norm_n, "amax")

    def vital_signs(self) -> np.ndarray:
        """Temperature (K), shortest distance (Å), largest force (eV/Å) and volume (Å^3; 0 without a cell), [4, r]."""
        volume_r = torch.linalg.det(self.graph.cell_b33).abs()
        signs = torch.stack([self.temperature_r(), self.nearest_r(), self.largest_force_r(), volume_r])
        return np.asarray(signs.cpu().double().numpy())

    def snapshot(self) -> Motion:
        """This moment, to read from; the original may go on."""
        kept = object.__new__(Motion)
        kept.__dict__.update(self.__dict__)
        return kept

    def store(self) -> None:
        """Write positions, velocities and cells back into the replicas."""
        for r, replica in enumerate(self.batch):
            rows = self.rows(r)
            replica.atoms.set_cell(self.cell(r))
            replica.atoms.set_positions(as_numpy(self.graph.positions_n3[rows]), apply_constraint=False)
            replica.velocities = as_numpy(self.velocities_n3[rows]) * units.fs


def as_numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().double().numpy())

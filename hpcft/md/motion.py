"""A batch of replicas while it moves: one step of every one, with one force call.

Shape suffixes: n atoms of the whole batch, r replicas. Inside, time is in ASE's unit (Å sqrt(amu/eV)); outside it is fs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase import units
from torch import Tensor

from hpcft.md.barostat import deformation
from hpcft.md.noise import Noise
from hpcft.md.replica import Replica, fixed_indices
from hpcft.md.settings import Dynamics
from hpcft.md.thermostat import random_part, rescaling_factors
from hpcft.models.graph import moved_to
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Evaluation, Potential, device_of, dtype_of, evaluate


class Frame(NamedTuple):
    """A moment of the whole batch on the processor, in the precision of the run; velocities in Å/fs, temperatures in K."""

    positions_n3: np.ndarray
    velocities_n3: np.ndarray
    forces_n3: np.ndarray
    energies_r: np.ndarray
    temperature_r: np.ndarray


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
        self._has_ramp = any(not isinstance(d.temperature_K, float | int) for d in self.dynamics)
        self._is_rescaled_r = np.array([d.thermostat == "svr" for d in self.dynamics])
        self.freedom_r = np.array([self._freedom(r) for r in range(len(self.batch))], dtype=float)
        self._per_kelvin_r = self._tensor(self.freedom_r) * float(units.kB)
        self._held_r1, self._mass_r1 = self._held()
        self._volume_r = None if self._has_barostat else torch.linalg.det(self.graph.cell_b33).abs()
        self._set_parameters()
        self._noise = Noise(
            batch,
            [d.thermostat == "langevin" for d in dynamics],
            self._tensor,
            alone=not self._has_barostat,
        )
        self.evaluation = self._evaluate()

    # ---- constants of the batch ---------------------------------------------------------------------------------------

    def _tensor(self, values: np.ndarray) -> Tensor:
        return moved_to(self._device, torch.as_tensor(values), self._dtype)

    def _per_atom(self, values: Sequence[float] | np.ndarray) -> Tensor:
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

    def _held(self) -> tuple[Tensor | None, Tensor]:
        """Whose centre of mass is held (1, else 0), [r, 1]; None: nobody's. And the masses, [r, 1].

        Fixed atoms would be dragged along, and they hold the rest in place anyway.
        """
        is_held = [
            float(d.fix_centre_of_mass and not len(fixed))
            for d, fixed in zip(self.dynamics, self._fixed_r, strict=True)
        ]
        zeros = torch.zeros(len(self.batch), 1, dtype=self._dtype, device=self._device)
        mass_r1 = zeros.index_add(0, self.graph.structure_n, self.mass_n1)
        return self._tensor(np.array(is_held))[:, None] if any(is_held) else None, mass_r1

    def _set_parameters(self) -> None:
        """Per atom: half a time step, and what Langevin keeps of a velocity and adds to it."""
        self._timesteps = [d.timestep * units.fs for d in self.dynamics]
        self._decays = [
            float(np.exp(-d.friction_per_ps / (1000.0 * units.fs) * dt))
            if d.thermostat == "langevin"
            else 1.0
            for d, dt in zip(self.dynamics, self._timesteps, strict=True)
        ]
        self._half_n1 = self._per_atom([0.5 * dt for dt in self._timesteps])
        self._has_friction = any(decay < 1.0 for decay in self._decays)
        if self._has_friction:
            self._decay_n1 = self._per_atom(self._decays)
            self._set_spread()

    def _set_spread(self) -> None:
        spread = [
            (1.0 - decay**2) * units.kB * d.temperature_at(replica.step)
            for decay, d, replica in zip(self._decays, self.dynamics, self.batch, strict=True)
        ]
        self._spread_n1 = torch.sqrt(self._per_atom(spread) / self.mass_n1)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        if self._has_ramp and self._has_friction:
            self._set_spread()
        half = self._half_n1
        strain = self._strain() if self._has_barostat else None
        velocities = self.velocities_n3 + half * self._forces() / self.mass_n1
        positions = self.graph.positions_n3 + half * velocities
        if self._has_friction:
            velocities = self._decay_n1 * velocities + self._spread_n1 * self._kicks()
            velocities = self._without_drift(velocities)
        positions = positions + half * velocities
        cell_b33 = None
        if strain is not None:
            positions, velocities, cell_b33 = self._strained(strain, positions, velocities)
        self.graph = self.neighbours.graph_at(positions, cell_b33)
        self.evaluation = self._evaluate()
        if self._has_friction:
            self._noise.prepare()
        self.velocities_n3 = self._rescaled(velocities + half * self._forces() / self.mass_n1)

    def _evaluate(self) -> Evaluation:
        return evaluate(self.potential, self.graph, stress=self._has_barostat)

    def _forces(self) -> Tensor:
        forces_n3 = self.evaluation.forces_n3
        return forces_n3 if self._movable_n1 is None else forces_n3 * self._movable_n1

    def _kicks(self) -> Tensor:
        noise_n3 = self._noise.next()
        return noise_n3 if self._movable_n1 is None else noise_n3 * self._movable_n1

    def _without_drift(self, velocities_n3: Tensor) -> Tensor:
        if self._held_r1 is None:
            return velocities_n3
        structure_n = self.graph.structure_n
        zeros = torch.zeros(len(self.batch), 3, dtype=self._dtype, device=self._device)
        momentum_r3 = zeros.index_add(0, structure_n, self.mass_n1 * velocities_n3)
        return velocities_n3 - (self._held_r1 * momentum_r3 / self._mass_r1)[structure_n]

    def _rescaled(self, velocities_n3: Tensor) -> Tensor:
        """Stochastic velocity rescaling of those replicas that have it."""
        if not self._is_rescaled_r.any():
            return velocities_n3
        chosen = np.flatnonzero(self._is_rescaled_r)
        mine = [(self.batch[r], self.dynamics[r], self.freedom_r[r]) for r in chosen]
        # Before the kinetic energies are read, while a GPU computes them.
        drawn = np.array([random_part(int(freedom), replica.random) for replica, _, freedom in mine])
        steps = np.array([d.timestep / d.thermostat_fs for _, d, _ in mine])
        targets = [0.5 * f * units.kB * d.temperature_at(replica.step) for replica, d, f in mine]
        kinetic = 0.5 * as_numpy(self._twice_kinetic_r(velocities_n3))[chosen]
        factors = np.ones(len(self.batch))
        factors[chosen] = rescaling_factors(
            kinetic, np.array(targets), self.freedom_r[chosen], steps, drawn[:, 0], drawn[:, 1]
        )
        return velocities_n3 * self._per_atom(factors)

    def _strain(self) -> np.ndarray:
        """Deformation of each replica's cell in this step, [r, 3, 3], by the pressure at its start."""
        assert self.evaluation.stress_b33 is not None
        read = torch.stack([self.evaluation.stress_b33, self._kinetic_tensor_r33(), self.graph.cell_b33])
        stress_r33, kinetic_r33, cells_r33 = as_numpy(read)
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
        forward, back = self._tensor(np.stack([strain_r33, np.linalg.inv(strain_r33)]))
        structure_n = self.graph.structure_n
        return (
            torch.einsum("ni,nij->nj", positions_n3, forward[structure_n]),
            torch.einsum("ni,nij->nj", velocities_n3, back[structure_n]),
            self.graph.cell_b33 @ forward,
        )

    # ---- what is read off --------------------------------------------------------------------------------------------

    def rows(self, r: int) -> slice:
        return slice(int(self.offsets[r]), int(self.offsets[r + 1]))

    def cells(self) -> list[np.ndarray]:
        """In Å; where none relaxes, as they were given and not rounded."""
        if self._has_barostat:
            return list(as_numpy(self.graph.cell_b33))
        return [np.array(replica.atoms.cell.array) for replica in self.batch]

    def frame(self) -> Frame:
        """Copied at once: one by one, replicas would each have a GPU wait."""
        vectors = (self.graph.positions_n3, self.velocities_n3 * units.fs, self.evaluation.forces_n3)
        numbers = torch.stack([self.evaluation.energies_b, self.temperature_r()])
        return Frame(*(t.detach().cpu().numpy() for t in vectors), *numbers.cpu().numpy())

    def _twice_kinetic_r(self, velocities_n3: Tensor) -> Tensor:
        twice_kinetic_n = (self.mass_n1 * velocities_n3**2).sum(-1)
        zeros = torch.zeros(len(self.batch), dtype=twice_kinetic_n.dtype, device=twice_kinetic_n.device)
        summed: Tensor = zeros.index_add(0, self.graph.structure_n, twice_kinetic_n)
        return summed

    def temperature_r(self) -> Tensor:
        """Instantaneous temperature in K of the degrees of freedom that are free."""
        return self._twice_kinetic_r(self.velocities_n3) / self._per_kelvin_r

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
        volume_r = self._volume_r
        if volume_r is None:
            volume_r = torch.linalg.det(self.graph.cell_b33).abs()
        return as_numpy(
            torch.stack([self.temperature_r(), self.nearest_r(), self.largest_force_r(), volume_r])
        )

    def snapshot(self) -> Motion:
        """This moment, to read from; the original may go on."""
        kept = object.__new__(Motion)
        kept.__dict__.update(self.__dict__)
        return kept

    def store(self) -> None:
        """Write positions, velocities and cells back into the replicas, whose generators stand where these do."""
        self._noise.give_back()
        positions_n3, velocities_n3 = as_numpy(self.graph.positions_n3), as_numpy(self.velocities_n3)
        for r, (replica, cell) in enumerate(zip(self.batch, self.cells(), strict=True)):
            rows = self.rows(r)
            replica.atoms.set_cell(cell)
            replica.atoms.set_positions(positions_n3[rows], apply_constraint=False)
            replica.velocities = velocities_n3[rows] * units.fs


def as_numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().double().numpy())

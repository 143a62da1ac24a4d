"""Langevin dynamics (BAOAB, Leimkuhler and Matthews, 2013) of replicas that share one graph.

Shape suffixes: n atoms of the running replicas, r running replicas. Inside, time is in ASE's unit
(Å sqrt(amu/eV)); outside it is fs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor

from hpcft.models.graph import Graph
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Evaluation, Potential, device_of, dtype_of, evaluate
from hpcft.storage.trajectory import FrameBlock

Observe = Callable[[Graph], dict[str, np.ndarray]]


@dataclass(frozen=True)
class LangevinSettings:
    temperature_K: float
    timestep: float = 1.0  # fs
    friction_per_ps: float = 10.0


@dataclass(frozen=True)
class Guards:
    """When a replica counts as exploded or collapsed, and stops with that cause."""

    max_temperature_K: float = float("inf")
    min_distance: float = 0.0  # Å
    max_force: float = 1e3  # eV/Å


@dataclass
class Replica:
    """All that a replica needs to go on: it is what a checkpoint holds. Velocities in Å/fs."""

    index: int
    atoms: Atoms
    velocities: np.ndarray
    random: np.random.Generator
    step: int = 0
    time_fs: float = 0.0
    stopped: str = ""

    def state(self) -> dict[str, Any]:
        return {
            "positions": self.atoms.get_positions(),
            "velocities": self.velocities,
            "cell": self.atoms.cell.array,
            "random": json.dumps(self.random.bit_generator.state),
            "step": self.step,
            "time_fs": self.time_fs,
            "stopped": self.stopped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.atoms.set_cell(np.asarray(state["cell"]))
        self.atoms.set_positions(np.asarray(state["positions"]), apply_constraint=False)
        self.velocities = np.array(state["velocities"])
        self.random.bit_generator.state = json.loads(str(state["random"]))
        self.step, self.time_fs = int(state["step"]), float(state["time_fs"])
        self.stopped = str(state["stopped"])


def thermal_velocities(atoms: Atoms, temperature_K: float, random: np.random.Generator) -> np.ndarray:
    """Maxwell-Boltzmann velocities in Å/fs with the centre of mass at rest, [n, 3]."""
    masses = atoms.get_masses()[:, None]
    velocities = random.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature_K / masses)
    velocities -= (masses * velocities).sum(0) / masses.sum()
    return np.asarray(velocities * units.fs)


@dataclass
class _Recorder:
    """Frames of one replica while a segment runs."""

    rows: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value)

    def block(self, replica: Replica) -> FrameBlock:
        count = len(self.rows.get("step", []))
        n = len(replica.atoms)
        vector, box = (count, n, 3), (count, 3, 3)

        def column(name: str, shape: tuple[int, ...], dtype: type = float) -> np.ndarray:
            return np.asarray(self.rows.get(name, []), dtype=dtype).reshape(shape)

        fixed = {"step", "time_fs", "positions", "velocities", "forces", "cell", "energy", "temperature"}
        observables = {name: np.asarray(values) for name, values in self.rows.items() if name not in fixed}
        return FrameBlock(
            replica=replica.index,
            numbers=replica.atoms.numbers.copy(),
            masses=replica.atoms.get_masses(),
            pbc=np.asarray(replica.atoms.pbc),
            step=column("step", (count,), int),
            time_fs=column("time_fs", (count,)),
            positions=column("positions", vector),
            velocities=column("velocities", vector),
            forces=column("forces", vector),
            cell=column("cell", box),
            potential_energy=column("energy", (count,)),
            temperature_K=column("temperature", (count,)),
            observables=observables,
        )


class Simulation:
    """Runs replicas side by side; each has its own random stream, so the packing changes only rounding.

    A segment starts from what `Replica` holds and nothing else (neighbour list and forces are computed anew),
    so that a run continued from a checkpoint is bit for bit the run that was never stopped, on the CPU.
    """

    def __init__(
        self,
        potential: Potential,
        replicas: Sequence[Replica],
        settings: LangevinSettings,
        guards: Guards | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.potential = potential
        self.replicas = list(replicas)
        self.settings = settings
        self.guards = guards or Guards()
        self.observe = observe
        self._timestep = settings.timestep * units.fs
        self._decay = float(np.exp(-settings.friction_per_ps / (1000.0 * units.fs) * self._timestep))

    @property
    def running(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.stopped]

    def run(self, num_steps: int, frame_every: int) -> list[FrameBlock]:
        """Advance all running replicas; returns every `frame_every`-th frame of each that has one."""
        recorders = {replica.index: _Recorder() for replica in self.replicas}
        done = 0
        while done < num_steps and self.running:
            done = self._run_batch(self.running, range(done + 1, num_steps + 1), frame_every, recorders)
        blocks = [recorders[replica.index].block(replica) for replica in self.replicas]
        return [block for block in blocks if block.num_frames]

    def _run_batch(
        self, batch: list[Replica], steps: range, frame_every: int, recorders: dict[int, _Recorder]
    ) -> int:
        """Run `steps` or until a replica stops; returns the number of the last step done."""
        motion = _Motion(self.potential, batch, self._timestep)
        for number in steps:
            motion.step(self._decay, self.settings.temperature_K)
            causes = self._check(motion)
            for replica, cause in zip(batch, causes, strict=True):
                replica.step += 1
                replica.time_fs = replica.step * self.settings.timestep
                replica.stopped = cause
            if number % frame_every == 0:
                self._record(motion, batch, recorders)
            if any(causes):
                break
        motion.store(batch)
        return number

    def _check(self, motion: _Motion) -> list[str]:
        temperature_r = motion.temperature_r().cpu().numpy()
        distance_r = motion.nearest_r().cpu().numpy()
        force_r = motion.largest_force_r().cpu().numpy()
        causes = []
        for temperature, distance, force in zip(temperature_r, distance_r, force_r, strict=True):
            if not (np.isfinite(temperature) and np.isfinite(force)):
                causes.append("non-finite")
            elif temperature > self.guards.max_temperature_K:
                causes.append("temperature")
            elif distance < self.guards.min_distance:
                causes.append("distance")
            elif force > self.guards.max_force:
                causes.append("force")
            else:
                causes.append("")
        return causes

    def _record(self, motion: _Motion, batch: list[Replica], recorders: dict[int, _Recorder]) -> None:
        observed = self.observe(motion.graph) if self.observe else {}
        temperature_r = motion.temperature_r().cpu().numpy()
        for r, replica in enumerate(batch):
            if replica.stopped:
                continue  # its last sane frame is the one before
            rows = motion.rows(r)
            recorders[replica.index].add(
                step=replica.step,
                time_fs=replica.time_fs,
                positions=motion.numpy(motion.graph.positions_n3[rows]),
                velocities=motion.numpy(motion.velocities_n3[rows]) * units.fs,
                forces=motion.numpy(motion.evaluation.forces_n3[rows]),
                cell=replica.atoms.cell.array.copy(),
                energy=float(motion.evaluation.energies_b[r]),
                temperature=float(temperature_r[r]),
                **{name: values[r] for name, values in observed.items()},
            )


class _Motion:
    """Tensors of a batch while it moves."""

    def __init__(self, potential: Potential, batch: list[Replica], timestep: float) -> None:
        self.potential = potential
        self.timestep = timestep
        self.random = [replica.random for replica in batch]
        dtype, device = dtype_of(potential), device_of(potential)
        self.neighbours = VerletList([r.atoms for r in batch], potential.cutoff, dtype=dtype, device=device)
        self.graph = self.neighbours.graph_at(None)
        self.offsets = np.concatenate([[0], np.cumsum([len(r.atoms) for r in batch])])
        velocities = np.concatenate([r.velocities for r in batch]) / units.fs
        masses = np.concatenate([r.atoms.get_masses() for r in batch])
        self.velocities_n3 = torch.as_tensor(velocities, dtype=dtype, device=device)
        self.mass_n1 = torch.as_tensor(masses, dtype=dtype, device=device)[:, None]
        self.evaluation: Evaluation = evaluate(potential, self.graph)

    def step(self, decay: float, temperature_K: float) -> None:
        half = 0.5 * self.timestep
        velocities = self.velocities_n3 + half * self.evaluation.forces_n3 / self.mass_n1
        positions = self.graph.positions_n3 + half * velocities
        spread_n1 = torch.sqrt((1.0 - decay**2) * units.kB * temperature_K / self.mass_n1)
        velocities = decay * velocities + spread_n1 * self._noise()
        positions = positions + half * velocities
        self.graph = self.neighbours.graph_at(positions)
        self.evaluation = evaluate(self.potential, self.graph)
        self.velocities_n3 = velocities + half * self.evaluation.forces_n3 / self.mass_n1

    def _noise(self) -> Tensor:
        counts = np.diff(self.offsets)
        noise = np.concatenate([g.standard_normal((n, 3)) for g, n in zip(self.random, counts, strict=True)])
        return torch.as_tensor(noise, dtype=self.velocities_n3.dtype, device=self.velocities_n3.device)

    def rows(self, r: int) -> slice:
        return slice(int(self.offsets[r]), int(self.offsets[r + 1]))

    @staticmethod
    def numpy(tensor: Tensor) -> np.ndarray:
        return np.asarray(tensor.detach().cpu().double().numpy())

    def temperature_r(self) -> Tensor:
        """Instantaneous temperature in K from 3n degrees of freedom (the thermostat moves the centre of mass too)."""
        twice_kinetic_n = (self.mass_n1 * self.velocities_n3**2).sum(-1)
        freedom_r = 3.0 * self.graph.num_atoms_b.to(twice_kinetic_n.dtype)
        zeros = torch.zeros_like(freedom_r)
        summed: Tensor = zeros.index_add(0, self.graph.structure_n, twice_kinetic_n)
        return summed / (freedom_r * float(units.kB))

    def nearest_r(self) -> Tensor:
        """Shortest interatomic distance (Å) of each replica; infinite where nothing is within the cutoff."""
        length_e = self.graph.vectors_e3.norm(dim=-1)
        start = torch.full(
            (self.graph.num_structures,), float("inf"), dtype=length_e.dtype, device=length_e.device
        )
        nearest_r: Tensor = start.scatter_reduce(
            0, self.graph.structure_n[self.graph.senders_e], length_e, "amin"
        )
        return nearest_r

    def largest_force_r(self) -> Tensor:
        norm_n = self.evaluation.forces_n3.norm(dim=-1)
        zeros = torch.zeros(self.graph.num_structures, dtype=norm_n.dtype, device=norm_n.device)
        return zeros.scatter_reduce(0, self.graph.structure_n, norm_n, "amax")

    def store(self, batch: list[Replica]) -> None:
        """Write positions and velocities back into the replicas."""
        for r, replica in enumerate(batch):
            rows = self.rows(r)
            replica.atoms.set_positions(self.numpy(self.graph.positions_n3[rows]), apply_constraint=False)
            replica.velocities = self.numpy(self.velocities_n3[rows]) * units.fs

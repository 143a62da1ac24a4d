"""Runs replicas side by side, each by its own settings and random stream, and takes down their frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from hpcft.errors import UserError
from hpcft.md.motion import Motion
from hpcft.md.recorder import Begun, Recorder
from hpcft.md.replica import Replica
from hpcft.md.settings import Dynamics, Guards
from hpcft.models.graph import Graph
from hpcft.models.protocol import Potential
from hpcft.storage.frames import FrameBlock

Observe = Callable[[Graph], dict[str, np.ndarray]]
# Marks the last frame of a replica that a guard has stopped: what fine-tuning needs most.
AT_STOP = "at_stop"
# Larger than any number that is one.
_HUGE = float(np.finfo(float).max)


def together(observers: Sequence[Observe]) -> Observe:
    """All that several observers see of a frame."""

    def observe(graph: Graph) -> dict[str, np.ndarray]:
        return {name: values for one in observers for name, values in one(graph).items()}

    return observe


class Simulation:
    """Runs replicas side by side; each has its own random stream, so the packing changes only rounding.

    A segment starts from what `Replica` holds and nothing else (neighbour list and forces are computed anew),
    so that a run continued from a checkpoint is bit for bit the run that was never stopped, on the CPU.

    `dynamics`: one for all replicas, or one for each. `observe`: what else is written down of each frame, from the graph of the
    batch, [r, ...] by name. At most `max_atoms` atoms are in the batch at once (default: all): what ends makes room for the next.
    Where a GPU's memory does not take them, half of them are tried; UserError for a single replica that does not fit.
    `keep_last`: of a replica that a guard stops, the last frame before is kept, marked `at_stop`.
    `every`: of velocities and forces, where not all frames have them, the steps between two that do.
    """

    def __init__(
        self,
        potential: Potential,
        replicas: Sequence[Replica],
        dynamics: Dynamics | Sequence[Dynamics],
        guards: Guards | None = None,
        observe: Observe | None = None,
        *,
        max_atoms: int | None = None,
        keep_last: bool = False,
        every: Mapping[str, int] | None = None,
    ) -> None:
        self.potential = potential
        self.replicas = list(replicas)
        self.dynamics = [dynamics] * len(self.replicas) if isinstance(dynamics, Dynamics) else list(dynamics)
        self.guards = guards or Guards()
        self.observe = observe
        self.max_atoms, self.keep_last = max_atoms, keep_last
        self.every = dict(every or {})
        self._recorders: dict[int, Recorder] = {}
        self._begun_at: dict[int, int] = {}

    @property
    def running(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.stopped]

    def run(self, num_steps: int, frame_every: int) -> list[FrameBlock]:
        """Advance all running replicas; returns every `frame_every`-th frame of each that has one."""
        self._recorders = {replica.index: Recorder() for replica in self.replicas}
        self._begun_at = {replica.index: replica.step for replica in self.replicas}
        # A barostat needs the stress, and a cell: those with one run by themselves.
        for has_barostat in (False, True):
            group = [
                number
                for number, (replica, dynamics) in enumerate(zip(self.replicas, self.dynamics, strict=True))
                if (dynamics.barostat != "none") == has_barostat and not replica.stopped
            ]
            if num_steps > 0:
                self._run_group(group, num_steps, frame_every)
        blocks = [self._recorders[replica.index].block(replica) for replica in self.replicas]
        return [block for block in blocks if block.num_frames]

    def _run_group(self, waiting: list[int], num_steps: int, frame_every: int) -> None:
        left = dict.fromkeys(waiting, num_steps)
        batch: list[int] = []
        while waiting or batch:
            admitted = self._that_fit(waiting, batch)
            batch, waiting = [*batch, *admitted], waiting[len(admitted) :]
            begun = [
                Begun(self.replicas[number], self._recorders[self.replicas[number].index]) for number in batch
            ]
            try:
                done = self._run_batch(
                    batch, min(left[number] for number in batch), left, num_steps, frame_every
                )
            except torch.OutOfMemoryError as error:
                self._make_room(batch, error)
                for one in begun:
                    one.go_back()
                batch, waiting = [], [*batch, *waiting]
                continue
            for number in batch:
                left[number] -= done
            batch = [number for number in batch if left[number] and not self.replicas[number].stopped]

    def _make_room(self, batch: Sequence[int], error: torch.OutOfMemoryError) -> None:
        """Smaller batches from now on; UserError where one replica alone was too much."""
        if len(batch) == 1:
            replica = self.replicas[batch[0]]
            raise UserError(
                f"replica {replica.index}, of {len(replica.atoms)} atoms, does not fit into the memory of the GPU; use a smaller "
                "cell, another precision or a GPU with more memory"
            ) from error
        self.max_atoms = sum(len(self.replicas[number].atoms) for number in batch) // 2

    def _that_fit(self, waiting: Sequence[int], batch: Iterable[int]) -> list[int]:
        """The next replicas, as many as there is room for; one at least where nothing is in the batch."""
        room = float("inf") if self.max_atoms is None else float(self.max_atoms)
        room -= sum(len(self.replicas[number].atoms) for number in batch)
        is_empty, admitted = not list(batch), list[int]()
        for number in waiting:
            room -= len(self.replicas[number].atoms)
            if room < 0 and not (is_empty and not admitted):
                break
            admitted.append(number)
        return admitted

    def _run_batch(
        self, numbers: list[int], num_steps: int, left: dict[int, int], whole: int, frame_every: int
    ) -> int:
        """Run so many steps, or until a replica stops; returns the number of steps done."""
        batch = [self.replicas[number] for number in numbers]
        motion = Motion(self.potential, batch, [self.dynamics[number] for number in numbers])
        self._remember_volumes(motion)
        for done in range(1, num_steps + 1):
            before = motion.snapshot() if self.keep_last else None
            motion.step()
            causes = self._causes(motion)
            for replica, dynamics, cause in zip(batch, motion.dynamics, causes, strict=True):
                replica.step += 1
                replica.time_fs = replica.step * dynamics.timestep
                replica.stopped = cause
            due = [
                r
                for r, number in enumerate(numbers)
                if not causes[r] and (whole - left[number] + done) % frame_every == 0
            ]
            if due:
                self._record(motion, due)
            if any(replica.stopped for replica in batch):
                if before is not None:
                    self._record_last(before, [r for r, cause in enumerate(causes) if cause])
                break
        motion.store()
        return done

    @staticmethod
    def _remember_volumes(motion: Motion) -> None:
        for replica, volume in zip(motion.batch, motion.vital_signs()[3], strict=True):
            replica.volume = replica.volume or float(volume)

    def _causes(self, motion: Motion) -> list[str]:
        """Of each replica; looked at one by one only where all are not plainly sound."""
        signs, guards = motion.vital_signs(), self.guards
        temperature, distance, force, volume = signs
        before = np.array([replica.volume for replica in motion.batch])
        change = np.where(before > 0, volume, 1.0) / np.where(before > 0, before, 1.0)
        is_sound = (
            (temperature <= min(guards.max_temperature_K, _HUGE))
            & (distance >= guards.min_distance)
            & (force <= min(guards.max_force, _HUGE))
            & (1 / guards.max_volume_change < change)
            & (change < guards.max_volume_change)
        )
        if is_sound.all():
            return [""] * len(is_sound)
        return [
            self._cause(of_replica, replica.volume)
            for replica, of_replica in zip(motion.batch, signs.T, strict=True)
        ]

    def _cause(self, signs: np.ndarray, volume_before: float) -> str:
        """What of `Motion.vital_signs` is wrong, or nothing."""
        temperature, distance, force, volume = signs
        guards = self.guards
        if not (np.isfinite(temperature) and np.isfinite(force)):
            return "non-finite"
        if temperature > guards.max_temperature_K:
            return "temperature"
        if distance < guards.min_distance:
            return "distance"
        if force > guards.max_force:
            return "force"
        if (
            volume_before
            and not 1 / guards.max_volume_change < volume / volume_before < guards.max_volume_change
        ):
            return "volume"
        return ""

    def _record(self, motion: Motion, chosen: Sequence[int], *, ended: bool = False) -> None:
        observed = self.observe(motion.graph) if self.observe else {}
        frame, cells = motion.frame(), motion.cells()
        for r in chosen:
            replica, rows = motion.batch[r], motion.rows(r)
            step = replica.step - ended
            values = {name: found[r] for name, found in observed.items()}
            for name, most in self.guards.max_observed.items():
                if not ended and name in values and not float(np.max(values[name])) <= most:
                    replica.stopped = name
            is_last = ended or bool(replica.stopped)
            mark = {AT_STOP: is_last} if self.keep_last else {}
            self._recorders[replica.index].add(
                step=step,
                time_fs=step * motion.dynamics[r].timestep,
                positions=frame.positions_n3[rows],
                velocities=self._if_due("velocities", step, is_last, frame.velocities_n3[rows]),
                forces=self._if_due("forces", step, is_last, frame.forces_n3[rows]),
                cell=cells[r],
                energy=float(frame.energies_r[r]),
                temperature=float(frame.temperature_r[r]),
                **values,
                **mark,
            )

    def _if_due(self, name: str, step: int, is_last: bool, values: np.ndarray) -> np.ndarray:
        """The values, or NaN in a frame that goes without them; a replica's last frame before a stop has all."""
        is_due = is_last or step % self.every.get(name, 1) == 0
        return values if is_due else np.full_like(values, np.nan)

    def _is_new(self, replica: Replica) -> bool:
        """Whether the frame before belongs to this run, not to the end of the one before."""
        return replica.step - 1 > self._begun_at[replica.index]

    def _record_last(self, before: Motion, stopped: Sequence[int]) -> None:
        """The frame before the step in which a guard stopped the replica."""
        missing = []
        for r in stopped:
            replica, recorder = before.batch[r], self._recorders[before.batch[r].index]
            if recorder.has(replica.step - 1):
                recorder.rows[AT_STOP][-1] = True
            elif self._is_new(replica) or (replica.step == 1 and not self._causes(before)[r]):
                missing.append(r)
        if missing:
            self._record(before, missing, ended=True)

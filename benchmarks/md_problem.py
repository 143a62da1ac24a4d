"""The engines that the benchmark of molecular dynamics compares, each behind `open` and `run`.

    PYTHON -P benchmarks/md_problem.py ase|torch-sim TASK

serves one of other people's: a line of JSON in for each call, a line out for its answer. Nothing of hpcft is imported but by
hpcft's own engine, as torch-sim lives in an environment of its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest.mock import patch

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

KELVIN, TIMESTEP_FS, FRICTION_PER_PS = 600.0, 2.0, 10.0
FRAME_EVERY = 10
# Before the first measurement: TorchScript compiles, and caches fill.
WARM_UP = 3
# As of `hpcft md`. Whatever is hotter has exploded, under any engine.
HOTTEST, CLOSEST = 5 * KELVIN, 0.8


class Batch(NamedTuple):
    """So many crystals of `repeat` cubic cells of four atoms, and how many steps a measurement has."""

    num_replicas: int
    repeat: tuple[int, int, int]
    num_steps: int

    @property
    def num_atoms(self) -> int:
        return 4 * math.prod(self.repeat)


def crystals(number: int, repeat: tuple[int, int, int], seed: int) -> list[Atoms]:
    """Cu and Ag at random sites, hardly rattled, with velocities."""
    found = []
    for index in range(number):
        random = np.random.default_rng([seed, index])
        atoms = bulk("Cu", cubic=True).repeat(repeat)
        atoms.numbers[random.random(len(atoms)) < random.uniform(0.2, 0.8)] = 47
        lattice = 3.61 + 0.47 * (atoms.numbers == 47).mean()  # Å, after Vegard
        atoms.set_cell(lattice * np.diag(repeat), scale_atoms=True)
        atoms.positions += random.normal(0, 0.05, atoms.positions.shape)
        MaxwellBoltzmannDistribution(atoms, temperature_K=KELVIN, rng=random)
        found.append(atoms)
    return found


@dataclass(frozen=True)
class Task:
    """Where the same model lies, in hpcft's format and in mace's, and where it is computed."""

    model: str
    exported: str
    device: str = "cpu"


@dataclass(frozen=True)
class Ran:
    """What some steps of all replicas took, and how warm these are then.

    `in_model`: seconds in hpcft's `evaluate`, ASE's calculator, torch-sim's `MaceModel`; `in_network`: the part of them in MACE's
    own energies and gradients, of which hpcft's `evaluate` is all. `bare`: of as many calls of `evaluate`, and nothing between.
    """

    seconds: float
    cpu_seconds: float
    in_model: float
    in_network: float
    temperature_K: float
    bare: float | None = None


def temperature_of(masses: np.ndarray, velocities: np.ndarray) -> float:
    """In K, of all atoms together; velocities in ASE's unit."""
    return float((masses[:, None] * velocities**2).sum() / (velocities.size * units.kB))


class Watch:
    """Seconds and calls of a function, to where the device has done what it was told."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.calls = device, 0.0, 0

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = self.now()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += self.now() - begun
                self.calls += 1

        return timed

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0


class Engine:
    """`open` puts the replicas of a file at the start and warms up; `run` moves them on from where they are."""

    version: str

    def __init__(self, task: Task) -> None:
        self.device = task.device
        self.in_model, self.in_network = Watch(task.device), Watch(task.device)

    def open(self, start: str) -> list[list[float]]:
        """Forces on the first replica."""
        forces = self.begin(read(start, ":"))
        self.run(WARM_UP)
        return np.asarray(forces, dtype=float).tolist()

    def begin(self, structures: Sequence[Atoms]) -> Any:
        raise NotImplementedError

    def run(self, num_steps: int) -> Ran:
        raise NotImplementedError

    def timed(self, steps: Callable[[], Any]) -> dict[str, float]:
        self.in_model.reset()
        self.in_network.reset()
        begun, used = self.in_model.now(), time.process_time()
        steps()
        seconds = self.in_model.now() - begun
        return {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - used,
            "in_model": self.in_model.seconds,
            "in_network": self.in_network.seconds,
        }


# ---- hpcft ---------------------------------------------------------------------------------------------------------


def how_to_move() -> tuple[Any, Any]:
    """The dynamics and the guards."""
    from hpcft.md import Dynamics, Guards

    return Dynamics(KELVIN, TIMESTEP_FS, FRICTION_PER_PS), Guards(HOTTEST, CLOSEST)


def simulation_of(potential: Any, structures: Sequence[Atoms]) -> Any:
    from hpcft.md import Replica, Simulation

    replicas = [
        Replica(number, atoms, atoms.get_velocities() * units.fs, np.random.default_rng([1, number]))
        for number, atoms in enumerate(structures)
    ]
    return Simulation(potential, replicas, *how_to_move())


def frames_of(replica: int, segment: int, num_frames: int = 100, num_atoms: int = 32) -> Any:
    """A block to write and read: numbers at random."""
    from hpcft.storage.frames import FrameBlock

    random = np.random.default_rng([replica, segment])
    step = FRAME_EVERY * np.arange(segment * num_frames, (segment + 1) * num_frames)
    positions, velocities, forces = random.standard_normal((3, num_frames, num_atoms, 3))
    return FrameBlock(
        replica=replica,
        numbers=np.full(num_atoms, 29),
        masses=np.full(num_atoms, 63.546),
        pbc=np.ones(3, dtype=bool),
        step=step,
        time_fs=TIMESTEP_FS * step,
        positions=positions,
        velocities=velocities,
        forces=forces,
        cell=np.tile(7.3 * np.eye(3), (num_frames, 1, 1)),
        potential_energy=random.standard_normal(num_frames),
        temperature_K=random.standard_normal(num_frames),
    )


class Hpcft(Engine):
    """`Simulation`, as `hpcft md` sets it up."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from hpcft import __version__
        from hpcft.models.allocator import keep_freed_memory
        from hpcft.models.files import load_model
        from hpcft.models.protocol import as_module

        keep_freed_memory()
        self.version = f"hpcft {__version__}"
        self.potential = load_model(Path(task.model), dtype=torch.float32, device=task.device)
        as_module(self.potential).requires_grad_(False)

    def begin(self, structures: Sequence[Atoms]) -> Any:
        from hpcft.models.graph import build_graph
        from hpcft.models.protocol import evaluate

        self.simulation = simulation_of(self.potential, structures)
        first = build_graph(structures[:1], self.potential.cutoff, dtype=torch.float32, device=self.device)
        return evaluate(self.potential, first).forces_n3.tolist()

    def run(self, num_steps: int) -> Ran:
        """Counts from where the run has its neighbour list and first forces, as the others do."""
        import hpcft.md.motion
        import hpcft.md.simulation
        from hpcft.models.protocol import evaluate

        made: list[Any] = []
        began = [0.0, 0.0]

        def first_forces(*arguments: Any) -> Any:
            made.append(hpcft.md.motion.Motion(*arguments))
            self.in_model.reset()
            began[:] = self.in_model.now(), time.process_time()
            return made[-1]

        with ExitStack() as stack:
            stack.enter_context(patch.object(hpcft.md.motion, "evaluate", self.in_model.around(evaluate)))
            stack.enter_context(patch.object(hpcft.md.simulation, "Motion", first_forces))
            self.simulation.run(num_steps, FRAME_EVERY)
            ended = self.in_model.now(), time.process_time()
        stopped = {f"replica {r.index}: {r.stopped}" for r in self.simulation.replicas if r.stopped}
        if stopped or len(made) != 1:
            raise SystemExit(f"hpcft has not run all steps in one batch: {', '.join(sorted(stopped))}")
        inside, graph = self.in_model.seconds, made[0].graph
        begun = self.in_model.now()
        for _ in range(num_steps):
            evaluate(self.potential, graph)
        bare = self.in_model.now() - begun
        masses = np.concatenate([replica.atoms.get_masses() for replica in self.simulation.replicas])
        velocities = np.concatenate([replica.velocities for replica in self.simulation.replicas]) / units.fs
        kelvin = temperature_of(masses, velocities)
        return Ran(ended[0] - began[0], ended[1] - began[1], inside, inside, kelvin, bare)


# ---- ASE -----------------------------------------------------------------------------------------------------------


class Ase(Engine):
    """`ase.md.langevin.Langevin` with mace's calculator, one replica after another."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from mace.calculators import MACECalculator

        self.version = f"ase {version('ase')}, mace {version('mace-torch')}"
        self.calculator = MACECalculator(
            model_paths=task.exported, device=task.device, default_dtype="float32"
        )
        self.calculator.calculate = self.in_model.around(self.calculator.calculate)
        (model,) = self.calculator.models
        model.forward = self.in_network.around(model.forward)

    def begin(self, structures: Sequence[Atoms]) -> Any:
        from ase.md.langevin import Langevin

        self.frames: list[tuple[np.ndarray, ...]] = []
        self.moving = []
        for number, atoms in enumerate(structures):
            atoms.calc = self.calculator
            langevin = Langevin(
                atoms,
                TIMESTEP_FS * units.fs,
                temperature_K=KELVIN,
                friction=FRICTION_PER_PS / (1000 * units.fs),
                fixcm=False,
                rng=np.random.default_rng([1, number]),
            )
            langevin.attach(self._keep_frame, FRAME_EVERY, atoms)
            self.moving.append(langevin)
        return structures[0].get_forces()

    def _keep_frame(self, atoms: Atoms) -> None:
        self.frames.append((atoms.get_positions(), atoms.get_velocities(), atoms.get_forces()))

    def run(self, num_steps: int) -> Ran:
        """Counts from where a replica has its first forces."""
        found = []
        self.frames.clear()
        for langevin in self.moving:
            langevin.atoms.get_forces()  # the calculator has kept those of another replica
            found.append(self.timed(lambda moved=langevin: moved.run(num_steps)))
            if self.in_model.calls != num_steps:
                raise SystemExit(f"ase has evaluated {self.in_model.calls} times in {num_steps} steps")
        masses = np.concatenate([langevin.atoms.get_masses() for langevin in self.moving])
        velocities = np.concatenate([langevin.atoms.get_velocities() for langevin in self.moving])
        sums = {name: sum(row[name] for row in found) for name in found[0]}
        return Ran(**sums, temperature_K=temperature_of(masses, velocities))


# ---- torch-sim -----------------------------------------------------------------------------------------------------


class TorchSim(Engine):
    """torch-sim's `nvt_langevin` (release 0.3: later ones have other functions) with its `MaceModel`."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from torch_sim.models.mace import MaceModel

        self.version = f"torch-sim {version('torch-sim-atomistic')}, mace {version('mace-torch')}"
        network = torch.load(task.exported, map_location=task.device, weights_only=False)
        network.requires_grad_(False)  # as the others do
        self.model = MaceModel(
            network, device=torch.device(task.device), dtype=torch.float32, compute_stress=False
        )
        network.forward = self.in_network.around(network.forward)
        self.model.forward = self.in_model.around(self.model.forward)

    def begin(self, structures: Sequence[Atoms]) -> Any:
        from torch_sim.integrators import nvt_langevin
        from torch_sim.io import atoms_to_state

        device = torch.device(self.device)
        rate = FRICTION_PER_PS / (1000 * units.fs)
        timestep, thermal, friction = (
            torch.tensor(value, dtype=torch.float32, device=device)
            for value in (TIMESTEP_FS * units.fs, units.kB * KELVIN, rate)
        )
        init, self.step = nvt_langevin(self.model, dt=timestep, kT=thermal, gamma=friction, seed=1)
        self.state = init(atoms_to_state(list(structures), device, torch.float32))
        return self.state.forces[: len(structures[0])].tolist()

    def run(self, num_steps: int) -> Ran:
        frames = []

        def steps() -> None:
            for number in range(1, num_steps + 1):
                self.state = self.step(self.state)
                if number % FRAME_EVERY == 0:
                    kept = (self.state.positions, self.state.momenta, self.state.forces, self.state.energy)
                    frames.append([tensor.detach().cpu().numpy().copy() for tensor in kept])

        found = self.timed(steps)
        masses, velocities = (
            t.detach().cpu().double().numpy() for t in (self.state.masses, self.state.velocities)
        )
        return Ran(**found, temperature_K=temperature_of(masses, velocities))


# ---- a process that serves one -------------------------------------------------------------------------------------

SERVED: dict[str, type[Engine]] = {"ase": Ase, "torch-sim": TorchSim}


def serve(name: str, task: Task) -> None:
    """Answer until the input ends. What the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    engine = SERVED[name](task)
    say(version=engine.version)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            if "start" in call:
                say(forces=engine.open(call["start"]))
            else:
                say(**asdict(engine.run(call["num_steps"])))
        except torch.OutOfMemoryError as error:
            say(no_memory=str(error))


class Program:
    """Another engine, in a process and perhaps an environment of its own: `open` and `run` as those of `Engine`."""

    def __init__(self, name: str, python: str, task: Task, folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        command = [python, "-P", __file__, name, json.dumps(asdict(task))]
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **one_thread},
            )
        self.version = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def open(self, start: str) -> list[list[float]]:
        if not self.version:
            self.version = self._answer()["version"]
        forces: list[list[float]] = self._ask(start=start)["forces"]
        return forces

    def run(self, num_steps: int) -> Ran:
        return Ran(**self._ask(num_steps=num_steps))

    def _ask(self, **call: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "no_memory" in answer:
            raise torch.OutOfMemoryError(answer["no_memory"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = "\n".join(self.log.read_text().splitlines()[-30:])
            raise SystemExit(f"{self.name} has ended; its last lines:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    serve(sys.argv[1], Task(**json.loads(sys.argv[2])))

"""What on_gpu.py measures: each part yields its figures one by one, in the order in which they are worth having."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import bptt
import md
import numpy as np
import torch
import train_problem
from md_problem import Batch, Hpcft, Program, Task, crystals, simulation_of
from timing import Found

from hpcft.models import gpu_neighbours
from hpcft.models.batch_size import atoms_that_fit
from hpcft.models.files import load_model
from hpcft.models.graph import build_graph, rebuild_edges
from hpcft.models.protocol import as_module, evaluate
from hpcft.relaxation import delta_q
from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings

SKIN = 1.0
# Of a run: what torch says when the processor waits for the GPU.
_WAITING = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Size:
    model: train_problem.Size
    batches: tuple[Batch, ...]
    most_with_ase: int
    relaxation: bptt.Size
    relaxation_steps: tuple[int, ...]
    training_batch: int
    training_steps: int


FULL = Size(
    replace(md.FULL.model, num_train=64, num_valid=8),
    (
        Batch(64, md.CUBE, 20),
        Batch(1, md.CUBE, 100),
        Batch(1, md.LARGE, 50),
        Batch(8, md.CUBE, 40),
        Batch(256, md.CUBE, 30),
        Batch(1024, md.CUBE, 20),
    ),
    64,
    bptt.FULL,
    (5, 20, 80),
    16,
    30,
)
TINY = Size(
    replace(train_problem.QUICK, num_train=4, num_valid=2, pretraining_steps=2),
    (Batch(2, md.CUBE, 10),),
    2,
    bptt.QUICK,
    (2,),
    2,
    2,
)


@dataclass(frozen=True)
class Bench:
    """`torch_sim`: an interpreter, or None."""

    folder: Path
    size: Size
    device: str
    torch_sim: str | None
    progress: Callable[[str], None]

    def model(self, device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        found = load_model(self.folder / "foundation.pt", dtype=dtype, device=device or self.device)
        as_module(found).requires_grad_(False)
        return found

    def peak(self) -> float | None:
        """MiB since the last call; None on the CPU."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return found

    def seconds(self, work: Callable[[], Any], times: int = 1) -> float:
        """Of one of so many in a row."""
        self.wait()
        begun = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - begun) / times

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


# ---- are the results right -----------------------------------------------------------------------------------------


def of_results(bench: Bench) -> Iterator[Found]:
    cells = crystals(8, (2, 2, 2), seed=11)
    exact = bench.model("cpu", torch.float64)
    expected = evaluate(exact, build_graph(cells, exact.cutoff), stress=True)

    def positions_off(runs: Sequence[int]) -> float:
        found, wanted = (moved(bench, device, runs) for device in (bench.device, "cpu"))
        return float(np.abs(found - wanted).max())

    def gradient_off(engine: str) -> float:
        found, wanted = (relaxation_gradient(bench, device, engine, 5) for device in (bench.device, "cpu"))
        return off_by(found, wanted)

    for dtype in (torch.float64, torch.float32):
        model = bench.model(dtype=dtype)
        graph = build_graph(cells, model.cutoff, dtype=dtype, device=bench.device)
        found = evaluate(model, graph, stress=True)
        for name, value in vars(found).items():
            yield {f"{name} off by, {dtype}": off_by(value, getattr(expected, name))}
    checks: dict[str, Callable[[], Any]] = {
        "positions after 20 steps off by, Å": lambda: positions_off([20]),
        "the same, continued after 10, Å": lambda: positions_off([10, 10]),
        "gradient of a relaxation off by, adjoint": lambda: gradient_off("adjoint"),
        "gradient of a relaxation off by, plain": lambda: gradient_off("plain"),
        "pairs that only one neighbour list has": lambda: different_pairs(cells, exact.cutoff, bench.device),
    }
    for name, check in checks.items():
        try:
            yield {name: check()}
        except Exception as error:  # each by itself
            yield {f"{name}: failed": f"{type(error).__name__}: {error}"}


def different_pairs(cells: Sequence[Any], cutoff: float, device: str) -> int | None:
    """None where there is no such list."""
    if gpu_neighbours.library() is None:
        return None
    graph = build_graph(cells, cutoff, device=device)
    found = gpu_neighbours.edges_where_they_are(graph, cutoff)
    assert found is not None
    lists = [
        torch.cat([s[:, None], r[:, None], shift.round().long()], 1).tolist()
        for s, r, shift in (found, (graph.senders_e, graph.receivers_e, graph.shifts_e3))
    ]
    ours, theirs = ({tuple(pair) for pair in pairs} for pairs in lists)
    return len(ours ^ theirs)


def moved(bench: Bench, device: str, runs: Sequence[int]) -> np.ndarray:
    """Positions after runs in double precision, each continued from the saved state of the one before."""
    model = bench.model(device, torch.float64)
    states: list[dict[str, Any]] = []
    for steps in runs:
        simulation = simulation_of(model, crystals(4, (2, 2, 2), seed=12))
        for replica, state in zip(simulation.replicas, states, strict=False):
            replica.restore(state)
        simulation.run(steps, 10)
        states = [replica.state() for replica in simulation.replicas]
    return np.concatenate([state["positions"] for state in states])


def relaxation_problem(bench: Bench, device: str) -> bptt.Problem:
    problem = bptt.Problem.of(bench.size.relaxation)
    return bptt.Problem(problem.potential.to(device), problem.graph.to(device), problem.target_n3.to(device))


def relaxation_gradient(bench: Bench, device: str, engine: str, steps: int) -> torch.Tensor:
    found = relaxation_problem(bench, device).gradient(engine, bptt.MAPS[bptt.MAIN_MAP], steps, 0.0)
    assert found is not None
    return found


# ---- molecular dynamics --------------------------------------------------------------------------------------------


def of_dynamics(bench: Bench) -> Iterator[Found]:
    """One after another, as each is told by itself if time runs out."""
    task = Task(str(bench.folder / "foundation.pt"), str(bench.folder / "foundation.model"), bench.device)
    interpreters = {"ase": sys.executable if bench.size.most_with_ase else None, "torch-sim": bench.torch_sim}
    with ExitStack() as stack:
        others = {
            name: stack.enter_context(Program(name, python, task, bench.folder))
            for name, python in interpreters.items()
            if python
        }
        hpcft = Hpcft(task)
        for batch in bench.size.batches:
            everyone: dict[str, Any] = {"hpcft": hpcft, **others}
            if batch.num_replicas > bench.size.most_with_ase:
                everyone.pop("ase", None)
            try:
                yield from of_batch(bench, batch, everyone)
            except (Exception, SystemExit) as error:  # an engine of others must not take ours along
                yield {f"{title_of(batch)}, {', '.join(everyone)}: failed": str(error)}
                others.clear()
                yield from of_batch(bench, batch, {"hpcft": hpcft})


def title_of(batch: Batch) -> str:
    return f"{batch.num_replicas} × {batch.num_atoms} atoms"


def of_batch(bench: Bench, batch: Batch, everyone: dict[str, Any]) -> Iterator[Found]:
    beside = md.Bench(bench.folder, md.QUICK, bench.device, bench.torch_sim, bench.progress)
    title = title_of(batch)
    bench.peak()
    with busy(bench.device) as shares:
        rows = md.rows_of_batch(batch, everyone, beside)
    for row in rows:
        name = f"{title}, {row['engine']}"
        yield {f"{name}, µs per step and atom": row["us_per_atom_step"]}
        yield {f"{name}, share outside of the network": row["outside_network_share"]}
        yield {f"{name}, share outside of the model": row["outside_model_share"]}
    yield {f"{title}, GPU busy (all engines), %": mean(shares) if shares else None}
    yield {f"{title}, peak MiB of hpcft": bench.peak()}
    if batch.num_replicas <= 64:
        yield {f"{title}, waits of a step": waits_of_a_step(bench, batch)}


@contextmanager
def busy(device: str) -> Iterator[list[float]]:
    """What nvidia-smi says of the GPU, in per cent, five times a second; filled at the end."""
    shares: list[float] = []
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        yield shares
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield shares
        finally:
            process.terminate()
            assert process.stdout is not None
            lines = process.stdout.read().split("\n")
            shares += [float(line) for line in lines if line.strip().isdigit()]


def waits_of_a_step(bench: Bench, batch: Batch) -> float | None:
    """By torch's own count, in a run without frames; what a run does once is taken off."""
    if bench.device == "cpu":
        return None
    start = crystals(batch.num_replicas, batch.repeat, seed=5)
    counts = []
    for steps in (2, 7):
        simulation = simulation_of(bench.model(), [atoms.copy() for atoms in start])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                simulation.run(steps, 1000)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum(_WAITING in str(warning.message) for warning in told))
    return (counts[1] - counts[0]) / 5


def of_neighbours(bench: Bench) -> Iterator[Found]:
    cutoff = train_problem.CUTOFF + SKIN
    libraries = {"matscipy": lambda: None, "nvalchemi": gpu_neighbours.library}
    for batch in bench.size.batches:
        graph = build_graph(
            crystals(batch.num_replicas, batch.repeat, 5), cutoff, dtype=torch.float32, device=bench.device
        )
        for name, library in libraries.items():
            if name == "nvalchemi" and (bench.device == "cpu" or library() is None):
                continue
            with patch.object(gpu_neighbours, "library", library):
                rebuild_edges(graph, cutoff)
                seconds = bench.seconds(lambda graph=graph: rebuild_edges(graph, cutoff), 3)
            yield {f"{title_of(batch)}, {name}, ms": 1e3 * seconds}


def of_memory(bench: Bench) -> Iterator[Found]:
    if bench.device == "cpu":
        yield {"largest batch": None}
        return
    model, start = bench.model(), crystals(16, (2, 2, 2), seed=5)
    room = atoms_that_fit(model, start)
    assert room is not None
    number = room // len(start[0])
    yield {"atoms that fit": room}
    bench.peak()
    total = torch.cuda.get_device_properties(0).total_memory / 2**20
    simulation = simulation_of(model, [start[i % len(start)].copy() for i in range(number)])
    begun = time.perf_counter()
    simulation.run(3, 10)
    bench.wait()
    yield {"replicas": number, "3 steps with their neighbour list, s": time.perf_counter() - begun}
    yield {"reserved, share of the memory": torch.cuda.memory_reserved() / 2**20 / total}
    yield {"in use at most, share of the memory": (bench.peak() or 0.0) / total}
    yield {"ran out of memory": simulation.max_atoms is not None}


# ---- training ------------------------------------------------------------------------------------------------------


def of_training(bench: Bench) -> Iterator[Found]:
    ways: dict[str, dict[str, Any]] = {
        "plain": {"acceleration": "none"},
        "without prefetch": {"acceleration": "none", "prefetch": False},
        "cuequivariance": {"acceleration": "cuequivariance"},
        "tf32": {"acceleration": "none", "tf32": True},
    }
    for dtype in (torch.float32, torch.float64):
        for name, options in ways.items():
            if options.get("tf32") and dtype == torch.float64:
                continue
            try:
                speed = structures_per_s(bench, dtype, options)
            except Exception as error:  # each way by itself
                yield {f"{name}, {dtype}: failed": f"{type(error).__name__}: {error}"}
            else:
                yield {f"{name}, {dtype}, structures per s": speed}
            finally:
                torch.set_float32_matmul_precision("highest")


def structures_per_s(bench: Bench, dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Of the second epoch: the first compiles and fills caches."""
    size = bench.size
    labels = train_problem.labels_of(bench.folder, "train", dtype)
    settings = TrainingSettings(
        2,
        batch_size=size.training_batch,
        steps_per_epoch=size.training_steps,
        learning_rate=1e-4,
        weights=train_problem.WEIGHTS,
        ema=train_problem.EMA,
        **options,
    )
    model = load_model(bench.folder / "foundation.pt", dtype=dtype, device=bench.device)
    trainer = Trainer(model, TrainingData(labels), settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer.run(Path(folder))
    return float(trainer.speed[-1]["structures_per_s"])


def beside_mace(bench: Bench) -> Iterator[Found]:
    if bench.device == "cpu":
        yield {"mace": "see train.py"}
        return
    file = bench.folder / "mace.json"
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--only", "mace"]
    command += ["--device", bench.device, "--repetitions", "1", "--json", str(file)]
    subprocess.run(command, check=True, timeout=150, stdout=subprocess.DEVNULL)
    found = json.loads(file.read_text())
    yield {key: found[key] for key in ("epoch_seconds_hpcft", "epoch_seconds_mace", "epoch_ratio")}
    yield {key: found[key] for key in ("valid_force_mae_hpcft", "valid_force_mae_mace", "start_rel_diff")}


# ---- relaxations ---------------------------------------------------------------------------------------------------


def of_relaxations(bench: Bench) -> Iterator[Found]:
    problem = relaxation_problem(bench, bench.device)

    def gradient(engine: str, steps: int) -> None:
        problem.potential.zero_grad()
        end = problem.unrolled(engine, bptt.MAPS[bptt.MAIN_MAP], steps)
        delta_q(end.positions_n3, problem.target_n3, problem.graph).sum().backward()

    for steps in bench.size.relaxation_steps:
        for engine in ("adjoint", "plain"):
            gradient(engine, 1)
            bench.peak()
            yield {
                f"{engine}, k={steps}, s": bench.seconds(lambda e=engine, k=steps: gradient(e, k)),
                f"{engine}, k={steps}, peak MiB": bench.peak(),
            }


# ---- TorchScript ---------------------------------------------------------------------------------------------------

FORCES = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
import on_gpu_parts as on_gpu
from pathlib import Path
fuses, profiles, folder, device, number = sys.argv[1:]
torch._C._jit_override_can_fuse_on_gpu(fuses == "1")
torch._C._jit_set_profiling_executor(profiles == "1")
bench = on_gpu.Bench(Path(folder), on_gpu.FULL, device, None, print)
model = bench.model()
cells = on_gpu.crystals(int(number), (2, 2, 2), 5)
graph = on_gpu.build_graph(cells, model.cutoff, dtype=torch.float32, device=device)
for _ in range(4):  # what is compiled late
    on_gpu.evaluate(model, graph)
print(1e3 * bench.seconds(lambda: on_gpu.evaluate(model, graph), 10))
"""


def of_fusers(bench: Bench) -> Iterator[Found]:
    ways = {"as hpcft": "00", "the old fuser": "10", "profiling": "01", "profiling and fusing": "11"}
    number = 64 if bench.size is FULL else 1
    for name, (fuses, profiles) in ways.items():
        arguments = [fuses, profiles, str(bench.folder), bench.device, str(number)]
        ended = subprocess.run(
            [sys.executable, "-c", FORCES, *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if ended.returncode:
            yield {f"{name}: failed": ended.stderr.strip().split("\n")[-1]}
        else:
            yield {f"{name}, ms a force evaluation": float(ended.stdout.split()[-1])}


def prepare(bench: Bench) -> None:
    if not (bench.folder / "foundation.model").exists():
        bench.folder.mkdir(parents=True, exist_ok=True)
        train_problem.prepare(bench.folder, bench.size.model)
        bench.progress("the model is there")


PARTS: dict[str, Callable[[Bench], Iterator[Found]]] = {
    "correct": of_results,
    "md": of_dynamics,
    "training": of_training,
    "bptt": of_relaxations,
    "neighbours": of_neighbours,
    "largest": of_memory,
    "mace": beside_mace,
    "fusers": of_fusers,
}

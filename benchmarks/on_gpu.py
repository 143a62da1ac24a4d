"""Everything that only a GPU can show, in a few minutes of one: are the results right, what does it cost, where does it wait.

    python benchmarks/on_gpu.py --json FILE [--folder DIR] [--budget-s 480] [--only PART ...] [--torch-sim PYTHON]
    python benchmarks/on_gpu.py --device cpu --tiny

The parts run in the order of their worth, each by itself: one that fails is told and leaves the others, one for which no time is
left is left out, and FILE is written after each. `--device cpu --tiny` runs them all without a GPU, to see that they run. The
model is trained on the processor first, for half a minute, unless DIR holds it (`--prepare` makes it, and needs no GPU).

correct    energies, forces and stress on the GPU in float64 and float32 against the CPU in float64; the GPU's neighbour list
           against matscipy's; molecular dynamics on both, and continued from a checkpoint; the gradient of a relaxation on both.
md         microseconds per step and atom for more and more replicas, beside ASE's loop (up to 64 replicas, as it moves one after
           another) and torch-sim: the engines of md.py, which says what is equal and what is not. Shares outside of the model;
           how busy nvidia-smi finds the GPU; how often a step waits (torch's own count, `torch.cuda.set_sync_debug_mode`).
neighbours a new list of all replicas, by matscipy and by nvalchemi-toolkit-ops.
largest    as many replicas as `atoms_that_fit` allows, and what memory they took.
training   structures per second of `Trainer`: prefetch, cuEquivariance, TF32 on and off.
mace       `train.py --only mace`: an epoch beside mace's own program.
bptt       seconds and peak memory of the gradient of a relaxation, adjoint beside plain.
fusers     a force evaluation with TorchScript as hpcft sets it, with its old fuser, and with its profiling executor; each in a
           process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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
from rich.console import Console
from rich.table import Table
from timing import Found

from hpcft.md.batch_size import atoms_that_fit
from hpcft.models import gpu_neighbours
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
    0,
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
    for dtype in (torch.float64, torch.float32):
        model = bench.model(dtype=dtype)
        found = evaluate(
            model, build_graph(cells, model.cutoff, dtype=dtype, device=bench.device), stress=True
        )
        for name, value in vars(found).items():
            yield {f"{name} off by, {dtype}": off_by(value, getattr(expected, name))}
    yield {"pairs that only one neighbour list has": different_pairs(cells, exact.cutoff, bench.device)}
    ends = {device: moved(bench, device, [20]) for device in ("cpu", bench.device)}
    yield {"positions after 20 steps off by, Å": largest(ends[bench.device] - ends["cpu"])}
    yield {"the same, continued after 10, Å": largest(moved(bench, bench.device, [10, 10]) - ends["cpu"])}
    for engine in ("adjoint", "plain"):
        here, there = (relaxation_gradient(bench, device, engine, 5) for device in ("cpu", bench.device))
        yield {f"gradient of a relaxation off by, {engine}": off_by(there, here)}


def largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


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
import on_gpu
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


# ---- the command ---------------------------------------------------------------------------------------------------

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


def measure_all(bench: Bench, parts: Sequence[str], budget_s: float, keep: Callable[[Found], None]) -> Found:
    """Figures by part, told to `keep` after each; `failed` and `left out` beside them."""
    begun = time.perf_counter()
    found: Found = {"machine": machine_told(bench.device), "failed": {}, "left out": []}
    prepare(bench)
    for part in parts:
        if time.perf_counter() - begun > budget_s:
            found["left out"].append(part)
            keep(found)
            continue
        figures: Found = {}
        found[part] = figures
        try:
            for figure in PARTS[part](bench):
                figures |= figure
                bench.progress(f"{time.perf_counter() - begun:4.0f} s {part}: {figure}")
                if time.perf_counter() - begun > budget_s:
                    found["left out"].append(f"what follows in {part}")
                    break
        except (Exception, SystemExit) as error:  # the others go on
            found["failed"][part] = "".join(traceback.format_exception(error)[-3:])
            bench.progress(f"{part} FAILED: {error}")
        found["seconds"] = time.perf_counter() - begun
        keep(found)
    return found


def prepare(bench: Bench) -> None:
    if not (bench.folder / "foundation.model").exists():
        bench.folder.mkdir(parents=True, exist_ok=True)
        train_problem.prepare(bench.folder, bench.size.model)
        bench.progress("the model is there")


def machine_told(device: str) -> Found:
    told = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cpu":
        return told
    return told | {"gpu": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}


def table_of(found: Found) -> Table:
    table = Table("part", "", "", title=", ".join(f"{k} {v}" for k, v in found["machine"].items()))
    for part in PARTS:
        figures = found.get(part, {})
        for number, (name, value) in enumerate(figures.items()):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row("" if number else part, name, text, end_section=number + 1 == len(figures))
    for part, why in found["failed"].items():
        table.add_row(part, "FAILED", why.strip().split("\n")[-1])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, written after each part")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keeps the model, for another time")
    parser.add_argument("--prepare", action="store_true", help="make the model in DIR, and nothing else")
    parser.add_argument(
        "--budget-s", type=float, default=480.0, metavar="S", help="after which nothing new begins"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, and no others")
    parser.add_argument(
        "--torch-sim", metavar="PYTHON", help="of an environment with torch-sim-atomistic 0.3"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="hardly anything, to see that it runs")
    options = parser.parse_args()
    if options.device == "cuda" and not options.prepare and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here, and this measures one: run it where there is one, or see that it runs with "
            "--device cpu --tiny"
        )
    if options.prepare and options.folder is None:
        raise SystemExit("--prepare makes the model in a folder: name it with --folder")
    torch.set_num_threads(1)
    log = Console(stderr=True)

    def keep(found: Found) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    parts = [part for part in PARTS if part in (options.only or PARTS)]
    kept = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory(prefix="hpcft-gpu-")
    with warnings.catch_warnings(), kept as folder:
        warnings.simplefilter("ignore")  # TorchScript's
        bench = Bench(
            Path(folder),
            TINY if options.tiny else FULL,
            options.device,
            options.torch_sim,
            lambda line: log.print(line, style="dim", soft_wrap=True),
        )
        if options.prepare:
            prepare(bench)
            return
        found = measure_all(bench, parts, options.budget_s, keep)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table_of(found))
    if found["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

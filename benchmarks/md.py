"""What molecular dynamics costs: beside ASE and torch-sim, on two ranks beside one, and what its trajectories take of it.

    python benchmarks/md.py [--json FILE] [--quick] [--only engines|ranks|write|read] [--torch-sim PYTHON] [--device cpu|cuda]

Cu-Ag crystals, Langevin dynamics at 600 K with 2 fs, a small MACE that has seen a few labels, float32, one thread a process.

engines: microseconds per step and atom of hpcft's `Simulation`, of ASE's Langevin with mace's calculator (one replica after
another), and of torch-sim, if PYTHON is the interpreter of an environment that has torch-sim-atomistic 0.3 and mace-torch. They
take turns, and each goes on from where it was. Equal, and checked: the forces on the first structure (`forces_rel_diff`), and
that nothing explodes. Equal: starts, time step, friction, steps, a frame kept in memory every 10 steps, weights that want no
gradient; the first forces, of hpcft once a segment, are not counted. Not equal: integrators (BAOAB in hpcft and torch-sim,
another in ASE) and random numbers; hpcft fuses MACE's convolution, keeps freed memory, and its guards look at every step;
mace's calculator computes the stress too. Shares are of the time. Outside the model: of hpcft outside `evaluate`, of the others
outside ASE's calculator and torch-sim's `MaceModel`, which search for neighbours themselves. So compare
`outside_network_share`, outside of energies and gradient alone. `outside_bare_share` is by as many calls of `evaluate` right
after the steps, and nothing between them: two times, so what other work on the machine does to one of them is in it.

ranks: `run_md` with the same replicas on one process and on two, from the end of the first segment to that of the last, of the
slower rank. By the clock, to which other work on the machine adds: on two cores that are not idle, the speed-up is a lower bound.
By the processor's time it shows what smaller batches cost.

write: `run_segments`, which writes a segment while the next one runs, beside `Simulation.run` with the same steps of the same
replicas; the write of the last segment overlaps with nothing. With a Morse potential: where forces cost little, writing weighs
most, and a thousand steps end in time. `write_share_mace`: seconds of a write alone by those of a segment of MACE's steps, where
both were measured. `consolidation_cpu_share`: what it takes to make one H5MD file of the segments in the end (two here), so most
of it is to lay the file out, once for each replica. MB/s of `write_segment` beside one plain write and fsync of as many bytes.

read: frames of a consolidated trajectory of 50 replicas by `Trajectory.frame`, at random and in order, from the page cache.

Ratios are medians over repetitions, each with its range.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_problem
from ase.io import read, write
from md_problem import (
    FRAME_EVERY,
    FRICTION_PER_PS,
    HOTTEST,
    KELVIN,
    TIMESTEP_FS,
    WARM_UP,
    Batch,
    Hpcft,
    Program,
    Ran,
    Task,
    crystals,
    frames_of,
    how_to_move,
    simulation_of,
)
from rich.console import Console
from rich.table import Table
from timing import Found, Mark, in_processes, spanned

from hpcft.md.committed import Stretch, run_segments
from hpcft.md.run import MdRequest, run_md
from hpcft.models.allocator import keep_freed_memory
from hpcft.models.files import load_model
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import as_module
from hpcft.storage import trajectory as storage
from hpcft.storage.frames import FrameBlock
from hpcft.training.distributed import choose_device
from hpcft.training.rank import Rank

# Of the forces in float32, relative to their norm.
SAME = 1e-3
CUBE, LARGE = (2, 2, 2), (5, 10, 10)
WRITES = 5


@dataclass(frozen=True)
class Size:
    """How large, and how often. Replicas of all but the engines have 32 atoms; segments to read have 100 frames."""

    model: train_problem.Size
    batches: tuple[Batch, ...]
    batches_on_gpu: tuple[Batch, ...]
    rank_replicas: int
    rank_stretch: Stretch
    written_replicas: int
    written_stretch: Stretch
    read_replicas: int
    read_segments: int
    num_reads: int
    repetitions: int


FULL = Size(
    replace(train_problem.FULL, num_train=1, num_valid=1, pretraining_steps=200),
    (Batch(1, CUBE, 200), Batch(8, CUBE, 40), Batch(64, CUBE, 10), Batch(1, LARGE, 10)),
    (Batch(1, CUBE, 200), Batch(64, CUBE, 50), Batch(512, CUBE, 20), Batch(1, LARGE, 50)),
    rank_replicas=16,
    rank_stretch=Stretch(100, FRAME_EVERY, 2),
    written_replicas=64,
    written_stretch=Stretch(2000, FRAME_EVERY, 100),
    read_replicas=50,
    read_segments=4,
    num_reads=2000,
    repetitions=3,
)
QUICK = Size(
    replace(train_problem.QUICK, num_train=1, num_valid=1),
    (Batch(1, CUBE, 10), Batch(2, CUBE, 10)),
    (Batch(1, CUBE, 10), Batch(2, CUBE, 10)),
    rank_replicas=2,
    rank_stretch=Stretch(30, FRAME_EVERY, 1),
    written_replicas=2,
    written_stretch=Stretch(40, FRAME_EVERY, 2),
    read_replicas=2,
    read_segments=2,
    num_reads=50,
    repetitions=1,
)


@dataclass(frozen=True)
class Bench:
    """What is measured, and where. `torch_sim`: an interpreter, or None."""

    folder: Path
    size: Size
    device: str
    torch_sim: str | None
    progress: Callable[[str], None]

    @property
    def batches(self) -> tuple[Batch, ...]:
        return self.size.batches if self.device == "cpu" else self.size.batches_on_gpu


# ---- beside other engines ------------------------------------------------------------------------------------------


def beside_engines(bench: Bench) -> Found:
    task = Task(str(bench.folder / "foundation.pt"), str(bench.folder / "foundation.model"), bench.device)
    interpreters = {"ase": sys.executable, "torch-sim": bench.torch_sim}
    rows: list[Found] = []
    with ExitStack() as stack:
        others = {
            name: stack.enter_context(Program(name, python, task, bench.folder))
            for name, python in interpreters.items()
            if python
        }
        everyone = {"hpcft": Hpcft(task), **others}
        for batch in bench.batches:
            rows += rows_of_batch(batch, everyone, bench)
    return {"rows": rows}


def rows_of_batch(batch: Batch, everyone: Mapping[str, Any], bench: Bench) -> list[Found]:
    start = bench.folder / f"{batch.num_replicas}-of-{batch.num_atoms}.traj"
    write(start, crystals(batch.num_replicas, batch.repeat, seed=5))
    title = f"{batch.num_replicas} × {batch.num_atoms} atoms"
    forces: dict[str, np.ndarray] = {}
    for name, engine in everyone.items():
        try:
            forces[name] = np.array(engine.open(str(start)))
        except torch.OutOfMemoryError:
            bench.progress(f"{title}: too much for {name}")
    if "hpcft" not in forces:
        return []
    norm = np.linalg.norm(forces["hpcft"])
    off = {name: float(np.linalg.norm(mine - forces["hpcft"]) / norm) for name, mine in forces.items()}
    if not max(off.values()) < SAME:
        raise SystemExit(f"{title}: the engines do not compute the same forces; off by {off} of their norm")
    rounds: list[dict[str, Ran]] = []
    for number in range(bench.size.repetitions):
        turns = list(forces) if number % 2 == 0 else list(reversed(forces))
        rounds.append({name: everyone[name].run(batch.num_steps) for name in turns})
        told = (
            f"{name} {ran.seconds:.2f} s at {ran.temperature_K:.0f} K" for name, ran in rounds[-1].items()
        )
        bench.progress(f"{title}, {batch.num_steps} steps: {', '.join(told)}")
        check_temperatures(title, rounds[-1])
    return [
        row_of(name, batch, rounds) | {"version": everyone[name].version, "forces_rel_diff": off[name]}
        for name in forces
    ]


def check_temperatures(title: str, runs: Mapping[str, Ran]) -> None:
    for name, ran in runs.items():
        if not ran.temperature_K < HOTTEST:
            raise SystemExit(f"{title}: {name} has exploded: {ran.temperature_K} K")


def row_of(name: str, batch: Batch, rounds: Sequence[Mapping[str, Ran]]) -> Found:
    """Ratios: of the two runs of each round."""
    each = 1e6 / (batch.num_replicas * batch.num_atoms * batch.num_steps)
    runs = [(found[name], found["hpcft"]) for found in rounds]
    columns = {
        "us_per_atom_step": [each * mine.seconds for mine, _ in runs],
        "cpu_us_per_atom_step": [each * mine.cpu_seconds for mine, _ in runs],
        "times_hpcft": [mine.seconds / ours.seconds for mine, ours in runs],
        "cpu_times_hpcft": [mine.cpu_seconds / ours.cpu_seconds for mine, ours in runs],
        "outside_model_share": [1 - mine.in_model / mine.seconds for mine, _ in runs],
        "outside_network_share": [1 - mine.in_network / mine.seconds for mine, _ in runs],
        "outside_bare_share": [1 - mine.bare / mine.seconds for mine, _ in runs if mine.bare is not None],
        "temperature_K": [mine.temperature_K for mine, _ in runs],
    }
    row: Found = {"engine": name, "num_atoms": batch.num_atoms, **batch._asdict()}
    for key, values in columns.items():
        row |= spanned(key, values) if values else {}
    return row


# ---- two ranks -----------------------------------------------------------------------------------------------------


def of_rank(folder: Path, size: Size, device: str, rank: Rank) -> Mark:
    """From the end of the first segment to that of the last."""
    torch.set_num_threads(1)
    keep_freed_memory()
    where = choose_device(rank, device)
    potential = load_model(folder / "foundation.pt", dtype=torch.float32, device=where)
    as_module(potential).requires_grad_(False)
    here = folder / f"ranks-{rank.token}"
    structures = read(folder / "ranks.traj", ":")
    request = MdRequest(structures, here, size.rank_stretch, *how_to_move())
    marks: list[Mark] = []
    trajectory = run_md(request, potential, rank, on_segment=lambda *_: marks.append(Mark.now()))
    if rank.is_first:
        with storage.Trajectory(trajectory) as found:
            check_ends(found.checkpoint(), size.rank_stretch)
    return marks[-1].since(marks[0])


def check_ends(checkpoint: Mapping[str, Any], stretch: Stretch) -> None:
    stopped = {
        name: str(state["stopped"]) or f"at step {int(state['step'])}"
        for name, state in checkpoint.items()
        if str(state["stopped"]) or int(state["step"]) != stretch.steps
    }
    if stopped:
        raise SystemExit(f"not all replicas have run all steps, so there is nothing to compare: {stopped}")


def on_two_ranks(bench: Bench) -> Found:
    if bench.device != "cpu" and torch.cuda.device_count() < 2:
        bench.progress("ranks: left out, as two of them would share one GPU")
        return {}
    write(bench.folder / "ranks.traj", crystals(bench.size.rank_replicas, CUBE, seed=6))
    rows: list[dict[str, float]] = []
    for number in range(bench.size.repetitions):
        (alone,), both = (
            in_processes(
                of_rank,
                *(
                    (bench.folder, bench.size, bench.device, Rank(r, n, r, token=f"{number}-{n}"))
                    for r in range(n)
                ),
            )
            for n in (1, 2)
        )
        slower = Mark(*map(max, zip(*both, strict=True)))
        rows.append(
            {
                "rank_seconds_1": alone.wall,
                "rank_seconds_2": slower.wall,
                "rank_speedup_2": alone.wall / slower.wall,
                "rank_cpu_speedup_2": alone.cpu / slower.cpu,
            }
        )
        bench.progress(", ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()))
    found: Found = {"repetitions_ranks": rows}
    for name in rows[0]:
        found |= spanned(name, [row[name] for row in rows])
    return found


# ---- writing -------------------------------------------------------------------------------------------------------


def timed_writing(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """Marks of whole runs, `alone` and `committed`, and of what `timed_writes` adds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    potential = MorsePotential(train_problem.ELEMENTS, cutoff=4.0).to(device).requires_grad_(False)
    stretch, start = size.written_stretch, crystals(size.written_replicas, CUBE, seed=7)
    simulation_of(potential, [atoms.copy() for atoms in start]).run(WARM_UP, FRAME_EVERY)
    found: dict[str, Any] = {"alone": [], "committed": [], "consolidated": []}
    for number in range(size.repetitions):
        for name in ("alone", "committed")[:: 1 if number % 2 == 0 else -1]:
            simulation = simulation_of(potential, [atoms.copy() for atoms in start])
            begun = Mark.now()
            if name == "committed":
                segments = run_segments(folder / f"written-{number}", simulation, stretch)
            else:
                for _ in range(stretch.num_segments):
                    blocks = simulation.run(stretch.steps_per_segment, stretch.frame_every)
            found[name].append(Mark.now().since(begun))
            if name == "committed":
                begun = Mark.now()
                storage.consolidate(segments, folder / f"written-{number}.h5", {})
                found["consolidated"].append(Mark.now().since(begun))
            state = {f"{replica.index:04d}": replica.state() for replica in simulation.replicas}
            check_ends(state, stretch)
    return found | timed_writes(folder / "writes", blocks, state)


def timed_writes(folder: Path, blocks: Sequence[FrameBlock], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Of a segment, and of the same bytes as they are."""
    folder.mkdir()
    segment, plain = [], []
    for number in range(WRITES):
        path = storage.segment_path(folder, number)
        begun = Mark.now()
        storage.write_segment(path, blocks, checkpoint)
        segment.append(Mark.now().since(begun))
        content = path.read_bytes()
        begun = Mark.now()
        with (folder / f"plain-{number}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        plain.append(Mark.now().since(begun))
    return {"segment": segment, "plain": plain, "MB": len(content) / 1e6}


def of_writing(bench: Bench) -> Found:
    (timed,) = in_processes(timed_writing, (bench.folder, bench.size, bench.device))
    pairs = list(zip(timed["committed"], timed["alone"], strict=True))
    consolidation = [
        end.cpu / run.cpu for end, run in zip(timed["consolidated"], timed["committed"], strict=True)
    ]
    found: Found = {
        **spanned("write_share", [ours.wall / alone.wall - 1 for ours, alone in pairs]),
        **spanned("write_cpu_share", [ours.cpu / alone.cpu - 1 for ours, alone in pairs]),
        **spanned("run_seconds", [alone.wall for _, alone in pairs]),
        **spanned("write_seconds", [one.wall for one in timed["segment"]]),
        **spanned("write_cpu_seconds", [one.cpu for one in timed["segment"]]),
        **spanned("write_MB_per_s", [timed["MB"] / one.wall for one in timed["segment"]]),
        **spanned("plain_MB_per_s", [timed["MB"] / one.wall for one in timed["plain"]]),
        **spanned("consolidation_cpu_share", consolidation),
        "segment_MB": timed["MB"],
    }
    bench.progress(f"a segment of {timed['MB']:.1f} MB is written in {found['write_seconds']:.3f} s")
    return found


def write_share_of_mace(found: Found, size: Size) -> Found:
    """Where as large a batch was run with MACE: the same write beside its steps."""
    wanted = ("hpcft", size.written_replicas, 32)
    for row in found.get("rows", []):
        if (row["engine"], row["num_replicas"], row["num_atoms"]) == wanted and "write_seconds" in found:
            atom_steps = size.written_replicas * 32 * size.written_stretch.steps_per_segment
            return {
                "write_share_mace": found["write_seconds"] / (1e-6 * row["us_per_atom_step"] * atom_steps)
            }
    return {}


# ---- reading -------------------------------------------------------------------------------------------------------


def timed_reading(folder: Path, size: Size) -> dict[str, list[Mark]]:
    """As many frames, in two orders, in each repetition."""
    segments, path = folder / "read", folder / "read.h5"
    segments.mkdir()
    for number in range(size.read_segments):
        blocks = [frames_of(replica, number) for replica in range(size.read_replicas)]
        storage.write_segment(storage.segment_path(segments, number), blocks, {})
    storage.consolidate(storage.list_segments(segments), path, {})
    with storage.Trajectory(path) as trajectory:
        everything = [(r, frame) for r in trajectory.replicas for frame in range(trajectory.num_frames(r))]
    marks: dict[str, list[Mark]] = {"random": [], "ordered": []}
    for number in range(size.repetitions):
        chosen = np.random.default_rng(number).choice(len(everything), size.num_reads, replace=False)
        for name, order in (("random", chosen), ("ordered", range(size.num_reads))):
            with storage.Trajectory(path) as trajectory:
                begun = Mark.now()
                for place in order:
                    trajectory.frame(*everything[place])
                marks[name].append(Mark.now().since(begun))
    return marks


def of_reading(bench: Bench) -> Found:
    (timed,) = in_processes(timed_reading, (bench.folder, bench.size))
    pairs = list(zip(timed["random"], timed["ordered"], strict=True))
    found = spanned("random_times_ordered", [one.wall / other.wall for one, other in pairs])
    found |= spanned("random_cpu_times_ordered", [one.cpu / other.cpu for one, other in pairs])
    for name, marks in timed.items():
        found |= spanned(f"{name}_frames_per_s", [bench.size.num_reads / mark.wall for mark in marks])
        found |= spanned(f"{name}_frames_per_cpu_s", [bench.size.num_reads / mark.cpu for mark in marks])
    bench.progress(f"{found['random_frames_per_s']:.0f} frames per s at random")
    return found


# ---- the command ---------------------------------------------------------------------------------------------------

# The engines last: hpcft's is in this process, and one that has used a GPU can start no other that does.
MEASURES = {"ranks": on_two_ranks, "write": of_writing, "read": of_reading, "engines": beside_engines}


def measure_all(bench: Bench, parts: Sequence[str]) -> Found:
    load, begun = os.getloadavg(), time.perf_counter()
    found: Found = {"settings": settings_told(bench)}
    if {"ranks", "engines"} & set(parts):
        in_processes(train_problem.prepare, (bench.folder, bench.size.model))
        bench.progress("the model is there")
    for part in parts:
        found |= MEASURES[part](bench)
    found |= write_share_of_mace(found, bench.size)
    found["seconds"] = time.perf_counter() - begun
    return found | {"load_average": {"before": load, "after": os.getloadavg()}}


def settings_told(bench: Bench) -> Found:
    return {
        **asdict(bench.size),
        "batches": [batch._asdict() for batch in bench.batches],
        "device": bench.device,
        "temperature_K": KELVIN,
        "timestep_fs": TIMESTEP_FS,
        "friction_per_ps": FRICTION_PER_PS,
        "frame_every": FRAME_EVERY,
        "torch": torch.__version__,
    }


def tables_of(found: Found) -> list[Table]:
    tables = []
    if found.get("rows"):
        titles = ("replicas", "atoms", "engine", "µs", "range", "CPU µs", ": hpcft", "range", "by CPU")
        engines = {row["engine"]: row["version"] for row in found["rows"]}
        without = (
            "" if "torch-sim" in engines else "; torch-sim was not run: name its interpreter with --torch-sim"
        )
        table = Table(
            *titles,
            "outside\nmodel",
            "outside\nnetwork",
            "K",
            title="time per step and atom",
            caption=", ".join(engines.values()) + without,
        )
        for row in found["rows"]:
            table.add_row(*cells_of(row))
        tables.append(table)
    rest = [row for row in ALONE if row[1] in found]
    if rest:
        table = Table("hpcft", "median", "range")
        for title, key, form in rest:
            span = " to ".join(form.format(end) for end in found.get(f"{key}_range", []))
            table.add_row(title, form.format(found[key]), span)
        tables.append(table)
    return tables


def cells_of(row: Found) -> list[str]:
    def span(key: str, form: str) -> str:
        return " to ".join(form.format(end) for end in row[f"{key}_range"])

    return [
        str(row["num_replicas"]),
        str(row["num_atoms"]),
        row["engine"],
        f"{row['us_per_atom_step']:.4g}",
        span("us_per_atom_step", "{:.4g}"),
        f"{row['cpu_us_per_atom_step']:.4g}",
        f"{row['times_hpcft']:.2f}",
        span("times_hpcft", "{:.2f}"),
        f"{row['cpu_times_hpcft']:.2f}",
        f"{row['outside_model_share']:.1%}",
        f"{row['outside_network_share']:.1%}",
        f"{row['temperature_K']:.0f}",
    ]


ALONE = (
    ("2 ranks, times as fast", "rank_speedup_2", "{:.2f}"),
    ("the same by CPU time of a rank", "rank_cpu_speedup_2", "{:.2f}"),
    ("segments take of a run with Morse", "write_share", "{:.2%}"),
    ("the same by CPU time", "write_cpu_share", "{:.2%}"),
    ("their consolidation, by CPU time of such a run", "consolidation_cpu_share", "{:.2%}"),
    ("a write alone, by a segment's steps with MACE", "write_share_mace", "{:.3%}"),
    ("write of a segment, s", "write_seconds", "{:.3f}"),
    ("the same, CPU s", "write_cpu_seconds", "{:.3f}"),
    ("write of a segment, MB/s", "write_MB_per_s", "{:.3g}"),
    ("plain write and fsync, MB/s", "plain_MB_per_s", "{:.3g}"),
    ("frames per s, at random", "random_frames_per_s", "{:.3g}"),
    ("frames per s, in order", "ordered_frames_per_s", "{:.3g}"),
    ("frames per CPU s, at random", "random_frames_per_cpu_s", "{:.3g}"),
    ("frames per CPU s, in order", "ordered_frames_per_cpu_s", "{:.3g}"),
    ("at random, times as long", "random_times_ordered", "{:.2f}"),
    ("the same by CPU time", "random_cpu_times_ordered", "{:.2f}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as one object")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps, to see that it runs"
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="these measurements, and no others")
    parser.add_argument(
        "--torch-sim", metavar="PYTHON", help="of an environment with torch-sim-atomistic 0.3"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = Console(stderr=True)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="hpcft-md-") as name:
        warnings.simplefilter("ignore")  # TorchScript's
        bench = Bench(
            Path(name),
            QUICK if options.quick else FULL,
            options.device,
            options.torch_sim,
            lambda line: log.print(line, style="dim"),
        )
        found = measure_all(bench, [part for part in MEASURES if part in (options.only or MEASURES)])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    console = Console()
    console.width = max(console.width, 130)  # the table's; a file is 80 wide otherwise
    for table in tables_of(found):
        console.print(table)


if __name__ == "__main__":
    main()

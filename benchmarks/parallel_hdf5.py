"""A file for each rank beside one shared file through parallel HDF5: what writing costs, and what a kill leaves.

    mpirun -n 2 python benchmarks/parallel_hdf5.py [--segments 6] [--rounds 5] [--kills 20] [--json FILE]

It needs an h5py that is built with MPI (`HDF5_MPI=ON CC=mpicc pip install --no-build-isolation --no-deps --no-binary=h5py h5py`).

The same frames, 64 replicas of 32 atoms in segments of 100 frames, in turns:

    own files     what `hpcft md` does: each rank commits its segments with fsync and SHA-256, in the end it makes an H5MD
                  file of them, with a digest of each frame. `while it runs`: the segments alone
    shared        one file; at each segment all ranks let all datasets grow, each writes its own, all flush; without checksums,
                  as HDF5 writes filtered chunks collectively only; no H5MD groups, digests or fsync
    shared, checksums   the same with fletcher32 as our own files have it, written collectively
    shared, sizes known beforehand   no growth: what parallel HDF5 does at its best, but no run knows when its replicas stop

Then the kills: one rank of a run that writes a shared file is killed with -9 at a random moment, and the file is opened and
compared, segment for segment, with what was written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from timing import Mark

from hpcft.storage.trajectory import FrameBlock, consolidate, segment_path, write_segment

REPLICAS, FRAMES, ATOMS = 64, 100, 32
FORMAT = ("v110", "v110")
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("positions", "velocities", "forces"), (ATOMS, 3)),
    "cell": (3, 3),
    **dict.fromkeys(("step", "time_fs", "potential_energy", "temperature_K"), ()),
}

Blocks = dict[int, FrameBlock]


def blocks_of(replicas: range, segment: int) -> Blocks:
    """Frames of a segment whose every number tells which segment they are of."""

    def block(replica: int) -> FrameBlock:
        rows = {name: np.full((FRAMES, *shape), segment, dtype(name)) for name, shape in SHAPES.items()}
        rows["step"] = np.arange(segment * FRAMES, (segment + 1) * FRAMES)
        static = {"numbers": np.full(ATOMS, 29), "masses": np.full(ATOMS, 63.5), "pbc": np.ones(3, bool)}
        return FrameBlock(replica=replica, **static, **rows)

    return {replica: block(replica) for replica in replicas}


def dtype(name: str) -> Any:
    if name == "step":
        return np.int64
    return np.float32 if SHAPES[name] == (ATOMS, 3) else np.float64


def own_segments(folder: Path, segments: list[Blocks]) -> list[Path]:
    own = folder / f"rank-{MPI.COMM_WORLD.rank}"
    own.mkdir()
    paths = [segment_path(own, number) for number in range(len(segments))]
    for path, blocks in zip(paths, segments, strict=True):
        write_segment(path, list(blocks.values()), {})
    return paths


def own_files(folder: Path, segments: list[Blocks]) -> None:
    paths = own_segments(folder, segments)
    consolidate(paths, folder / f"rank-{MPI.COMM_WORLD.rank:04d}.h5", {})


def shared(folder: Path, segments: list[Blocks], *, checked: bool = False) -> None:
    with h5py.File(folder / "all.h5", "w", driver="mpio", comm=MPI.COMM_WORLD, libver=FORMAT) as file:
        datasets = create(file, 0, chunked=True, checked=checked)
        for number, blocks in enumerate(segments):
            for dataset in datasets.values():
                dataset.resize((number + 1) * FRAMES, axis=0)
            fill(datasets, number, blocks, collective=checked)
            file.flush()


def shared_checked(folder: Path, segments: list[Blocks]) -> None:
    shared(folder, segments, checked=True)


def shared_sized(folder: Path, segments: list[Blocks]) -> None:
    with h5py.File(folder / "all.h5", "w", driver="mpio", comm=MPI.COMM_WORLD, libver=FORMAT) as file:
        datasets = create(file, len(segments) * FRAMES, chunked=False, checked=False)
        for number, blocks in enumerate(segments):
            fill(datasets, number, blocks, collective=False)


WAYS: dict[str, Callable[[Path, list[Blocks]], Any]] = {
    "own files": own_files,
    "own files, while it runs": own_segments,
    "shared": shared,
    "shared, checksums": shared_checked,
    "shared, sizes known beforehand": shared_sized,
}


def create(file: Any, frames: int, *, chunked: bool, checked: bool) -> dict[tuple[int, str], Any]:
    """All ranks create all datasets: parallel HDF5 wants that together."""
    datasets = {}
    for replica in range(REPLICAS):
        for name, shape in SHAPES.items():
            how: dict[str, Any] = {"maxshape": (None, *shape), "chunks": (FRAMES, *shape)} if chunked else {}
            datasets[replica, name] = file.create_dataset(
                f"{replica:04d}/{name}", (frames, *shape), dtype(name), fletcher32=checked, **how
            )
    return datasets


def fill(datasets: dict[tuple[int, str], Any], number: int, blocks: Blocks, *, collective: bool) -> None:
    rows = slice(number * FRAMES, (number + 1) * FRAMES)
    for (replica, name), dataset in datasets.items():
        with dataset.collective if collective else contextlib.nullcontext():
            if replica in blocks:
                dataset[rows] = getattr(blocks[replica], name)
            elif collective:
                take_part(dataset)


def take_part(dataset: Any) -> None:
    """In a collective write, with no rows."""
    nothing, memory = dataset.id.get_space(), h5py.h5s.create_simple((1, *dataset.shape[1:]))
    nothing.select_none()
    memory.select_none()
    dataset.id.write(memory, nothing, np.empty((1, *dataset.shape[1:]), dataset.dtype), dxpl=dataset._dxpl)


def measure(segments: int, rounds: int) -> list[dict[str, Any]]:
    """By way: seconds of the slowest rank, and processor seconds of all; ratios to `own files` of the same round."""
    world = MPI.COMM_WORLD
    mine = range(world.rank, REPLICAS, world.size)
    data = [blocks_of(mine, number) for number in range(segments)]
    found: dict[str, list[Mark]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, write in WAYS.items():
            scratch = tempfile.mkdtemp(prefix="parallel-hdf5-") if world.rank == 0 else None
            folder = Path(world.bcast(scratch))
            world.Barrier()
            start = Mark.now()
            write(folder, data)
            own = Mark.now().since(start)
            found[name].append(Mark(world.allreduce(own.wall, MPI.MAX), world.allreduce(own.cpu)))
            world.Barrier()
            if world.rank == 0:
                subprocess.run(["rm", "-r", str(folder)], check=True)
    return [row(name, marks, found["own files"]) for name, marks in found.items()]


def row(name: str, marks: list[Mark], base: list[Mark]) -> dict[str, Any]:
    ratios = [mark.wall / one.wall for mark, one in zip(marks, base, strict=True)]
    return {
        "way": name,
        "seconds": statistics.median(mark.wall for mark in marks),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "cpu_ratio": statistics.median(m.cpu / one.cpu for m, one in zip(marks, base, strict=True)),
    }


def write_until_killed(folder: Path, after_s: float) -> None:
    """What the ranks of one try do: rank 1 kills itself in the middle of it."""
    if MPI.COMM_WORLD.rank == 1:
        end = threading.Timer(after_s, lambda: os.kill(os.getpid(), signal.SIGKILL))
        end.daemon = True
        end.start()
    mine = range(MPI.COMM_WORLD.rank, REPLICAS, MPI.COMM_WORLD.size)
    shared(folder, [blocks_of(mine, number) for number in range(60)])


def after_kill(generator: random.Random) -> str:
    """sound, wrong or unreadable: the file that a killed run has left."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, __file__]
        command += ["--write-until-killed", folder, str(0.6 + 2.4 * generator.random())]
        clean = {
            key: value
            for key, value in os.environ.items()
            if key.startswith("OMPI_ALLOW") or not key.startswith(("OMPI_", "PMIX_"))
        }
        subprocess.run(command, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return judge(Path(folder) / "all.h5")


def judge(path: Path) -> str:
    if not path.exists():
        return "not begun"
    try:
        with h5py.File(path) as file:
            for replica in file.values():
                energies = replica["potential_energy"][()].reshape(-1, FRAMES)
                if (energies != np.arange(len(energies))[:, None]).any():
                    return "wrong numbers, no error"
    except (OSError, KeyError, RuntimeError, ValueError):
        return "unreadable"
    return "sound"


def show(found: dict[str, Any]) -> None:
    table = Table("way", "s", "of own files (range)", "processor time, of own files")
    for line in found["rows"]:
        low, high = line["ratio_range"]
        ratio = f"{line['ratio']:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(line["way"], f"{line['seconds']:.2f}", ratio, f"{line['cpu_ratio']:.2f}")
    console = Console()
    console.print(table)
    if found["kills"]:
        console.print("a shared file after one of two ranks was killed:", found["kills"])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-until-killed", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not h5py.get_config().mpi:
        raise SystemExit(
            "parallel_hdf5.py: this h5py is built without MPI; its documentation above says how to build one"
        )
    if options.write_until_killed:
        folder, after_s = options.write_until_killed
        return write_until_killed(Path(folder), float(after_s))
    rows = measure(options.segments, options.rounds)
    if MPI.COMM_WORLD.rank:
        return None
    generator = random.Random(1)
    ends = [after_kill(generator) for _ in range(options.kills)]
    found = {
        "rows": rows,
        "ranks": MPI.COMM_WORLD.size,
        "kills": {end: ends.count(end) for end in sorted(set(ends))},
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    show(found)
    return None


if __name__ == "__main__":
    main()

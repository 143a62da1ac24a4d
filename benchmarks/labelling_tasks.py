"""Measurements of label tasks for labelling.py: overhead over the bare calculator, workers, a large shard, random kills."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from timing import Found

from hpcft.labelling.item import Item, StoredItems
from hpcft.labelling.journal import journal_path, list_journals
from hpcft.labelling.label import compute_label
from hpcft.labelling.reference import Reference, build_calculator
from hpcft.labelling.shard import finish_shard
from hpcft.labelling.worker import label_items
from hpcft.storage.structures import write_structures_in_blocks

EMT_REFERENCE = Reference("ase.calculators.emt.EMT")
ESPRESSO = Reference(
    "ase.calculators.espresso.Espresso",
    {
        "profile": {"command": "pw.x", "pseudo_dir": "/usr/share/espresso/pseudo"},
        "pseudopotentials": {"Si": "Si.pz-vbc.UPF"},
        "input_data": {"ecutwfc": 16, "conv_thr": 1e-8},
        "kpts": [2, 2, 2],
    },
)
REPEATS = 5


def rattled(atoms: Atoms, count: int, seed: int = 0) -> list[Atoms]:
    """Copies, each different."""
    rng = np.random.default_rng(seed)
    copies = [atoms.copy() for _ in range(count)]
    for copy in copies:
        copy.positions += rng.normal(0, 0.05, copy.positions.shape)
    return copies


def overhead(base: Path, quick: bool) -> Found:
    """Time of a label beyond the bare calculator's: for a calculator inside Python, and for one that is a program.

    Both in turn, so that other work on the machine meets both; a task starts its supervisor once, which is not counted per
    label but given by itself.
    """
    metals = rattled(bulk("Cu", cubic=True).repeat(2), 5 if quick else 200)
    silicon = rattled(bulk("Si"), 1 if quick else 10)
    repeats = 1 if quick else REPEATS
    start_s = _median(lambda folder: _labelled(metals[:1], EMT_REFERENCE, folder), base, repeats)
    found: Found = {"start_of_a_task_s": start_s}
    for name, structures, reference in (("emt", metals, EMT_REFERENCE), ("espresso", silicon, ESPRESSO)):
        bare, ours = [], []
        for _ in range(repeats):
            bare.append(_median(lambda folder: _bare(structures, reference, folder), base, 1))  # noqa: B023
            ours.append(_median(lambda folder: _labelled(structures, reference, folder), base, 1) - start_s)  # noqa: B023
        each = statistics.median(after - before for before, after in zip(bare, ours, strict=True)) / len(
            structures
        )
        found[f"bare_ms_{name}"] = statistics.median(bare) / len(structures) * 1e3
        found[f"overhead_ms_{name}"] = each * 1e3
    found["overhead_ms_per_label"] = found.pop("overhead_ms_emt")
    found["overhead_share_espresso"] = found["overhead_ms_espresso"] / found["bare_ms_espresso"]
    return found


def two_workers(base: Path, quick: bool) -> Found:
    """Labels per second of one task with two workers against one, in turn, once all are at work.

    At most the share of two cores that other work on the machine leaves.
    """
    structures = rattled(bulk("Cu", cubic=True).repeat(3), 6 if quick else 120)
    repeats = 1 if quick else REPEATS
    ratios = [_rate(structures, base, 2) / _rate(structures, base, 1) for _ in range(repeats)]
    return {
        "worker_speedup_2": statistics.median(ratios),
        "worker_speedup_2_range": [min(ratios), max(ratios)],
    }


def _rate(structures: Sequence[Atoms], base: Path, workers: int) -> float:
    ended: list[float] = []
    items = [Item.single_point(atoms) for atoms in structures]
    folder = base / "run"
    label_items(
        items, EMT_REFERENCE, folder, workers=workers, on_progress=lambda _: ended.append(time.perf_counter())
    )
    shutil.rmtree(folder)
    first = workers  # each has ended one, so none is still starting
    return (len(ended) - 1 - first) / (ended[-1] - ended[first])


def large_shard(base: Path, quick: bool) -> Found:
    """One task of very many EMT structures of 4 atoms, read and written in blocks; memory above that after a hundredth of it."""
    count = 1_000 if quick else 100_000
    cell = bulk("Cu", cubic=True)
    blocks = (rattled(cell, 1000, seed) for seed in range(count // 1000))
    write_structures_in_blocks(base / "in.h5", blocks, count)
    program = [sys.executable, __file__, "shard", str(base), str(count)]
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=_environment())
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def _large_shard(base: Path, count: int) -> Found:
    items = StoredItems(base / "in.h5", range(count), Item.single_point)
    memory: list[float] = []
    seen = itertools.count(1)

    def look(record: object) -> None:
        if next(seen) == count // 100:
            memory.append(_memory_MiB())

    start = time.perf_counter()
    label_items(items, EMT_REFERENCE, base / "shard", workers=2, on_progress=look)
    labelled = time.perf_counter()
    finish_shard(base / "shard")
    files = list((base / "shard").iterdir())
    return {
        "num_labels": count,
        "labels_per_second": count / (labelled - start),
        "publish_s": time.perf_counter() - labelled,
        "memory_MiB_at_first": memory[0],
        "memory_MiB_at_last": _memory_MiB(),
        "files_per_task": len([path for path in files if not path.name.startswith("journal")]),
        "journal_MB": sum(path.stat().st_size for path in files if path.name.startswith("journal")) / 1e6,
    }


def random_kills(base: Path, quick: bool) -> Found:
    """A shard whose process is killed with -9 at random moments until it is done: labels that are missing, or paid for twice.

    Each finished calculation appends its energy to a file. What was in hand at a kill may be computed again; what was durable
    before may not.
    """
    count, kills = (30, 3) if quick else (2_000, 25)
    blocks = [rattled(bulk("Cu", cubic=True).repeat(2), count)]
    write_structures_in_blocks(base / "in.h5", blocks, count)
    rng = random.Random(0)
    calls: Path = base / "calls"
    paid_before: Counter[str] = Counter()
    durable: dict[str, int] = {}
    for attempt in range(kills + 1):
        program = [sys.executable, __file__, "kill", str(base), str(count), str(attempt)]
        process = subprocess.Popen(program, env=_environment(calls))
        if attempt < kills:
            target = rng.randrange(count // kills)
            journal = journal_path(base / "shard", attempt)
            while process.poll() is None and _num_lines(journal) < target:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            while any((base / "scratch").iterdir()):  # the supervisor's last act
                time.sleep(0.01)
        else:
            assert process.wait() == 0
        paid_before = Counter(calls.read_text().split())
        for energy in _durable_energies(base / "shard"):
            durable.setdefault(energy, paid_before[energy])
    return {
        "kills": kills,
        "lost": count - len(list_journals(base / "shard").items),
        "duplicated": sum(paid_before[energy] - times for energy, times in durable.items()),
        "in_hand_at_a_kill": sum(paid_before.values()) - count,
    }


def _durable_energies(folder: Path) -> list[str]:
    entries = list_journals(folder).items.values() if folder.exists() else ()
    return [repr(entry.read().result.energy) for entry in entries]  # type: ignore[union-attr]


def _killed_shard(base: Path, count: int, attempt: int) -> None:
    items = StoredItems(base / "in.h5", range(count), Item.single_point)
    reference = replace(EMT_REFERENCE, calculator="labelling_tasks.TellingEMT")
    label_items(items, reference, base / "shard", attempt=attempt, workers=2, scratch=base / "scratch")


class TellingEMT(EMT):
    """Appends the energy of each finished calculation to the file that $HPCFT_CALLS names."""

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        with Path(os.environ["HPCFT_CALLS"]).open("a") as file:
            file.write(f"{float(self.results['energy'])!r}\n")


def _bare(structures: Sequence[Atoms], reference: Reference, folder: Path) -> None:
    for number, atoms in enumerate(structures):
        compute_label(atoms, build_calculator(reference, folder / str(number)))


def _labelled(structures: Sequence[Atoms], reference: Reference, folder: Path) -> None:
    items = [Item.single_point(atoms) for atoms in structures]
    summary = label_items(items, reference, folder / "shard")
    assert summary.num_done == len(items), summary.causes


def _median(action: Callable[[Path], None], base: Path, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        folder = base / "run"
        folder.mkdir()
        start = time.perf_counter()
        action(folder)
        taken.append(time.perf_counter() - start)
        shutil.rmtree(folder)
    return statistics.median(taken)


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _memory_MiB() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _environment(calls: Path | None = None) -> dict[str, str]:
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {} if calls is None else {"HPCFT_CALLS": str(calls)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **told}


if __name__ == "__main__":  # the processes whose memory is measured, or that are killed
    what, folder, *numbers = sys.argv[1:]
    if what == "shard":
        print(json.dumps(_large_shard(Path(folder), *map(int, numbers))))
    else:
        _killed_shard(Path(folder), *map(int, numbers))

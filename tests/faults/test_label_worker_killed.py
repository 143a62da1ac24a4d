"""A worker that is killed anywhere: no finished label is computed twice, none is lost, all are the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from calculators import lines_of

from hpcft.labelling.journal import journal_path, list_journals, read_journals
from hpcft.labelling.label import Label, Relaxation
from hpcft.labelling.shard import finish_shard, read_shard

NUM_ITEMS = 16

Worker = subprocess.Popen[bytes]

WORKER = """
import sys
from pathlib import Path
from ase.build import bulk
from hpcft.labelling.item import Item
from hpcft.labelling.reference import Reference
from hpcft.labelling.worker import label_items

folder, attempt, num_items, workers = Path(sys.argv[1]), *map(int, sys.argv[2:])
items = []
for seed in range(num_items):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    relaxed = seed % 8 == 7
    items.append(Item.relaxation(atoms, fmax=0.05, max_steps=99) if relaxed else Item.single_point(atoms))
reference, scratch = Reference("calculators.SlowEMT"), folder / "scratch"
label_items(items, reference, folder / "shard", attempt=attempt, workers=workers, scratch=scratch)
"""


def start_worker(folder: Path, attempt: int, workers: int = 1) -> Worker:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WORKER, str(folder), str(attempt), str(NUM_ITEMS), str(workers)]
    return subprocess.Popen(command, env={**os.environ, "HPCFT_TEST_CALLS": str(folder / "calls")})


def kill_after(worker: Worker, journal: Path, num_lines: int, delay_s: float) -> bool:
    """Whether the worker still ran when it had written so many lines and a little time had passed."""
    while worker.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < num_lines):
        time.sleep(0.001)
    time.sleep(delay_s)
    worker.send_signal(signal.SIGKILL)
    return worker.wait() == -signal.SIGKILL


def wait_until_cleaned_up(folder: Path) -> None:
    """The supervisor removes its folder as the last thing that it does."""
    scratch = folder / "scratch"
    deadline = time.monotonic() + 120
    while scratch.exists() and any(scratch.iterdir()):
        if time.monotonic() > deadline:
            pytest.fail("the supervisor of a killed worker did not clean up")
        time.sleep(0.01)


def results(folder: Path) -> list[tuple[int, str, bytes]]:
    """Index, key and all numbers of every record, bit for bit."""
    finish_shard(folder / "shard")
    rows = []
    for record in read_shard(folder / "shard"):
        result = record.result
        if isinstance(result, Label):
            assert result.stress_6 is not None
            numbers = [np.float64(result.energy), result.forces_n3, result.stress_6]
        else:
            assert isinstance(result, Relaxation)
            numbers = [np.float64(result.energy_relaxed), result.relaxed.positions]
        rows.append((record.index, record.key, b"".join(number.tobytes() for number in numbers)))
    return rows


def durable_energies(folder: Path) -> list[str]:
    """The energy of every label and of every frame of a relaxation that the journals hold."""
    listing = list_journals(folder / "shard")
    entries = [*listing.items.values(), *(entry for of in listing.frames.values() for entry in of)]
    results = [entry.read().result for entry in entries]
    return [repr(result.energy) for result in results if isinstance(result, Label)]


@pytest.mark.parametrize(("seed", "workers"), [pytest.param(0, 1, marks=pytest.mark.nightly), (1, 2)])
def test_killed_at_random_moments_a_shard_ends_as_if_never_disturbed(
    tmp_path: Path, seed: int, workers: int
) -> None:
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    assert start_worker(quiet, 0).wait() == 0

    rng = random.Random(seed)
    num_kills = 0
    finished_calls: dict[str, int] = {}
    for attempt in range(4):
        worker = start_worker(disturbed, attempt, workers)
        journal = journal_path(disturbed / "shard", attempt)
        num_kills += kill_after(worker, journal, num_lines=rng.randrange(5), delay_s=rng.uniform(0, 0.06))
        wait_until_cleaned_up(disturbed)
        # Whatever the journal holds by now must never be computed again: the energies identify the calls.
        calls = Counter(lines_of(disturbed / "calls"))
        for energy in durable_energies(disturbed):
            finished_calls.setdefault(energy, calls[energy])
    assert num_kills > 0
    assert start_worker(disturbed, 9, workers).wait() == 0

    calls = Counter(lines_of(disturbed / "calls"))
    assert {energy: calls[energy] for energy in finished_calls} == finished_calls
    records = read_journals(disturbed / "shard")
    assert sorted(records) == list(range(NUM_ITEMS))
    assert all(record.done for record in records.values())
    num_extra_calls = [calls[energy] - 1 for energy in set(durable_energies(disturbed))]
    assert min(num_extra_calls) >= 0
    assert sum(num_extra_calls) <= num_kills * workers  # at most what was in hand at each kill
    assert results(disturbed) == results(quiet)

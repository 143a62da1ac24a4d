"""A published shard whose journals are gone gets one back that says the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.labelling.causes import Failure, Try
from hpcft.labelling.item import plain_structure
from hpcft.labelling.journal import Journal, Record, encode_line, journal_path, list_journals
from hpcft.labelling.label import Label, Relaxation
from hpcft.labelling.reopened import reopen_shard
from hpcft.labelling.shard import finish_shard

FILES = (
    "labels.h5",
    "relaxations.h5",
    "relaxation-frames.h5",
    "failures.json",
    "failed-outputs.gz",
    "shard.json",
)


def cell(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return plain_structure(atoms)


def label(seed: int, *, stress: bool = True) -> Label:
    rng = np.random.default_rng(seed)
    extra = {"magmoms": rng.normal(size=4), "dipole": rng.normal(size=3)}
    return Label(
        rng.normal(), "free_energy", rng.normal(size=(4, 3)), rng.normal(size=6) if stress else None, extra
    )


def records() -> Iterator[Record]:
    """Of each kind of work what there may be, a relaxation that failed on its way and a label of the ladder among them."""
    magnetic = cell(1)
    magnetic.set_initial_magnetic_moments([1.0, 0, 0, -0.5])
    yield Record(0, "0" * 64, "single-point", label(0), cell(0), 1.5, rung=1, attempt=2)
    yield Record(1, "1" * 64, "single-point", label(1, stress=False), magnetic, 0.1, found=True)
    tries = (Try(0, "scf", "no convergence", 3.25), Try(1, "crash", "SIGSEGV", 0.5))
    yield Record(
        2, "2" * 64, "single-point", Failure("scf", "no\nconvergence", "Å"), None, 4.0, attempt=3, tries=tries
    )
    relaxed = Relaxation(cell(3), cell(4), -1.0, -2.0, "energy", 2, True, 1e-3)
    for index in (3, 4):
        for step in range(2):
            key = f"{10 * index + step:064x}"
            yield Record(index, key, "single-point", label(10 * index + step), cell(step), 0.0, step=step)
    yield Record(3, "3" * 64, "relaxation", relaxed, cell(3), 9.0)
    yield Record(4, "4" * 64, "relaxation", Failure("unconverged", "2 steps"), None, 9.0)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    with Journal(journal_path(tmp_path, 2)) as journal:
        for record in records():
            journal.append(record)
    finish_shard(tmp_path, {"reference": "EMT"})
    return tmp_path


def test_the_new_journal_makes_the_very_files_that_the_old_one_made(shard: Path) -> None:
    before = {name: (shard / name).read_bytes() for name in FILES}
    failure = list_journals(shard).items[2].read()
    journal_path(shard, 2).unlink()
    reopen_shard(shard)
    assert encode_line(list_journals(shard).items[2].read()) == encode_line(failure)
    for name in FILES:
        (shard / name).unlink()
    finish_shard(shard, {"reference": "EMT"})
    assert {name: (shard / name).read_bytes() for name in FILES} == before


def test_a_journal_that_is_still_there_is_left_alone(shard: Path) -> None:
    before = journal_path(shard, 2).read_bytes()
    reopen_shard(shard)
    assert [path.name for path in shard.glob("journal-*")] == [journal_path(shard, 2).name]
    assert journal_path(shard, 2).read_bytes() == before

"""Fault 32: a calculation that never ends is killed with everything it started, and the shard goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ase import Atoms
from calculators import lines_of

from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Item
from hpcft.labelling.journal import read_journals
from hpcft.labelling.reference import Reference
from hpcft.labelling.worker import label_items


def hanging(folder: Path) -> Reference:
    arguments = {"calls": str(folder / "calls"), "pids": str(folder / "pids")}
    return Reference("calculators.HangingEMT", arguments, time_limit_s=2.0)


def test_a_hanging_label_is_killed_with_all_its_processes_and_the_others_are_done(
    tmp_path: Path, metals: Callable[..., list[Atoms]], wait_until_gone: Callable[[Iterable[int]], None]
) -> None:
    items = [Item.single_point(atoms) for atoms in metals("Cu", "Au", "Ni")]
    summary = label_items(items, hanging(tmp_path), tmp_path / "shard", scratch=tmp_path / "scratch")
    assert (summary.num_done, summary.causes) == (2, {"time-limit": 1})
    records = read_journals(tmp_path / "shard")
    assert [records[index].done for index in range(3)] == [True, False, True]
    assert isinstance(records[1].result, Failure)
    assert "now I hang" in records[1].result.output
    pids = [int(line) for line in lines_of(tmp_path / "pids")]
    assert len(pids) == 4
    wait_until_gone(pids)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_hanging_step_of_a_relaxation_is_killed_too(
    tmp_path: Path, metals: Callable[..., list[Atoms]], wait_until_gone: Callable[[Iterable[int]], None]
) -> None:
    items = [Item.relaxation(atoms, fmax=0.01, max_steps=50) for atoms in metals("Au", "Pt")]
    summary = label_items(items, hanging(tmp_path), tmp_path / "shard")
    assert (summary.num_done, summary.causes) == (1, {"time-limit": 1})
    wait_until_gone([int(line) for line in lines_of(tmp_path / "pids")])

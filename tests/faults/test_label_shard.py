"""A shard of labels over several attempts: what is finished stays, and what is known is found."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from calculators import lines_of

from hpcft.errors import UserError
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Journal, Record, encode_line, journal_path, read_journal, read_journals
from hpcft.labelling.label import Label, Relaxation
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import finish_shard, read_shard
from hpcft.labelling.store import LabelStore
from hpcft.labelling.worker import label_items
from hpcft.storage.structures import read_structures

Metals = Callable[..., list[Atoms]]


class Stop(Exception):
    """Ends a run in the middle."""


@pytest.fixture
def counting(tmp_path: Path) -> Reference:
    return Reference("calculators.CountingEMT", {"calls": str(tmp_path / "calls")})


@pytest.fixture
def records(tmp_path: Path, counting: Reference, metals: Metals) -> list[Record]:
    """Finished records of three single-points, from a folder of their own."""
    items = [Item.single_point(atoms) for atoms in metals("Cu", "Ni", "Au")]
    label_items(items, counting, tmp_path / "source")
    return list(read_journals(tmp_path / "source").values())


def stop_after(number: int) -> Callable[[Record], None]:
    def on_progress(record: Record) -> None:
        if record.index == number - 1:
            raise Stop

    return on_progress


def test_labels_are_what_ase_itself_computes_to_the_last_bit(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    structures = metals("Cu", "Pt")
    label_items([Item.single_point(atoms) for atoms in structures], counting, tmp_path / "shard")
    finish_shard(tmp_path / "shard")
    for atoms, labelled in zip(structures, read_structures(tmp_path / "shard" / "labels.h5"), strict=True):
        atoms.calc = EMT()
        np.testing.assert_array_equal(labelled.positions, atoms.positions)
        np.testing.assert_array_equal(labelled.arrays["REF_forces"], atoms.get_forces())
        np.testing.assert_array_equal(labelled.info["REF_stress"], atoms.get_stress())
        assert labelled.info["REF_energy"] == atoms.get_potential_energy(force_consistent=True)


def test_a_second_attempt_computes_only_what_the_first_left(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    items = [Item.single_point(atoms) for atoms in metals("Cu", "Ni", "Au", "Ag")]
    with pytest.raises(Stop):
        label_items(items, counting, tmp_path / "shard", on_progress=stop_after(3))
    summary = label_items(items, counting, tmp_path / "shard", attempt=1)
    assert (summary.num_done, summary.num_computed) == (4, 1)
    assert len(lines_of(tmp_path / "calls")) == 4


def test_a_known_label_is_taken_over_instead_of_computed(
    tmp_path: Path, counting: Reference, metals: Metals, records: list[Record]
) -> None:
    known = {record.key: record for record in records}
    items = [Item.single_point(atoms) for atoms in reversed(metals("Cu", "Ni", "Au"))]
    summary = label_items(items, counting, tmp_path / "shard", known=known)
    assert (summary.num_done, summary.num_computed, summary.num_found) == (3, 0, 3)
    assert len(lines_of(tmp_path / "calls")) == 3
    finish_shard(tmp_path / "shard")
    assert [record.key for record in read_shard(tmp_path / "shard")] == [r.key for r in reversed(records)]


def test_equal_structures_in_one_shard_are_paid_for_once(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    atoms = metals("Cu")[0]
    summary = label_items([Item.single_point(atoms)] * 3, counting, tmp_path / "shard")
    assert (summary.num_done, summary.num_computed, summary.num_found) == (3, 1, 2)
    assert len(lines_of(tmp_path / "calls")) == 1


def test_a_supervisor_that_is_killed_ends_the_run_and_blames_no_structure(
    tmp_path: Path, metals: Metals, wait_until_gone: Callable[[list[int]], None]
) -> None:
    gated = Reference(
        "calculators.GatedEMT", {"calls": str(tmp_path / "calls"), "gate": str(tmp_path / "gate")}
    )
    items = [Item.single_point(atoms) for atoms in metals("Cu", "Ni")]
    family: list[psutil.Process] = []

    def kill_supervisor(record: Record) -> None:
        family.extend(psutil.Process().children(recursive=True))
        family[0].kill()

    with pytest.raises(RuntimeError, match="supervises"):
        label_items(
            items, gated, tmp_path / "shard", scratch=tmp_path / "scratch", on_progress=kill_supervisor
        )
    assert sorted(read_journals(tmp_path / "shard")) == [0]
    assert len(family) == 2
    assert list((tmp_path / "scratch").iterdir()) == []
    wait_until_gone([process.pid for process in family])
    (tmp_path / "gate").touch()
    assert label_items(items, gated, tmp_path / "shard", attempt=1).num_done == 2


def test_programs_that_a_killed_supervisor_had_started_do_not_live_on(
    tmp_path: Path, metals: Metals, wait_until_gone: Callable[[list[int]], None]
) -> None:
    pids = tmp_path / "pids"
    hanging = Reference("calculators.HangingEMT", {"calls": str(tmp_path / "calls"), "pids": str(pids)})

    def kill_supervisor() -> None:
        while len(lines_of(pids)) < 4:
            time.sleep(0.01)
        psutil.Process().children()[0].kill()

    killer = threading.Thread(target=kill_supervisor)
    killer.start()
    with pytest.raises(RuntimeError, match="supervises"):
        label_items([Item.single_point(metals("Au")[0])], hanging, tmp_path / "shard")
    killer.join()
    wait_until_gone([int(pid) for pid in lines_of(pids)])


def test_a_journal_of_more_than_two_gigabytes_loses_nothing_but_its_torn_line(
    tmp_path: Path, records: list[Record]
) -> None:
    path = journal_path(tmp_path, 0)
    whole = encode_line(records[0])
    with path.open("wb") as file:
        file.seek(5 << 29)  # zeros that take no space
        file.write(b"\n" + whole + b'{"crc32":"torn')
    with Journal(path) as journal:
        journal.append(records[1])
    with path.open("rb") as file:
        file.seek(5 << 29)
        assert file.read() == b"\n" + whole + encode_line(records[1])


def test_failures_are_tried_again_only_for_the_causes_asked_for(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    items = [Item.single_point(atoms) for atoms in metals("Si", "Cu")]
    assert label_items(items, counting, tmp_path / "shard").causes == {"bad-input": 1}
    assert label_items(items, counting, tmp_path / "shard", attempt=1).num_computed == 0
    again = label_items(items, counting, tmp_path / "shard", attempt=2, retry_causes=["bad-input"])
    assert (again.num_computed, again.num_failed) == (1, 1)


def test_relaxations_come_with_start_and_end_and_unconverged_ones_only_as_failures(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    structures = metals("Cu", "Cu")
    items = [
        Item.relaxation(structures[0], fmax=0.01, max_steps=50),
        Item.relaxation(structures[1], fmax=1e-9, max_steps=2),
        Item.single_point(structures[1]),
    ]
    summary = label_items(items, counting, tmp_path / "shard")
    assert (summary.num_done, summary.causes) == (2, {"unconverged": 1})
    finish_shard(tmp_path / "shard")
    relaxation = read_shard(tmp_path / "shard")[0].result
    assert isinstance(relaxation, Relaxation)
    assert relaxation.converged
    np.testing.assert_array_equal(relaxation.start.positions, structures[0].positions)
    assert relaxation.energy_relaxed < relaxation.energy_start
    assert relaxation.max_force < 0.01
    failures = json.loads((tmp_path / "shard" / "failures.json").read_text())
    assert [(failed["index"], failed["cause"]) for failed in failures] == [(1, "unconverged")]


def test_a_relaxed_cell_is_published_beside_one_that_stayed(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    structures = metals("Cu", "Cu")
    items = [
        Item.relaxation(atoms, fmax=0.02, max_steps=80, with_cell=with_cell)
        for atoms, with_cell in zip(structures, (True, False), strict=True)
    ]
    label_items(items, counting, tmp_path / "shard")
    finish_shard(tmp_path / "shard")
    moved, stayed = (record.result for record in read_shard(tmp_path / "shard"))
    assert isinstance(moved, Relaxation)
    assert isinstance(stayed, Relaxation)
    assert np.abs(moved.relaxed.cell.array - structures[0].cell.array).max() > 1e-3
    np.testing.assert_array_equal(moved.start.cell.array, structures[0].cell.array)
    np.testing.assert_array_equal(stayed.relaxed.cell.array, structures[1].cell.array)


def test_structures_with_and_without_stress_share_a_shard(
    tmp_path: Path, counting: Reference, metals: Metals
) -> None:
    crystal, cluster = metals("Cu", "Cu")
    cluster.pbc = False
    cluster.center(vacuum=5.0)
    label_items([Item.single_point(crystal), Item.single_point(cluster)], counting, tmp_path / "shard")
    finish_shard(tmp_path / "shard")
    with_stress, without = (record.result for record in read_shard(tmp_path / "shard"))
    assert isinstance(with_stress, Label)
    assert isinstance(without, Label)
    assert with_stress.stress_6 is not None
    assert without.stress_6 is None


def test_finishing_a_shard_again_gives_the_same_bytes(tmp_path: Path, records: list[Record]) -> None:
    def digests() -> dict[str, str]:
        finish_shard(tmp_path / "source")
        names = ("labels.h5", "failures.json", "shard.json")
        return {name: hashlib.sha256((tmp_path / "source" / name).read_bytes()).hexdigest() for name in names}

    assert digests() == digests()


def test_a_shard_without_any_item_finishes_too(tmp_path: Path, counting: Reference) -> None:
    label_items([], counting, tmp_path / "shard")
    finish_shard(tmp_path / "shard")
    assert read_shard(tmp_path / "shard") == []


def test_a_folder_with_labels_of_other_structures_is_refused(
    tmp_path: Path, counting: Reference, metals: Metals, records: list[Record]
) -> None:
    items = [Item.single_point(atoms) for atoms in metals("Pt", "Pt", "Pt")]
    with pytest.raises(UserError, match="other structures"):
        label_items(items, counting, tmp_path / "source", attempt=1)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Reference("calculators.CountingEMTT"), "Did you mean 'CountingEMT'"),
        (Reference("no_such_module.EMT"), "not installed"),
        (Reference("calculators.CountingEMT", {"cals": "x"}), "Did you mean 'calls'"),
        (Reference("calculators.broken_factory", {"a": 1}), r"cannot work with \['a'\]"),
    ],
)
def test_a_wrong_reference_is_the_users_to_correct_and_no_failure_of_an_item(
    tmp_path: Path, metals: Metals, reference: Reference, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        label_items([Item.single_point(metals("Cu")[0])], reference, tmp_path / "shard")
    assert read_journals(tmp_path / "shard") == {}


@pytest.mark.parametrize("num_bytes_left", [1, 100, -1])
def test_a_torn_last_line_is_ignored_and_the_next_record_is_sound(
    tmp_path: Path, records: list[Record], num_bytes_left: int
) -> None:
    path = journal_path(tmp_path / "source", 0)
    content = path.read_bytes()
    start_of_last = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[:start_of_last] + content[start_of_last:-1][:num_bytes_left])
    assert sorted(read_journals(tmp_path / "source")) == [0, 1]
    with Journal(path) as journal:
        journal.append(records[2])
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_costs_only_its_item(tmp_path: Path, records: list[Record]) -> None:
    path = journal_path(tmp_path / "source", 0)
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"1", b"2", 1)
    path.write_bytes(b"\n".join(lines))
    sound, num_damaged = read_journal(path)
    assert [record.index for record in sound] == [0, 2]
    assert num_damaged == 1


def test_a_full_disk_leaves_the_journal_as_it_was(
    tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal_path(tmp_path / "source", 0)
    before = path.read_bytes()
    write = os.write
    with Journal(path) as journal:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]) and _disk_is_full())
        with pytest.raises(OSError, match="space"):
            journal.append(records[0])
    assert path.read_bytes() == before


def _disk_is_full() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_several_attempts_the_first_label_wins_and_a_label_beats_a_failure(
    tmp_path: Path, counting: Reference, metals: Metals, records: list[Record]
) -> None:
    items = [Item.single_point(metals("Si")[0])]
    label_items(items, counting, tmp_path / "shard", attempt=0)
    failed = read_journals(tmp_path / "shard")[0]
    for attempt, record in [(1, records[0]), (2, replace(records[1], index=0)), (10, failed)]:
        with Journal(journal_path(tmp_path / "shard", attempt)) as journal:
            journal.append(record)
    assert read_journals(tmp_path / "shard")[0].key == records[0].key


def test_a_label_store_finds_labels_of_all_registered_shards_again(
    tmp_path: Path, counting: Reference, metals: Metals, records: list[Record]
) -> None:
    finish_shard(tmp_path / "source")
    more = [Item.relaxation(atoms, fmax=0.05, max_steps=50) for atoms in metals("Ni", "Pt")]
    label_items(more, counting, tmp_path / "more")
    finish_shard(tmp_path / "more")
    store = LabelStore(tmp_path / "store")
    keys = [record.key for record in records] + [item_key(item, counting) for item in more]
    assert store.find(keys) == {}
    store.register(tmp_path / "source")
    assert len(store.find(keys)) == 3
    assert store.register_below(tmp_path) == 2
    found = LabelStore(tmp_path / "store").find([*keys, "unknown"])
    assert set(found) == set(keys)
    original, again = records[0].result, found[keys[0]].result
    assert isinstance(original, Label)
    assert isinstance(again, Label)
    assert (again.energy, again.energy_kind) == (original.energy, original.energy_kind)
    np.testing.assert_array_equal(again.forces_n3, original.forces_n3)


def test_a_store_that_moved_with_its_shards_still_finds_them_and_a_lost_shard_counts_as_unknown(
    tmp_path: Path, records: list[Record]
) -> None:
    finish_shard(tmp_path / "source")
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "source").rename(project / "source")
    LabelStore(project / "store").register(project / "source")
    project.rename(tmp_path / "moved")
    store = LabelStore(tmp_path / "moved" / "store")
    assert len(store.find([records[0].key])) == 1
    (tmp_path / "moved" / "source" / "shard.json").unlink()
    assert store.find([records[0].key]) == {}


def test_an_unfinished_shard_cannot_be_registered(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(UserError, match="finish_shard"):
        LabelStore(tmp_path / "store").register(tmp_path / "source")

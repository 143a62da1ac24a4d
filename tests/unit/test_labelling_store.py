"""Looking keys up in a label store: one at a time or all at once, the answers are the same."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from hpcft.labelling import label_index
from hpcft.labelling.exports import contents, labelled_structures
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.label import Label
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import SHARD_FILE, finish_shard, read_records
from hpcft.labelling.store import LabelStore
from hpcft.labelling.worker import label_items
from hpcft.storage.atomic import write_json


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def shard(folder: Path, labels: list[str], relaxations: list[str] | None = None) -> Path:
    """A shard of which only the list of its keys is there."""
    folder.mkdir(parents=True)
    write_json(folder / SHARD_FILE, {"labels": labels, "relaxations": relaxations or []})
    return folder.resolve()


@pytest.fixture(params=["few at a time", "all at once", "in small blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_index, "_DENSE", 0 if request.param == "few at a time" else 10**9)
    if request.param == "few at a time":
        monkeypatch.delattr(label_index, "_many")
    else:
        monkeypatch.delattr(label_index, "_few")
    if request.param == "in small blocks":
        monkeypatch.setattr(label_index, "_BLOCK", 7)


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path / "store")


@pytest.mark.usefixtures("way")
def test_every_key_of_many_shards_in_several_indices_is_located_and_no_other(
    tmp_path: Path, store: LabelStore
) -> None:
    expected = {}
    for number in range(6):
        labels = [key(i) for i in range(10 * number, 10 * number + 10)]
        place = shard(tmp_path / f"round-{number % 2}" / f"task-{number}", labels[:8], labels[8:])
        expected |= dict.fromkeys(labels, place)
    for folder in ("round-0", "round-1"):
        assert store.register_below(tmp_path / folder) == 3
    unknown = [key(i) for i in range(60, 90)]
    assert store.locate([*reversed(expected), *unknown]) == expected
    assert store.locate([key(3), key(3), key(70)]) == {key(3): expected[key(3)]}
    assert store.locate(unknown) == {}
    assert store.locate([]) == {}


@pytest.mark.usefixtures("way")
def test_keys_that_begin_alike_are_told_apart(tmp_path: Path, store: LabelStore) -> None:
    alike = [f"{'a' * 63}{digit}" for digit in "0123456789"]
    places = {each: shard(tmp_path / "shards" / each[-1], [each]) for each in alike[::2]}
    store.register_below(tmp_path / "shards")
    assert store.locate(alike) == places
    assert store.locate(alike[1::2]) == {}


@pytest.mark.usefixtures("way")
def test_what_cannot_be_a_key_is_unknown(tmp_path: Path, store: LabelStore) -> None:
    place = shard(tmp_path / "shards" / "0", [key(0)])
    store.register_below(tmp_path / "shards")
    odd = ["", "unknown", key(0)[:-1], key(0) + "0", key(0).upper(), "ä" * 64, "\0" * 64]
    assert store.locate([*odd, key(0)]) == {key(0): place}


@pytest.mark.usefixtures("way")
def test_a_key_in_several_shards_is_located_in_one_that_is_still_there(
    tmp_path: Path, store: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    shared = [key(i) for i in range(5)]
    places = [shard(tmp_path / "shards" / str(n), [*shared, key(100 + n)]) for n in range(3)]
    store.register_below(tmp_path / "shards")
    (places[0] / SHARD_FILE).unlink()
    (places[2] / SHARD_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        found = store.locate([*shared, *(key(100 + n) for n in range(3))])
    assert found == dict.fromkeys([*shared, key(101)], places[1])
    assert str(places[0]) in caplog.text
    assert store.locate(shared, passed_over={places[1]}) == {}


@pytest.mark.parametrize("damage", [b"", b"torn", b"no file of hpcft" * 100])
def test_a_damaged_index_of_one_campaign_does_not_keep_the_others_from_their_labels(
    damage: bytes, tmp_path: Path, store: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    places = [shard(tmp_path / name / "0", [key(number)]) for number, name in enumerate("ab")]
    store.register_below(tmp_path / "a")
    [index] = store.folder.iterdir()
    store.register_below(tmp_path / "b")
    index.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert store.locate([key(0), key(1)]) == {key(1): places[1]}
    assert str(index) in caplog.text
    assert store.listed() == {places[1]: {key(1)}}
    assert list(store.shards()) == [places[1]]
    store.register_below(tmp_path / "a")
    assert store.locate([key(0)]) == {key(0): places[0]}


def test_registering_the_same_folder_again_replaces_what_it_had(tmp_path: Path, store: LabelStore) -> None:
    place = shard(tmp_path / "shards" / "0", [key(0)])
    store.register(place)
    write_json(place / SHARD_FILE, {"labels": [key(0), key(1)], "relaxations": [key(2)]})
    store.register(place)
    assert store.locate([key(0), key(1), key(2)]) == dict.fromkeys([key(0), key(1), key(2)], place)
    assert store.listed() == {place: {key(0), key(1), key(2)}}
    assert list(store.shards()) == [place]


def test_a_shard_without_any_label_does_not_hinder_the_others(tmp_path: Path, store: LabelStore) -> None:
    empty = shard(tmp_path / "shards" / "0", [])
    assert store.register_below(tmp_path / "shards") == 1
    assert store.locate([key(0)]) == {}
    full = shard(tmp_path / "shards" / "1", [key(0)])
    store.register_below(tmp_path / "shards")
    assert store.locate([key(0)]) == {key(0): full}
    assert store.listed() == {empty: set(), full: {key(0)}}


def test_the_frames_of_a_relaxation_are_found_as_labels_and_exported_like_any_other(
    tmp_path: Path, store: LabelStore
) -> None:
    reference = Reference("ase.calculators.emt.EMT")
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    label_items([Item.relaxation(atoms, fmax=0.05, max_steps=50)], reference, tmp_path / "relaxed")
    finish_shard(tmp_path / "relaxed", reference.provenance())
    store.register(tmp_path / "relaxed")
    start = item_key(Item.single_point(atoms), reference)
    known = store.find([start])
    assert isinstance(known[start].result, Label)
    assert known[start].step is None, "it is no frame of what it is found for"
    summary = label_items([Item.single_point(atoms)], reference, tmp_path / "single", known=known)
    assert (summary.num_found, summary.num_computed) == (1, 0)
    finish_shard(tmp_path / "single", reference.provenance())
    store.register(tmp_path / "single")
    exported = list(labelled_structures(store, reference))
    assert len(exported) == sum(contents(store).labels.values()) > 2
    assert [structure.info["key"] for structure in exported].count(start) == 1
    assert contents(store).num_relaxations == 1
    np.testing.assert_array_equal(
        next(a for a in exported if a.info["key"] == start).arrays["REF_forces"],
        known[start].result.forces_n3,
    )


def test_of_a_large_shard_no_more_is_made_than_is_asked_for_and_damage_is_noticed_all_the_same(
    tmp_path: Path, store: LabelStore, caplog: pytest.LogCaptureFixture
) -> None:
    reference = Reference("ase.calculators.emt.EMT")
    structures = [bulk("Cu", a=3.5 + number / 100) for number in range(20)]
    items = [Item.single_point(atoms) for atoms in structures]
    label_items(items, reference, tmp_path / "many")
    finish_shard(tmp_path / "many")
    store.register(tmp_path / "many")
    keys = [item_key(item, reference) for item in items]
    [record] = read_records(tmp_path / "many", {keys[7]})
    assert record.index == 7
    assert record.atoms == items[7].atoms
    assert store.find([keys[7]])[keys[7]].index == 7
    file = tmp_path / "many" / "labels.h5"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # far from what is read
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.find([keys[7]]) == {}
    assert "cannot be read" in caplog.text

"""Fault 20: a run killed while it writes its trajectory keeps a right committed prefix, and resumed ends the same.

Run as a script this file is the victim: it goes on from the committed prefix in the given folder to the end.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft.errors import UserError
from hpcft.storage.atomic import (
    TEMPORARY_PREFIX,
    create_json_once,
    publish_once,
    read_json,
    remove_leftovers,
    temporary_beside,
    write_json,
)
from hpcft.storage.seal import DamagedFile
from hpcft.storage.trajectory import (
    FrameBlock,
    Trajectory,
    consolidate,
    delete_segments,
    list_segments,
    read_segment,
    segment_path,
    set_aside_uncommitted,
    write_segment,
)

NUM_SEGMENTS, FRAMES, ATOMS, REPLICAS = 24, 10, 400, (0, 5)
NUM_KILLS = 10


def advance(positions: Any, generator: np.random.Generator, replica: int, segment: int) -> FrameBlock:
    """A random walk that depends on all that came before, as dynamics do."""
    steps = np.arange(segment * FRAMES + 1, (segment + 1) * FRAMES + 1)
    moves = generator.normal(size=(FRAMES, ATOMS, 3))
    return FrameBlock(
        replica=replica,
        numbers=np.full(ATOMS, 14),
        masses=np.full(ATOMS, 28.085),
        pbc=np.array([True, True, True]),
        step=steps,
        time_fs=steps * 2.0,
        positions=positions + np.cumsum(moves, axis=0),
        velocities=moves,
        forces=-moves,
        cell=np.tile(np.eye(3) * 20, (FRAMES, 1, 1)),
        potential_energy=moves.sum(axis=(1, 2)),
        temperature_K=(moves**2).mean(axis=(1, 2)),
        observables={"sane": np.ones(FRAMES, dtype=bool)},
    )


def run_to_the_end(folder: Path) -> None:
    """Resume from what is committed, write what is missing."""
    set_aside_uncommitted(folder)
    segments = list_segments(folder)
    checkpoint: dict[str, Any] = read_segment(segments[-1], frames=False)[1] if segments else {}
    walkers: dict[int, tuple[Any, np.random.Generator]] = {}
    for replica in REPLICAS:
        generator = np.random.default_rng(replica)
        positions = np.zeros((ATOMS, 3))
        if checkpoint:
            positions = checkpoint[str(replica)]["positions"]
            generator.bit_generator.state = checkpoint[str(replica)]["generator"]
        walkers[replica] = (positions, generator)
    for number in range(len(segments), NUM_SEGMENTS):
        blocks = []
        for replica, (positions, generator) in walkers.items():
            blocks.append(advance(positions, generator, replica, number))
            walkers[replica] = (blocks[-1].positions[-1], generator)
        state = {
            str(replica): {"positions": positions, "generator": generator.bit_generator.state}
            for replica, (positions, generator) in walkers.items()
        }
        assert write_segment(segment_path(folder, number), blocks, state)


def assert_same_segment(found: Path, expected: Path) -> None:
    blocks, checkpoint = read_segment(found)
    others, other_checkpoint = read_segment(expected)
    np.testing.assert_equal(checkpoint, other_checkpoint)
    assert [block.replica for block in blocks] == [block.replica for block in others]
    for block, other in zip(blocks, others, strict=True):
        np.testing.assert_equal(block.static(), other.static())
        np.testing.assert_equal(block.per_frame(), other.per_frame())
        np.testing.assert_equal(block.observables, other.observables)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(folder)
    return folder


@pytest.fixture
def two_segments(tmp_path: Path, undisturbed: Path) -> Path:
    for number in range(2):
        segment_path(tmp_path, number).write_bytes(segment_path(undisturbed, number).read_bytes())
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    """The victim, as soon as it has loaded its libraries."""
    victim = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    return victim


def test_after_kills_at_random_moments_the_run_ends_with_the_trajectory_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: Path
) -> None:
    chance = random.Random(20)
    committed, num_cut_short = 0, 0
    for _ in range(NUM_KILLS):
        with start(tmp_path) as victim:
            goal = committed + chance.randrange(4)
            while victim.poll() is None and len(list(tmp_path.glob("segment-*"))) < goal:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.04))  # into the segment after that
            victim.kill()
        num_cut_short += victim.returncode < 0
        prefix = list_segments(tmp_path)
        assert len(prefix) >= committed  # nothing that was committed is ever lost
        for path in prefix[committed:]:
            assert_same_segment(path, undisturbed / path.name)
        committed = len(prefix)
        published = [path for path in tmp_path.iterdir() if not path.name.startswith(TEMPORARY_PREFIX)]
        assert sorted(published) == prefix  # a torn file never stands under a segment's name
    assert num_cut_short > 0

    with start(tmp_path) as victim:
        pass
    assert victim.returncode == 0
    for folder, name in {tmp_path: "killed.h5", undisturbed: "undisturbed.h5"}.items():
        consolidate(list_segments(folder), tmp_path / name, {})
    with Trajectory(tmp_path / "killed.h5") as found, Trajectory(tmp_path / "undisturbed.h5") as expected:
        assert found.replicas == expected.replicas == list(REPLICAS)
        np.testing.assert_equal(found.checkpoint(), expected.checkpoint())
        for replica in REPLICAS:
            for name in (*advance(0, np.random.default_rng(), 0, 0).per_frame(), "sane"):
                np.testing.assert_array_equal(
                    found.array(replica, name), expected.array(replica, name), strict=True
                )


def test_temporary_files_of_killed_writers_are_ignored_and_can_be_removed(two_segments: Path) -> None:
    before = list_segments(two_segments)
    torn = temporary_beside(segment_path(two_segments, 2))
    torn.write_bytes(before[0].read_bytes()[:5000])
    assert list_segments(two_segments) == before
    assert set_aside_uncommitted(two_segments) == []
    assert remove_leftovers(two_segments) == [torn]
    assert sorted(two_segments.iterdir()) == before


def cut(content: bytearray, chance: random.Random) -> bytes:
    return bytes(content[: chance.randrange(len(content))])


def flip_a_bit(content: bytearray, chance: random.Random) -> bytes:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def zero_a_page(content: bytearray, chance: random.Random) -> bytes:
    start = 4096 * chance.randrange(len(content) // 4096)
    content[start : start + 4096] = bytes(4096)
    return bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, zero_a_page])
def test_a_damaged_last_segment_ends_the_prefix_and_its_number_can_be_written_again(
    two_segments: Path, undisturbed: Path, damage: Callable[[bytearray, random.Random], bytes]
) -> None:
    chance = random.Random(0)
    first, last = list_segments(two_segments)
    sound = last.read_bytes()
    for _ in range(20):
        damaged = damage(bytearray(sound), chance)
        if damaged == sound or damaged[512:] == sound[512:]:
            continue  # a zeroed page of zeros, or a changed filler of the first block
        last.write_bytes(damaged)
        assert list_segments(two_segments) == [first]
        with pytest.raises(DamagedFile, match=r"segment-0001.h5"):
            read_segment(last)
    (aside,) = set_aside_uncommitted(two_segments)
    assert aside.name.startswith("segment-0001.h5.set-aside-")
    blocks, checkpoint = read_segment(segment_path(undisturbed, 1))
    assert write_segment(last, blocks, checkpoint)
    assert list_segments(two_segments) == [first, last]


def test_a_gap_ends_the_prefix_and_what_stands_behind_it_is_set_aside(two_segments: Path) -> None:
    first, second = list_segments(two_segments)
    second.rename(segment_path(two_segments, 3))
    assert list_segments(two_segments) == [first]
    (aside,) = set_aside_uncommitted(two_segments)
    assert aside.name.startswith("segment-0003.h5.set-aside-")


def test_damage_in_the_middle_is_found_before_a_run_resumes(tmp_path: Path, undisturbed: Path) -> None:
    for number in range(4):
        content = bytearray(segment_path(undisturbed, number).read_bytes())
        content[9000] ^= number == 1
        segment_path(tmp_path, number).write_bytes(content)
    with pytest.raises(DamagedFile, match=r"segment-0001.h5 is damaged"):
        consolidate(list_segments(tmp_path), tmp_path / "md.h5", {})
    assert len(set_aside_uncommitted(tmp_path)) == 3
    assert list_segments(tmp_path) == [segment_path(tmp_path, 0)]


def test_segments_are_deleted_from_the_end_so_that_a_kill_in_between_leaves_a_prefix(
    two_segments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = list_segments(two_segments)
    deleted: list[Path] = []
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: deleted.append(path))
    delete_segments(two_segments)
    assert deleted == [last, first]


def refuse_links(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "no hard links here", str(target))


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_two_attempts_at_a_segment_the_second_changes_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_links)
    path = segment_path(tmp_path, 0)
    ours, theirs = (advance(np.zeros(3), np.random.default_rng(seed), 0, 0) for seed in (1, 2))
    assert write_segment(path, [ours], {"attempt": 1}) is True
    content = path.read_bytes()
    assert write_segment(path, [theirs], {"attempt": 2}) is False
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_whose_answer_the_network_lost_counts_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_then_repeat(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_then_repeat)
    temporary = temporary_beside(tmp_path / "final")
    temporary.write_text("ours")
    assert publish_once(temporary, tmp_path / "final") is True
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_many_writers_of_a_record_exactly_one_is_told_that_it_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_links)
    outcomes = [create_json_once(tmp_path / "lease.json", {"host": index}) for index in range(5)]
    assert outcomes == [True, False, False, False, False]
    assert read_json(tmp_path / "lease.json") == {"host": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_a_record_is_replaced_whole_with_keys_in_order(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", {"b": 1, "a": "Å"})
    write_json(tmp_path / "record.json", {"b": 2, "a": [1.5, None]})
    assert (tmp_path / "record.json").read_text() == '{\n "a": [\n  1.5,\n  null\n ],\n "b": 2\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    "content, what", [(b"", "is empty"), (b'{"a": 1', "is not valid JSON"), (b"\xff\xfe{", "is not")]
)
def test_a_damaged_record_is_named_with_its_remedy(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(UserError, match=f"record.json {what}.*[Rr]estore it"):
        read_json(tmp_path / "record.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


if __name__ == "__main__":
    print("ready", flush=True)
    run_to_the_end(Path(sys.argv[1]))

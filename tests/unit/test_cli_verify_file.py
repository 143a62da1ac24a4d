"""hpcft verify of one HDF5 file or a folder of segments, and --repair: what can be proven, and never a wrong number."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase.build import bulk

from hpcft.cli.main import main
from hpcft.storage.atomic import temporary_beside
from hpcft.storage.repair import repair
from hpcft.storage.seal import DamagedFile, write_seal
from hpcft.storage.structures import write_structures
from hpcft.storage.trajectory import (
    FrameBlock,
    Trajectory,
    consolidate,
    delete_segments,
    list_segments,
    segment_path,
    write_h5md_view,
    write_segment,
)

SEGMENTS, FRAMES, ATOMS, REPLICAS = 5, 40, 120, (0, 7)
NUM_FRAMES = SEGMENTS * FRAMES
PROVENANCE = {"model": "abc", "seed": 5, "versions": {"torch": "2"}}
CHECKPOINT: dict[str, Any] = {"0000": {"random": {"state": 1 << 100}, "velocities": np.arange(30.0)}}


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Hpcft = Callable[..., Said]


@pytest.fixture
def hpcft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpcft:
    """The command line, with its exit codes."""

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["hpcft", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, re.sub(r"\s+", " ", said.err))

    return run


def block(replica: int, segment: int) -> FrameBlock:
    random = np.random.default_rng([replica, segment])
    steps = np.arange(segment * FRAMES, (segment + 1) * FRAMES)
    vectors = random.normal(size=(3, FRAMES, ATOMS, 3)).astype(np.float32)
    return FrameBlock(
        replica=replica,
        numbers=np.full(ATOMS, 14),
        masses=np.full(ATOMS, 28.085),
        pbc=np.array([True, True, True]),
        step=steps * 10,
        time_fs=steps * 25.0,
        positions=vectors[0],
        velocities=vectors[1],
        forces=vectors[2],
        cell=np.tile(np.eye(3), (FRAMES, 1, 1)) * random.normal(),
        potential_energy=random.normal(size=FRAMES),
        temperature_K=random.normal(size=FRAMES),
        observables={"descriptor": random.normal(size=(FRAMES, 16)), "sane": np.ones(FRAMES, dtype=bool)},
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has committed its segments."""
    folder = tmp_path_factory.mktemp("run")
    for number in range(SEGMENTS):
        write_segment(
            segment_path(folder, number), [block(replica, number) for replica in REPLICAS], CHECKPOINT
        )
    return folder


@pytest.fixture(scope="module")
def sound(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "md.h5"
    consolidate(list_segments(run_folder), path, PROVENANCE)
    return path


@pytest.fixture
def trajectory(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    (tmp_path / "md.h5").write_bytes(sound.read_bytes())
    return tmp_path / "md.h5"


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """Another."""
    (tmp_path / "run").mkdir()
    for path in list_segments(run_folder):
        (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "run"


def change(path: Path, where: int, what: bytes | None = None) -> None:
    content = bytearray(path.read_bytes())
    what = bytes([content[where] ^ 1]) if what is None else what
    content[where : where + len(what)] = what
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def place(path: Path, dataset: str, chunk: int = 0) -> Any:
    with h5py.File(path) as file:
        return file[dataset].id.get_chunk_info(chunk)


def assert_frames_are_those_of(found: Path, original: Path) -> dict[int, int]:
    """Every replica a prefix of the original to the bit, and all else as it was; returns how long the prefixes are."""
    with Trajectory(found) as new, Trajectory(original) as old:
        for replica in new:
            count = new.num_frames(replica)
            for name in ("numbers", "masses", "pbc"):
                np.testing.assert_array_equal(new.array(replica, name), old.array(replica, name), strict=True)
            for name in (*block(0, 0).per_frame(), *old.observable_names(replica)):
                expected = old.array(replica, name, slice(count))
                np.testing.assert_array_equal(new.array(replica, name), expected, strict=True)
        return {replica: new.num_frames(replica) for replica in new}


# What is sound


def test_a_sound_file_of_any_kind_is_summarised_in_one_line(
    hpcft: Hpcft, run_folder: Path, sound: Path, tmp_path: Path
) -> None:
    write_structures(tmp_path / "labels.h5", [bulk("Cu")] * 4)
    write_h5md_view(sound, 7, tmp_path / "view.h5md")
    expected = {
        sound: "trajectory, 2 replicas, 400 frames, up to step 1990, ",
        segment_path(run_folder, 1): "segment, 2 replicas, 80 frames, up to step 790, ",
        tmp_path / "labels.h5": "structures, 4 structures, ",
        tmp_path / "view.h5md": "view, ",
    }
    for path, contents in expected.items():
        said = hpcft("verify", path)
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith(f"{path}: all is well ({contents}")
        assert said.out.count("\n") == 1


def test_for_programs_the_same_is_json(hpcft: Hpcft, sound: Path, trajectory: Path) -> None:
    report = json.loads(hpcft("verify", sound, "--json").out)
    size = sound.stat().st_size
    assert report == {
        "path": str(sound),
        "parts": [
            {
                "path": str(sound), "kind": "trajectory", "num_bytes": size, "num_segments": None,
                "num_replicas": 2, "num_frames": 400, "last_step": 1990, "sound": True,
            }
        ],
        "problems": [],
    }  # fmt: skip
    cut(trajectory, size // 2)
    said = hpcft("verify", trajectory, "--json")
    assert said.code == 1
    report = json.loads(said.out)
    assert report["parts"][0]["sound"] is False
    assert report["parts"][0]["num_frames"] is None
    assert [problem["file"] for problem in report["problems"]] == [str(trajectory)]


def test_a_folder_of_segments_says_how_many_are_committed_and_up_to_which_step(
    hpcft: Hpcft, run: Path, sound: Path
) -> None:
    temporary_beside(segment_path(run, SEGMENTS)).write_bytes(b"a killed writer's")
    (run / "notes.txt").write_text("mine")
    said = hpcft("verify", run)
    assert said.code == 0
    assert said.out.startswith(
        f"{run}: all is well (5 segments committed, 2 replicas, 400 frames, up to step 1990, "
    )
    (run / "trajectory.h5").write_bytes(sound.read_bytes())
    assert hpcft("verify", run).out.count("all is well") == 2
    delete_segments(run)
    said = hpcft("verify", run)
    assert (said.code, said.out.count("\n")) == (0, 1)
    assert said.out.startswith(f"{run / 'trajectory.h5'}: all is well (trajectory, ")


# What is not


def test_a_file_that_was_cut_off_says_how_much_is_there(hpcft: Hpcft, trajectory: Path) -> None:
    size = trajectory.stat().st_size
    cut(trajectory, size - 1000)
    said = hpcft("verify", trajectory)
    assert said.code == 1
    problem, summary = said.out.splitlines()
    assert problem.startswith(
        f"{trajectory} is damaged: it has {size - 1000} bytes, but {size} were written."
    )
    assert problem.endswith(
        f"hpcft verify {trajectory} --repair OUT writes a new file of the frames that can be proven."
    )
    assert summary.startswith(f"{trajectory}: 1 problem (trajectory, ")


def test_one_changed_bit_is_found_by_the_checksum_in_every_kind_of_file(
    hpcft: Hpcft, trajectory: Path, run: Path, tmp_path: Path
) -> None:
    write_structures(tmp_path / "labels.h5", [bulk("Cu")] * 4)
    for path in (trajectory, segment_path(run, 2), tmp_path / "labels.h5"):
        change(path, path.stat().st_size // 2)
        said = hpcft("verify", path)
        assert said.code == 1
        assert f"{path} is damaged: its SHA-256 is not the one that was written into it." in said.out


def test_what_is_none_of_hpcft_s_is_told_from_what_has_lost_its_first_bytes(
    hpcft: Hpcft, trajectory: Path, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = np.arange(3)
    said = hpcft("verify", tmp_path / "foreign.h5")
    assert said.code == 2
    assert "foreign.h5 is an HDF5 file, but none of hpcft's" in said.err
    assert "hpcft inspect" in said.err
    said = hpcft("verify", tmp_path / "missing.h5")
    assert said.code == 2
    assert "there is no" in said.err
    (tmp_path / "text.h5").write_text("no HDF5")
    change(trajectory, 0, b"x" * 20)
    for path in (tmp_path / "text.h5", trajectory, trajectory.rename(tmp_path / "md.data")):
        path = path if path.exists() else tmp_path / "md.data"
        said = hpcft("verify", path)
        assert said.code == 1
        assert f"{path} is not a file of hpcft, or its first bytes are damaged." in said.out


def test_a_folder_with_neither_campaign_nor_hdf5_files_is_a_mistake(hpcft: Hpcft, tmp_path: Path) -> None:
    said = hpcft("verify", tmp_path)
    assert said.code == 2
    assert "is not a campaign folder" in said.err


def test_each_segment_that_is_of_no_use_is_named_with_the_cause(hpcft: Hpcft, run: Path) -> None:
    change(segment_path(run, 2), 9000)
    cut(segment_path(run, 3), 9000)
    said = hpcft("verify", run)
    assert said.code == 1
    second, third, fourth, summary = said.out.splitlines()
    assert second.startswith(f"{segment_path(run, 2)} is damaged: its SHA-256")
    assert third.startswith(f"{segment_path(run, 3)} is damaged: it has 9000 bytes")
    assert fourth.startswith(
        f"{segment_path(run, 4)} is sound, but of no use: segment-0002.h5 is damaged or missing."
    )
    assert fourth.endswith(f"hpcft verify {run} --repair OUT makes one file of them.")
    assert summary.startswith(
        f"{run}: 3 problems (2 segments committed, 2 replicas, 160 frames, up to step 790, "
    )


def test_segments_behind_a_gap_are_of_no_use(hpcft: Hpcft, run: Path) -> None:
    segment_path(run, 1).unlink()
    said = hpcft("verify", run)
    assert said.code == 1
    assert said.out.count("is sound, but of no use: segment-0001.h5 is damaged or missing.") == 3
    assert "(1 segment committed, 2 replicas, 80 frames, up to step 390, " in said.out


# Repair of a folder of segments


def test_the_committed_segments_of_a_killed_run_become_a_trajectory(
    hpcft: Hpcft, run: Path, sound: Path, tmp_path: Path
) -> None:
    out = tmp_path / "whole.h5"
    said = hpcft("verify", run, "--repair", out)
    assert said.code == 0
    assert said.out == (
        f"{out}: 400 frames of {run}, each of them proven. Nothing that was committed is lost.\n"
    )
    assert assert_frames_are_those_of(out, sound) == dict.fromkeys(REPLICAS, NUM_FRAMES)
    with Trajectory(out) as trajectory:
        about = trajectory.provenance["repaired"]
        assert (about["from"], about["frames_lost"], about["segments_kept"]) == (str(run), 0, SEGMENTS)
        np.testing.assert_equal(trajectory.checkpoint(), CHECKPOINT)


def test_the_folder_of_a_killed_md_run_is_checked_and_repaired_by_the_name_that_o_gave_it(
    hpcft: Hpcft, run: Path, sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "md"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    run.rename(folder / "segments-0000")
    said = hpcft("verify", folder)
    assert said.code == 0
    assert said.out.startswith(f"{folder / 'segments-0000'}: all is well (5 segments committed, ")
    assert "the folder of the run" in hpcft("verify", folder, "--repair", folder / "trajectory.h5").err
    assert hpcft("verify", folder, "--repair", tmp_path / "whole.h5").code == 0
    assert_frames_are_those_of(tmp_path / "whole.h5", sound)
    change(segment_path(folder / "segments-0000", 2), 9000)
    assert hpcft("verify", folder).code == 1
    (folder / "segments-0001").mkdir()
    said = hpcft("verify", folder, "--repair", tmp_path / "other.h5")
    assert said.code == 2
    assert f"name one of {folder / 'segments-0000'}, {folder / 'segments-0001'}" in said.err
    delete_segments(folder / "segments-0000")
    said = hpcft("verify", folder)
    assert said.code == 2
    assert "has committed nothing yet" in said.err


def test_damage_among_the_segments_leaves_those_before_it(
    hpcft: Hpcft, run: Path, sound: Path, tmp_path: Path
) -> None:
    change(segment_path(run, 3), 9000)
    before = {path: path.read_bytes() for path in run.iterdir()}
    said = hpcft("verify", run, "--repair", tmp_path / "out.h5", "--json")
    assert said.code == 0
    report = json.loads(said.out)
    assert report["num_frames"] == 240
    assert report["repaired"]["segments_lost"] == ["segment-0003.h5", "segment-0004.h5"]
    assert report["repaired"]["frames_lost"] is None  # how many there were nobody can tell
    assert assert_frames_are_those_of(tmp_path / "out.h5", sound) == dict.fromkeys(REPLICAS, 120)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    with Trajectory(tmp_path / "out.h5") as trajectory:
        assert trajectory.provenance["repaired"] == report["repaired"]
    change(segment_path(run, 0), 9000)
    said = hpcft("verify", run, "--repair", tmp_path / "none.h5")
    assert said.code == 1
    assert "no segment is committed there" in said.err
    assert not (tmp_path / "none.h5").exists()


# Repair of a trajectory

DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, chance: content[: chance.randrange(512, len(content))],
    "one bit": lambda content, chance: put(content, chance, lambda old: bytes([old[0] ^ 1 << chance.randrange(8)]), 1),
    "ten bytes": lambda content, chance: put(content, chance, lambda old: chance.randbytes(len(old)), 1, 10),
    "a page of zeros": lambda content, chance: put(content, chance, lambda old: bytes(len(old)), 4096),
    "a page of ones": lambda content, chance: put(content, chance, lambda old: b"\xff" * len(old), 4096),
}  # fmt: skip


def put(
    content: bytes, chance: random.Random, new: Callable[[bytes], bytes], size: int, times: int = 1
) -> bytes:
    """Changed in so many places behind the seal, each aligned to its size."""
    changed = bytearray(content)
    for _ in range(times):
        start = size * chance.randrange(-(-512 // size), len(content) // size)
        changed[start : start + size] = new(changed[start : start + size])
    return bytes(changed)


@pytest.mark.parametrize(
    "what", [what if what == "cut" else pytest.param(what, marks=pytest.mark.nightly) for what in DAMAGES]
)
def test_whatever_the_damage_what_is_given_back_is_right_to_the_bit(
    sound: Path, trajectory: Path, what: str
) -> None:
    chance, content = random.Random(what), sound.read_bytes()
    num_repaired = 0
    for number in range(4):
        damaged = DAMAGES[what](content, chance)
        if damaged == content:
            continue
        trajectory.write_bytes(damaged)
        out = trajectory.with_name(f"{number}.h5")
        try:
            done = repair(trajectory, out)
        except DamagedFile as error:
            assert "nothing can be given back" in str(error) or "no frame can be given back" in str(error)
            assert not out.exists()
            continue
        num_repaired += 1
        assert trajectory.read_bytes() == damaged
        kept = assert_frames_are_those_of(out, sound)
        assert done.num_frames == sum(kept.values())
        lost = done.about["frames_lost"]
        assert {int(replica): num for replica, num in lost.items() if num is not None} == {
            replica: NUM_FRAMES - kept.get(replica, 0) for replica in REPLICAS
        }
        with Trajectory(out) as opened:
            assert opened.provenance["repaired"] == done.about
            if done.about["provenance"] == "kept":
                assert opened.provenance == {**PROVENANCE, "repaired": done.about}
            np.testing.assert_equal(
                opened.checkpoint(), CHECKPOINT if done.about["checkpoint"] == "kept" else {}
            )
    assert num_repaired >= 2
    leftovers = [path.name for path in trajectory.parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []


@pytest.mark.parametrize("share", [0.98, 0.7, 0.3])
def test_of_a_file_that_was_cut_off_almost_all_frames_before_the_cut_survive(
    hpcft: Hpcft, sound: Path, trajectory: Path, share: float
) -> None:
    cut(trajectory, int(share * sound.stat().st_size))
    out = trajectory.with_name("out.h5")
    assert hpcft("verify", trajectory, "--repair", out).code == 0
    kept = assert_frames_are_those_of(out, sound)
    with h5py.File(sound) as file:
        per_chunk = file["replicas/0000/particles/trajectory/position/value"].chunks[0]
    for replica in REPLICAS:
        assert kept[replica] >= share * NUM_FRAMES - FRAMES - per_chunk


def test_damage_in_the_last_frames_of_one_replica_costs_these_only(
    hpcft: Hpcft, sound: Path, trajectory: Path
) -> None:
    last = place(trajectory, "replicas/0007/particles/trajectory/forces/value", NUM_FRAMES // 40 - 1)
    change(trajectory, last.byte_offset + 100)
    out = trajectory.with_name("out.h5")
    said = hpcft("verify", trajectory, "--repair", out)
    assert said.code == 0
    lost = NUM_FRAMES - last.chunk_offset[0]
    assert said.out == (
        f"{out}: {2 * NUM_FRAMES - lost} frames of {trajectory}, each of them proven. "
        f"Lost: {lost} frames of replica 7, the checkpoint.\n"
    )
    assert assert_frames_are_those_of(out, sound) == {0: NUM_FRAMES, 7: NUM_FRAMES - lost}
    assert hpcft("verify", out).code == 0


def test_one_lost_digest_costs_the_frames_from_there_and_damage_beside_the_frames_none(
    hpcft: Hpcft, sound: Path, trajectory: Path
) -> None:
    digests = place(trajectory, "digests/0000")
    change(trajectory, digests.byte_offset + 32 * 17 + 5)
    out = trajectory.with_name("out.h5")
    assert hpcft("verify", trajectory, "--repair", out).code == 0
    assert assert_frames_are_those_of(out, sound) == {0: 17, 7: NUM_FRAMES}
    trajectory.write_bytes(sound.read_bytes().replace(CHECKPOINT["0000"]["velocities"].tobytes(), bytes(240)))
    out = trajectory.with_name("other.h5")
    said = hpcft("verify", trajectory, "--repair", out)
    assert said.out.endswith("each of them proven. Lost: the checkpoint.\n")
    assert assert_frames_are_those_of(out, sound) == dict.fromkeys(REPLICAS, NUM_FRAMES)


def test_a_repaired_file_is_an_ordinary_one_and_a_file_that_has_lost_its_seal_can_be_repaired(
    hpcft: Hpcft, sound: Path, trajectory: Path
) -> None:
    change(trajectory, 0, bytes(512))
    out = trajectory.with_name("out.h5")
    said = hpcft("verify", trajectory, "--repair", out)
    assert said.code == 0
    assert said.out.endswith("Nothing is lost.\n")
    assert assert_frames_are_those_of(out, sound) == dict.fromkeys(REPLICAS, NUM_FRAMES)
    with Trajectory(out) as opened:
        np.testing.assert_equal(opened.checkpoint(), CHECKPOINT)
    report = json.loads(hpcft("verify", out, "--json").out)
    assert report["parts"][0]["num_frames"] == 400


def test_when_hdf5_finds_nothing_any_more_the_segments_are_named_as_the_other_way(
    hpcft: Hpcft, trajectory: Path, run: Path
) -> None:
    change(trajectory, 512, bytes(200))
    said = hpcft("verify", trajectory, "--repair", trajectory.with_name("out.h5"))
    assert said.code == 1
    assert "what HDF5 needs to find anything in it is destroyed" in said.err
    assert said.err.endswith("Restore it from a backup. ")
    moved = trajectory.rename(run / "trajectory.h5")
    said = hpcft("verify", moved, "--repair", run.with_name("out.h5"))
    assert said.code == 1
    assert (
        f"the segments that it was made of are still in its folder: hpcft verify {run} --repair OUT"
        in said.err
    )
    assert not run.with_name("out.h5").exists()
    assert hpcft("verify", run, "--repair", run.with_name("out.h5")).code == 0


def test_a_damaged_file_of_an_older_hpcft_has_nothing_that_proves_a_frame(
    hpcft: Hpcft, trajectory: Path
) -> None:
    with h5py.File(trajectory, "r+") as file:
        del file["digests"]
    write_seal(trajectory, "trajectory")
    assert hpcft("verify", trajectory).code == 0
    cut(trajectory, trajectory.stat().st_size - 10)
    said = hpcft("verify", trajectory, "--repair", trajectory.with_name("out.h5"))
    assert said.code == 1
    assert "hpcft wrote it before it kept a checksum of each frame, so no frame can be proven" in said.err


def test_hdf5_that_does_not_come_back_is_killed(trajectory: Path) -> None:
    cut(trajectory, trajectory.stat().st_size - 10)
    with pytest.raises(DamagedFile, match=r"HDF5 did not come back within 0 s when it opened the file"):
        repair(trajectory, trajectory.with_name("out.h5"), silence_s=0)
    assert sorted(path.name for path in trajectory.parent.iterdir()) == ["md.h5"]


def test_a_repair_replaces_nothing_and_is_refused_where_there_is_nothing_to_repair(
    hpcft: Hpcft, sound: Path, trajectory: Path, run: Path, tmp_path: Path
) -> None:
    cut(trajectory, trajectory.stat().st_size - 10)
    (tmp_path / "taken.h5").write_text("mine")
    refusals = {
        (trajectory, tmp_path / "taken.h5"): "taken.h5 exists already, and a repair replaces nothing",
        (trajectory, trajectory): "exists already",
        (trajectory, tmp_path / "nowhere" / "out.h5"): "There is no folder",
        (run, run / "trajectory.h5"): "a run that finds a trajectory there takes itself for finished",
        (sound, tmp_path / "out.h5"): "is bit for bit what was written, so there is nothing to repair",
        (segment_path(run, 0), tmp_path / "out.h5"): "is bit for bit what was written",
    }
    for (source, out), message in refusals.items():
        said = hpcft("verify", source, "--repair", out)
        assert said.code == 2
        assert message in said.err
    change(segment_path(run, 0), 9000)
    said = hpcft("verify", segment_path(run, 0), "--repair", tmp_path / "out.h5")
    assert said.code == 2
    assert "as a file of kind segment it has one checksum for all of it" in said.err
    assert (tmp_path / "taken.h5").read_text() == "mine"
    assert not (tmp_path / "out.h5").exists()

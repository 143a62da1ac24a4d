"""Frames of a trajectory as lazy sequences of ASE structures, its arrays in slices, and neither ever silently wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms, units

from hpcft.errors import UserError
from hpcft.storage.seal import DamagedFile, write_seal
from hpcft.storage.trajectory import (
    FrameBlock,
    ReplicaFrames,
    Trajectory,
    consolidate,
    list_segments,
    segment_path,
    write_segment,
)

FRAMES, ATOMS, REPLICAS = 300, 20, (0, 3)
CHECKPOINT: dict[str, Any] = {"0000": {"random": {"state": 1 << 100}, "velocities": np.arange(300.0) / 7}}
SLICES = [
    slice(None), slice(5), slice(-5, None), slice(10, 200, 7), slice(None, None, -1), slice(250, 20, -13),
    slice(5, 5), slice(9, 3), slice(3, 9, -1), slice(1000, None), slice(None, None, 1000), slice(-1, None),
]  # fmt: skip


def block(replica: int, first: int, frames: int, atoms: int = ATOMS) -> FrameBlock:
    """Every number is different, and the numbers of a step do not depend on the block."""
    steps = np.arange(first, first + frames)
    vectors = 1 + np.sin(1.0 + steps[:, None, None] * 3.0 * atoms + np.arange(3 * atoms).reshape(atoms, 3))
    return FrameBlock(
        replica=replica,
        numbers=np.array([29, 79] * (atoms // 2)),
        masses=np.linspace(60.0, 200.0, atoms),
        pbc=np.array([True, True, False]),
        step=steps * 10,
        time_fs=steps * 25.0,
        positions=(vectors + replica).astype(np.float32),
        velocities=(vectors * 1e-3).astype(np.float32),
        forces=(vectors * -2).astype(np.float32),
        cell=np.diag([8.0, 9.0, 10.0]) * (1 + 0.001 * steps)[:, None, None],
        potential_energy=np.cos(steps),
        temperature_K=300 + np.sin(steps),
        observables={"descriptor": np.cos(steps)[:, None] + np.arange(500.0), "sane": steps < 290},
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for number in range(3):
        blocks = [block(replica, 100 * number, 100) for replica in REPLICAS]
        write_segment(segment_path(folder, number), blocks, CHECKPOINT)
    consolidate(list_segments(folder), folder / "md.h5", {"model": "a model", "seed": 5})
    return folder / "md.h5"


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy in which the first chunk, or another, of a dataset has been changed."""

    def damage(dataset: str, change: Callable[[bytes], bytes], chunk: int = 0) -> Path:
        with h5py.File(sound) as file:
            place = file[dataset].id.get_chunk_info(chunk)
        content = bytearray(sound.read_bytes())
        where = slice(place.byte_offset, place.byte_offset + place.size)
        content[where] = change(content[where])
        assert len(content) == sound.stat().st_size
        (tmp_path / "damaged.h5").write_bytes(content)
        return tmp_path / "damaged.h5"

    return damage


def flip(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def steps_of(frames: Sequence[Atoms]) -> list[int]:
    return [atoms.info["step"] for atoms in frames]


def assert_is(atoms: Atoms, replica: int, frame: int) -> None:
    expected = block(replica, frame, 1)
    np.testing.assert_array_equal(atoms.positions, expected.positions[0])
    np.testing.assert_array_equal(atoms.numbers, expected.numbers)
    np.testing.assert_array_equal(atoms.get_masses(), expected.masses)
    np.testing.assert_array_equal(atoms.cell.array, expected.cell[0])
    np.testing.assert_array_equal(atoms.pbc, expected.pbc)
    np.testing.assert_allclose(atoms.get_velocities() * units.fs, expected.velocities[0], rtol=1e-6)
    np.testing.assert_array_equal(atoms.get_forces(), expected.forces[0])
    assert atoms.get_potential_energy() == atoms.info["potential_energy"] == expected.potential_energy[0]
    assert atoms.info["step"] == 10 * frame
    assert atoms.info["sane"] is (frame < 290)


def test_the_frames_of_a_replica_are_a_sequence_of_structures_with_energy_and_forces(sound: Path) -> None:
    with Trajectory(sound) as trajectory:
        assert list(trajectory) == list(REPLICAS)
        frames = trajectory[3]
        assert isinstance(frames, Sequence)
        assert len(frames) == FRAMES
        for index in (0, 7, np.int64(299)):
            assert_is(frames[index], 3, int(index))
        assert_is(frames[-1], 3, FRAMES - 1)
        assert_is(frames[-FRAMES], 3, 0)
        for frame, atoms in enumerate(frames):
            assert_is(atoms, 3, frame)
        assert steps_of(list(reversed(frames[:3]))) == [20, 10, 0]


@pytest.mark.parametrize("wanted", SLICES)
def test_a_slice_is_what_the_slice_of_a_list_would_be_and_so_is_a_slice_of_it(
    sound: Path, wanted: slice
) -> None:
    steps = list(range(0, 10 * FRAMES, 10))
    with Trajectory(sound) as trajectory:
        some = trajectory[0][wanted]
        assert isinstance(some, ReplicaFrames)
        assert len(some) == len(steps[wanted])
        assert steps_of(some) == steps[wanted]
        assert steps_of(some[1::2]) == steps[wanted][1::2]
        assert steps_of(some[::-1]) == steps[wanted][::-1]
        assert [some[index].info["step"] for index in range(len(some))] == steps[wanted]
        assert steps_of(list(trajectory.frames(0, wanted))) == steps[wanted]


def test_an_index_outside_names_the_file_the_replica_and_how_many_there_are(sound: Path) -> None:
    with Trajectory(sound) as trajectory:
        for index in (10, -11):
            with pytest.raises(
                IndexError, match=rf"md.h5: these are 10 frames of replica 3.*no frame {index}"
            ):
                trajectory[3][20:30][index]
        with pytest.raises(UserError, match="has no replica 7; it holds 2 replicas"):
            trajectory[7]


def test_what_takes_a_sequence_of_structures_takes_a_slice(sound: Path, tmp_path: Path) -> None:
    with Trajectory(sound) as trajectory:
        some = trajectory[3][10:60:10]
        ase.io.write(tmp_path / "some.traj", some)
        ase.io.write(tmp_path / "some.extxyz", some)
    for name in ("some.traj", "some.extxyz"):
        found = ase.io.read(tmp_path / name, ":")
        assert len(found) == 5
        for index, atoms in enumerate(found):
            expected = block(3, 10 + 10 * index, 1)
            np.testing.assert_allclose(atoms.positions, expected.positions[0], atol=1e-7)
            np.testing.assert_allclose(atoms.get_forces(), expected.forces[0], atol=1e-7)
            assert atoms.get_potential_energy() == pytest.approx(expected.potential_energy[0])


@pytest.mark.parametrize("wanted", SLICES)
@pytest.mark.parametrize("name", ["positions", "step", "cell", "sane", "descriptor"])
def test_an_array_comes_in_slices_too(sound: Path, name: str, wanted: slice) -> None:
    whole = block(3, 0, FRAMES)
    expected = (whole.per_frame() | whole.observables)[name]
    with Trajectory(sound) as trajectory:
        np.testing.assert_array_equal(trajectory.array(3, name, wanted), expected[wanted], strict=True)


def test_what_all_frames_share_comes_once_for_any_slice(sound: Path) -> None:
    with Trajectory(sound) as trajectory:
        masses = trajectory.array(3, "masses", slice(10, 20))
    np.testing.assert_array_equal(masses, block(3, 0, 1).masses, strict=True)


def test_only_what_is_asked_for_is_read(sound: Path, damaged: Callable[..., Path]) -> None:
    """What is damaged cannot be read without being noticed."""
    position = "replicas/0003/particles/trajectory/position/value"
    with h5py.File(sound) as file:
        per_chunk = file[position].chunks[0]
    assert 2 * per_chunk < FRAMES
    with Trajectory(damaged(position, flip, chunk=1)) as trajectory:
        frames = trajectory[3]
        lazy = frames[per_chunk : 2 * per_chunk][::2]
        assert len(lazy) == -(-per_chunk // 2)
        for index in (0, per_chunk - 1, 2 * per_chunk, -1):
            assert_is(frames[index], 3, index % FRAMES)
        assert steps_of(frames[:per_chunk])[-1] == 10 * (per_chunk - 1)
        assert len(trajectory.array(3, "positions", slice(2 * per_chunk, None))) == FRAMES - 2 * per_chunk
        assert len(trajectory.array(3, "forces")) == FRAMES
        for read in (
            lambda: lazy[0],
            lambda: list(lazy),
            lambda: trajectory.array(3, "positions"),
            lambda: trajectory.array(3, "positions", slice(per_chunk, None, 1000)),
        ):
            with pytest.raises(DamagedFile, match=r"damaged.h5 is damaged in frame.*replica 3.*--repair"):
                read()


def test_frames_lie_in_the_file_in_pieces_of_at_most_64_kib_and_in_the_order_of_time(sound: Path) -> None:
    places: list[tuple[int, int]] = []

    def add(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.chunks:
            assert node.chunks[0] == rows
            assert node.chunks[0] * (node.nbytes // len(node)) <= 1 << 16
            infos = [node.id.get_chunk_info(i) for i in range(node.id.get_num_chunks())]
            places.extend((info.chunk_offset[0], info.byte_offset) for info in infos)

    with h5py.File(sound) as file:
        rows = file["replicas/0000/particles/trajectory/position/value"].chunks[0]
        file["replicas/0000"].visititems(add)
    hundreds = [[place for first, place in places if first // 100 == number] for number in range(3)]
    assert all(hundreds)
    # A chunk may be begun by one segment and filled by the next.
    assert max(hundreds[0]) < max(hundreds[1]) < max(hundreds[2])
    assert np.median(hundreds[0]) < min(hundreds[2])


def test_a_large_frame_has_a_chunk_of_its_own(tmp_path: Path) -> None:
    write_segment(segment_path(tmp_path, 0), [block(0, 0, 4, atoms=8000)], {})
    consolidate(list_segments(tmp_path), tmp_path / "md.h5", {})
    with h5py.File(tmp_path / "md.h5") as file:
        assert file["replicas/0000/particles/trajectory/position/value"].chunks == (1, 8000, 3)
        assert file["replicas/0000/particles/trajectory/position/value"].compression is None


# fletcher32 finds what is changed, but takes a chunk of nothing but zeros, or ones, for sound
@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
@pytest.mark.parametrize("name", ["potential_energy", "positions", "sane", "time_fs"])
def test_a_page_that_the_disk_has_lost_is_noticed(
    damaged: Callable[..., Path], name: str, filler: bytes
) -> None:
    element = {
        "potential_energy": "observables/trajectory/potential_energy/value",
        "positions": "particles/trajectory/position/value",
        "sane": "observables/trajectory/sane/value",
        "time_fs": "particles/trajectory/position/time",
    }[name]
    path = damaged(f"replicas/0000/{element}", lambda content: filler * len(content))
    with h5py.File(path) as file:
        assert len(file[f"replicas/0000/{element}"][:5]) == 5  # HDF5 sees nothing wrong
    with Trajectory(path) as trajectory:
        with pytest.raises(DamagedFile, match="damaged in frame"):
            trajectory[0][3]
        with pytest.raises(DamagedFile, match="damaged in frame"):
            trajectory.array(0, name)
        assert_is(trajectory[3][3], 3, 3)
        assert_is(trajectory[0][-1], 0, FRAMES - 1)


@pytest.mark.parametrize(
    "what, text", [("checkpoint", CHECKPOINT["0000"]["velocities"].tobytes()), ("provenance", b"a model")]
)
def test_what_hdf5_keeps_without_a_checksum_is_compared_too(
    sound: Path, tmp_path: Path, what: str, text: bytes
) -> None:
    content = sound.read_bytes()
    assert content.count(text) == 1
    (tmp_path / "md.h5").write_bytes(content.replace(text, text[:-1] + b"x"))

    def read_it() -> None:
        with Trajectory(tmp_path / "md.h5") as trajectory:
            assert_is(trajectory[0][1], 0, 1)
            trajectory.checkpoint()

    with pytest.raises(DamagedFile, match=f"its {what} is not what was written"):
        read_it()


def test_a_trajectory_of_an_older_hpcft_without_digests_is_read_as_before(
    sound: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.h5"
    old.write_bytes(sound.read_bytes())
    with h5py.File(old, "r+") as file:
        del file["digests"]
    write_seal(old, "trajectory")
    with Trajectory(old) as trajectory:
        assert_is(trajectory[3][12], 3, 12)
        assert_is(trajectory.frame(0, -1), 0, FRAMES - 1)
        np.testing.assert_equal(trajectory.checkpoint(), CHECKPOINT)
        assert len(trajectory.array(0, "positions")) == FRAMES


@pytest.mark.nightly
def test_many_replicas_may_be_read_in_turns(tmp_path: Path) -> None:
    replicas = range(0, 80, 2)
    write_segment(segment_path(tmp_path, 0), [block(replica, 0, 3) for replica in replicas], {})
    consolidate(list_segments(tmp_path), tmp_path / "md.h5", {})
    with Trajectory(tmp_path / "md.h5") as trajectory:
        views = {replica: trajectory[replica] for replica in trajectory}
        for frame in range(3):
            for replica in replicas:
                assert_is(views[replica][frame], replica, frame)


def test_frames_are_gone_when_the_file_is_closed(sound: Path) -> None:
    with Trajectory(sound) as trajectory:
        frames = trajectory[0]
        assert len(frames) == FRAMES
    with pytest.raises(UserError, match=r"md.h5 has been closed; read its frames inside the `with`"):
        frames[0]
    with pytest.raises(UserError, match="has been closed"):
        list(frames)


READ_SOME = """
import sys
from pathlib import Path
from hpcft.storage.trajectory import Trajectory
with Trajectory(Path(sys.argv[1])) as trajectory:
    frames = trajectory[0]
    stride = len(frames) // 500
    for atoms in frames[::stride]:
        assert atoms.info["step"] % (10 * stride) == 0
    for index in range(500):
        which = index * 7919 % len(frames)
        assert frames[which].info["step"] == 10 * which
    assert sum(1 for atoms in frames[len(frames) // 2:][:2000]) == min(2000, len(frames) // 2)
    assert len(trajectory.array(0, "positions", slice(None, None, stride))) == 500
# Not ru_maxrss, which a process inherits from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_kib(path: Path) -> int:
    command = [sys.executable, "-c", READ_SOME, str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def write_long(folder: Path, num_segments: int, frames: int) -> Path:
    folder.mkdir()
    for number in range(num_segments):
        one = block(0, number * frames, frames, atoms=2)
        one.observables.clear()
        write_segment(segment_path(folder, number), [one], {})
    consolidate(list_segments(folder), folder / "md.h5", {})
    return folder / "md.h5"


@pytest.mark.nightly
def test_a_million_frames_need_hardly_more_memory_than_a_hundred_thousand(tmp_path: Path) -> None:
    few, many = write_long(tmp_path / "few", 2, 50_000), write_long(tmp_path / "many", 20, 50_000)
    more_data = many.stat().st_size - few.stat().st_size
    assert more_data > 180e6
    assert 1024 * (peak_kib(many) - peak_kib(few)) < more_data / 10

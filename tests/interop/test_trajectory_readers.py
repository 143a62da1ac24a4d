"""A finished trajectory, with checksums in it, through other people's readers: h5ls, silx, h5py, MDAnalysis, znh5md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest

from hpcft.storage.trajectory import (
    FrameBlock,
    Trajectory,
    consolidate,
    list_segments,
    segment_path,
    write_h5md_view,
    write_segment,
)

FRAMES, ATOMS, REPLICAS = 200, 60, (0, 11)
ROOT = "replicas/0011/particles/trajectory"
OBSERVABLES = "replicas/0011/observables/trajectory"


def block(replica: int, first: int, frames: int) -> FrameBlock:
    random = np.random.default_rng([replica, first])
    steps = np.arange(first, first + frames)
    vectors = random.normal(size=(3, frames, ATOMS, 3)).astype(np.float32)
    return FrameBlock(
        replica=replica,
        numbers=np.tile([29, 79, 47], ATOMS // 3),
        masses=np.linspace(60.0, 200.0, ATOMS),
        pbc=np.array([True, True, True]),
        step=steps * 10,
        time_fs=steps * 25.0,
        positions=vectors[0] * 10,
        velocities=vectors[1] * 1e-3,
        forces=vectors[2],
        cell=np.diag([20.0, 21.0, 22.0]) * (1 + 0.001 * steps)[:, None, None],
        potential_energy=random.normal(size=frames),
        temperature_K=random.normal(300, 20, size=frames),
        observables={"descriptor": random.normal(size=(frames, 8)), "sane": np.ones(frames, dtype=bool)},
    )


@pytest.fixture(scope="module")
def blocks() -> list[FrameBlock]:
    """Of replica 11."""
    return [block(11, first, FRAMES // 4) for first in range(0, FRAMES, FRAMES // 4)]


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory, blocks: list[FrameBlock]) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    for number, one in enumerate(blocks):
        other = block(0, int(one.step[0]) // 10, one.num_frames)
        write_segment(segment_path(folder, number), [other, one], {"0011": {"stopped": ""}})
    consolidate(list_segments(folder), folder / "md.h5", {"model": "abc"})
    return folder / "md.h5"


def all_of(blocks: list[FrameBlock], name: str) -> np.ndarray:
    return np.concatenate([(one.per_frame() | one.observables)[name] for one in blocks])


def test_the_file_keeps_a_checksum_for_each_of_many_chunks(trajectory: Path) -> None:
    with h5py.File(trajectory) as file:
        for path in (
            f"{ROOT}/position/value",
            f"{ROOT}/forces/value",
            f"{OBSERVABLES}/potential_energy/value",
        ):
            assert file[path].fletcher32
            assert file[path].id.get_num_chunks() > 2


def h5ls(*words: str) -> str:
    binary = shutil.which("h5ls")
    assert binary is not None, "install h5ls: apt-get install hdf5-tools"
    return subprocess.run([binary, *words], capture_output=True, text=True, check=True).stdout


def test_h5ls_lists_every_dataset(trajectory: Path) -> None:
    listed = dict(line.split(maxsplit=1) for line in h5ls("-r", str(trajectory)).splitlines())
    shapes = {
        f"{ROOT}/position/value": "200/Inf, 60, 3",
        f"{ROOT}/velocity/value": "200/Inf, 60, 3",
        f"{ROOT}/forces/value": "200/Inf, 60, 3",
        f"{ROOT}/box/edges/value": "200/Inf, 3, 3",
        f"{ROOT}/species/value": "200/Inf, 60",
        f"{ROOT}/mass/value": "200/Inf, 60",
        f"{OBSERVABLES}/potential_energy/value": "200/Inf",
        f"{OBSERVABLES}/temperature/value": "200/Inf",
        f"{OBSERVABLES}/descriptor/value": "200/Inf, 8",
        "digests/0011": "200/Inf, 32",
    }
    for path, shape in shapes.items():
        assert listed[f"/{path}"] == f"Dataset {{{shape}}}"
    for path in (f"{ROOT}/position/step", f"{ROOT}/position/time", f"{OBSERVABLES}/descriptor/step"):
        assert listed[f"/{path}"].startswith("Dataset")
    for path in ("h5md", "provenance", "checkpoint", "replicas/0000", "replicas/0011"):
        assert listed[f"/{path}"].startswith("Group")


def test_h5ls_prints_the_numbers_themselves(trajectory: Path, blocks: list[FrameBlock]) -> None:
    printed = h5ls("-d", f"{trajectory}/{ROOT}/position/step").partition("Data:")[2]
    assert [int(number) for number in re.findall(r"\d+", printed)] == list(range(0, 10 * FRAMES, 10))
    printed = h5ls("-d", "-w", "1000", f"{trajectory}/{OBSERVABLES}/potential_energy/value").partition(
        "Data:"
    )[2]
    numbers = [float(number) for number in re.findall(r"-?\d[\d.e-]*", printed)]
    np.testing.assert_allclose(numbers, all_of(blocks, "potential_energy"), rtol=1e-5)


def test_silx_opens_the_file_and_reads_positions_and_units(
    trajectory: Path, blocks: list[FrameBlock]
) -> None:
    import silx.io
    from silx.io.utils import is_dataset

    with silx.io.open(str(trajectory)) as file:
        positions = file[f"{ROOT}/position/value"]
        assert is_dataset(positions)
        assert positions.attrs["unit"] == "Angstrom"
        np.testing.assert_array_equal(positions[()], all_of(blocks, "positions"))
        np.testing.assert_array_equal(positions[150, :5], all_of(blocks, "positions")[150, :5])
        np.testing.assert_array_equal(file[f"{ROOT}/forces/value"][7:9], all_of(blocks, "forces")[7:9])
        assert file["provenance"].attrs["model"] == "abc"


def test_mdanalysis_reads_frames_at_random_through_the_view(
    trajectory: Path, blocks: list[FrameBlock], tmp_path: Path
) -> None:
    import MDAnalysis

    write_h5md_view(trajectory, 11, tmp_path / "view.h5md")
    universe = MDAnalysis.Universe(str(tmp_path / "view.h5md"), to_guess=())
    assert universe.trajectory.n_frames == FRAMES
    for index in (199, 0, 63, 64, 150, 1):
        frame = universe.trajectory[index]
        np.testing.assert_array_equal(frame.positions, all_of(blocks, "positions")[index])
        np.testing.assert_array_equal(frame.data["forces"], all_of(blocks, "forces")[index])
        np.testing.assert_allclose(frame.dimensions[:3], np.diag(all_of(blocks, "cell")[index]), rtol=1e-6)
    universe.trajectory.close()


def test_znh5md_reads_all_frames_through_the_view(
    trajectory: Path, blocks: list[FrameBlock], tmp_path: Path
) -> None:
    write_h5md_view(trajectory, 11, tmp_path / "view.h5")
    frames = ase.io.read(tmp_path / "view.h5", ":", format="znh5md")
    assert len(frames) == FRAMES
    with Trajectory(trajectory) as opened:
        for found, ours in zip(frames, opened[11], strict=True):
            np.testing.assert_array_equal(found.numbers, ours.numbers)
            np.testing.assert_array_equal(found.positions, ours.positions)
            np.testing.assert_array_equal(found.get_forces(), ours.get_forces())
            assert found.get_potential_energy() == ours.get_potential_energy()


@pytest.fixture
def changed(trajectory: Path, tmp_path: Path) -> Path:
    """One byte of the positions is another, in the second chunk."""
    with h5py.File(trajectory) as file:
        place = file[f"{ROOT}/position/value"].id.get_chunk_info(1)
    content = bytearray(trajectory.read_bytes())
    content[place.byte_offset + 40] ^= 0x20
    (tmp_path / "md.h5").write_bytes(content)
    return tmp_path / "md.h5"


# znh5md is not among them: it takes positions that cannot be read for positions that are not there, which are zeros.
def test_other_readers_stop_at_a_changed_byte_instead_of_showing_another_number(changed: Path) -> None:
    import MDAnalysis
    import silx.io

    assert "Unable to print data" in h5ls("-d", f"{changed}/{ROOT}/position/value")
    with silx.io.open(str(changed)) as opened, pytest.raises(OSError, match="read data"):
        opened[f"{ROOT}/position/value"][()]
    view = changed.with_name("view.h5md")
    write_h5md_view(changed, 11, view)
    universe = MDAnalysis.Universe(str(view), to_guess=())
    with h5py.File(changed) as file:
        first_in_chunk = file[f"{ROOT}/position/value"].chunks[0]
    with pytest.raises(OSError, match="read data"):
        universe.trajectory[first_in_chunk]
    assert sum(1 for _ in universe.trajectory) == first_in_chunk  # it takes the error for the end
    universe.trajectory.close()

"""Fault 21: on a full disk a writer stops with the reason, keeps what was committed, and goes on once there is room.

Run as a script this file is a writer whose files may not exceed a size; it prints what it was told, as a task would.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from hpcft.storage.atomic import create_json_once, read_json, write_json
from hpcft.storage.structures import count_structures, write_structures
from hpcft.storage.trajectory import (
    FrameBlock,
    Trajectory,
    consolidate,
    list_segments,
    read_segment,
    segment_path,
    write_segment,
)

ATOMS = 500


def block(segment: int, frames: int) -> FrameBlock:
    """Frames of 36 kB each."""
    random = np.random.default_rng(segment)
    steps = 1000 * segment + np.arange(frames)
    return FrameBlock(
        replica=0,
        numbers=np.full(ATOMS, 14),
        masses=np.full(ATOMS, 28.085),
        pbc=np.array([True, True, True]),
        step=steps,
        time_fs=steps * 1.0,
        positions=random.normal(size=(frames, ATOMS, 3)),
        velocities=random.normal(size=(frames, ATOMS, 3)),
        forces=random.normal(size=(frames, ATOMS, 3)),
        cell=np.tile(np.eye(3), (frames, 1, 1)),
        potential_energy=random.normal(size=frames),
        temperature_K=random.normal(size=frames),
    )


def write_all(folder: Path) -> None:
    """Two small segments and a large third, then their consolidation."""
    for number in range(len(list_segments(folder)), 3):
        assert write_segment(
            segment_path(folder, number), [block(number, 2 if number < 2 else 20)], {"number": number}
        )
    consolidate(list_segments(folder), folder / "trajectory.h5", {})


def limited(folder: Path, num_bytes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(folder), str(num_bytes)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("limit", [300_000, 500_000, 700_000])
def test_a_segment_that_does_not_fit_is_reported_and_the_ones_before_stay(tmp_path: Path, limit: int) -> None:
    writer = limited(tmp_path, limit)
    # HDF5's own way ends in a segmentation fault (-11) after the error.
    assert writer.returncode == 3, writer.stderr
    assert "File too large; nothing of this file was kept" in writer.stdout
    assert "segment-0002.h5" in writer.stdout
    assert names(tmp_path) == ["segment-0000.h5", "segment-0001.h5"]
    for number, path in enumerate(list_segments(tmp_path)):
        (found,), checkpoint = read_segment(path)
        assert checkpoint == {"number": number}
        np.testing.assert_equal(found.per_frame(), block(number, 2).per_frame())


def test_a_consolidation_that_does_not_fit_is_reported_and_the_segments_stay(tmp_path: Path) -> None:
    writer = limited(tmp_path, 800_000)
    assert writer.returncode == 3, writer.stderr
    assert "trajectory.h5" in writer.stdout
    assert names(tmp_path) == ["segment-0000.h5", "segment-0001.h5", "segment-0002.h5"]


def test_once_there_is_room_the_run_goes_on_to_the_trajectory_of_an_undisturbed_one(tmp_path: Path) -> None:
    (disturbed := tmp_path / "disturbed").mkdir()
    (undisturbed := tmp_path / "undisturbed").mkdir()
    for limit in (0, 20_000, 200_000, 300_000, 800_000):
        assert limited(disturbed, limit).returncode == 3
    assert limited(disturbed, resource.RLIM_INFINITY).returncode == 0
    write_all(undisturbed)
    assert names(disturbed) == names(undisturbed)
    with (
        Trajectory(disturbed / "trajectory.h5") as found,
        Trajectory(undisturbed / "trajectory.h5") as expected,
    ):
        assert found.num_frames(0) == expected.num_frames(0) == 24
        for name in block(0, 1).per_frame():
            np.testing.assert_array_equal(found.array(0, name), expected.array(0, name), strict=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "hpcft-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_labels_and_records_as_they_were(small_disk: Path) -> None:
    labels, record = small_disk / "labels.h5", small_disk / "result.json"
    write_structures(labels, [bulk("Cu")] * 10)
    write_json(record, {"state": "partial"})
    (small_disk / "ballast").write_bytes(bytes(900_000))
    with pytest.raises(OSError, match=r"No space left on device.*labels.h5") as told:
        write_structures(labels, [bulk("Cu") * (10, 10, 10)] * 10)
    assert told.value.errno == errno.ENOSPC
    large = {"state": "done", "text": "x" * 300_000}
    with pytest.raises(OSError, match=r"No space left on device.*result.json"):
        write_json(record, large)
    with pytest.raises(OSError, match=r"No space left on device.*intent.json"):
        create_json_once(small_disk / "intent.json", large)
    assert names(small_disk) == ["ballast", "labels.h5", "result.json"]
    assert count_structures(labels) == 10
    assert read_json(record) == {"state": "partial"}
    (small_disk / "ballast").unlink()
    write_json(record, large)
    assert read_json(record) == large


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        write_all(Path(sys.argv[1]))
    except OSError as error:
        print(error)
        sys.exit(3)

"""Trajectories in which only some frames have velocities and forces: right in all readers, and smaller for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from test_trajectory_readers import FRAMES, ROOT, all_of, block

from hpcft.storage.repair import repair
from hpcft.storage.seal import DamagedFile
from hpcft.storage.soundness import check_file
from hpcft.storage.trajectory import (
    FrameBlock,
    Trajectory,
    consolidate,
    list_segments,
    read_segment,
    segment_path,
    write_h5md_view,
    write_segment,
)

EVERY = {"velocities": 10, "forces": 25}


@pytest.fixture(scope="module")
def blocks() -> list[FrameBlock]:
    """The second one has a frame more with both, as before a stop."""
    found = []
    for first in range(0, FRAMES, 40):
        one = block(11, first, 40)
        for name, every in EVERY.items():
            rows = getattr(one, name).copy()
            wanted = one.step // 10 % every == 0
            wanted[-1] |= first == 40
            rows[~wanted] = np.nan
            one = replace(one, **{name: rows})
        found.append(one)
    return found


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory, blocks: list[FrameBlock]) -> Path:
    folder = tmp_path_factory.mktemp("intervals")
    for number, one in enumerate(blocks):
        write_segment(segment_path(folder, number), [one], {"0011": {"stopped": ""}})
    consolidate(list_segments(folder), folder / "md.h5", {"model": "abc"})
    return folder / "md.h5"


def test_segments_and_the_file_give_back_every_bit_and_hold_no_more_than_was_taken_down(
    trajectory: Path, blocks: list[FrameBlock]
) -> None:
    for path, one in zip(list_segments(trajectory.parent), blocks, strict=True):
        (stored,), _ = read_segment(path)
        for name in EVERY:
            np.testing.assert_array_equal(getattr(stored, name), getattr(one, name), strict=True)
            with h5py.File(path) as file:
                num_stored = len(file[f"frames/{getattr(one, name).dtype.str}/frames/{name}"])
            assert num_stored == np.isfinite(getattr(one, name)).sum()
    with Trajectory(trajectory) as opened:
        for name in EVERY:
            np.testing.assert_array_equal(opened.array(11, name), all_of(blocks, name), strict=True)
            some = slice(150, 3, -7)
            np.testing.assert_array_equal(opened.array(11, name, some), all_of(blocks, name)[some])
        assert len(list(opened[11])) == FRAMES  # each compared with its digest
    with h5py.File(trajectory) as file:
        for element, name in (("velocity", "velocities"), ("forces", "forces")):
            values = file[f"{ROOT}/{element}/value"]
            row = values.dtype.itemsize * int(np.prod(values.shape[1:]))
            taken_down = np.isfinite(all_of(blocks, name)[:, 0, 0]).sum()
            assert values.id.get_storage_size() <= taken_down * (row + 4)  # and a checksum each


def test_a_frame_has_what_was_taken_down_and_says_so_of_the_rest(
    trajectory: Path, blocks: list[FrameBlock]
) -> None:
    with Trajectory(trajectory) as opened:
        whole, half, bare = (opened.frame(11, index) for index in (50, 25, 51))
    np.testing.assert_allclose(whole.get_velocities() * units.fs, all_of(blocks, "velocities")[50], rtol=1e-6)
    for frame, index in ((whole, 50), (half, 25)):
        np.testing.assert_array_equal(frame.get_forces(), all_of(blocks, "forces")[index])
    assert not half.has("momenta") and not bare.has("momenta")
    assert bare.get_potential_energy() == all_of(blocks, "potential_energy")[51]
    with pytest.raises(PropertyNotImplementedError):
        bare.get_forces()


def test_mdanalysis_and_znh5md_show_each_frame_its_own_numbers_and_nan_where_there_are_none(
    trajectory: Path, blocks: list[FrameBlock], tmp_path: Path
) -> None:
    """Fails if a reader shows the forces of another frame, which is what elements with fewer rows lead to."""
    import MDAnalysis

    write_h5md_view(trajectory, 11, tmp_path / "view.h5md")
    universe = MDAnalysis.Universe(str(tmp_path / "view.h5md"), to_guess=())
    assert universe.trajectory.n_frames == FRAMES
    for index in (0, 1, 25, 50, 79, 80, 199):
        frame = universe.trajectory[index]
        np.testing.assert_array_equal(frame.positions, all_of(blocks, "positions")[index])
        np.testing.assert_array_equal(frame.data["forces"], all_of(blocks, "forces")[index])
        velocities = 1000 * all_of(blocks, "velocities")[index]  # Å/ps
        np.testing.assert_allclose(frame.velocities, velocities, rtol=1e-6)
    universe.trajectory.close()
    write_h5md_view(trajectory, 11, tmp_path / "view.h5")
    frames = ase.io.read(tmp_path / "view.h5", ":", format="znh5md")
    assert len(frames) == FRAMES
    for index in (25, 50, 79):
        np.testing.assert_array_equal(frames[index].positions, all_of(blocks, "positions")[index])
        np.testing.assert_array_equal(frames[index].get_forces(), all_of(blocks, "forces")[index])


def damaged_at(trajectory: Path, folder: Path, element: str, chunk: int, content: bytes | None) -> Path:
    """A copy with these bytes in a chunk, or with a bit of it turned over."""
    with h5py.File(trajectory) as file:
        place = file[f"{ROOT}/{element}/value"].id.get_chunk_info(chunk)
    whole = bytearray(trajectory.read_bytes())
    if content is None:
        whole[place.byte_offset + 8] ^= 1
    else:
        whole[place.byte_offset : place.byte_offset + place.size] = content[: place.size]
    (folder / "damaged.h5").write_bytes(whole)
    return folder / "damaged.h5"


@pytest.mark.parametrize("content", [None, bytes(1 << 16)])
def test_damage_to_the_few_rows_is_found_and_the_frames_before_are_given_back(
    trajectory: Path, blocks: list[FrameBlock], tmp_path: Path, content: bytes | None
) -> None:
    damaged = damaged_at(trajectory, tmp_path, "velocity", 6, content)  # of frame 60
    assert check_file(damaged).problems
    with Trajectory(damaged) as opened, pytest.raises(DamagedFile):
        opened.array(11, "velocities")
    assert repair(damaged, tmp_path / "new.h5").num_frames == 60
    with Trajectory(tmp_path / "new.h5") as opened:
        np.testing.assert_array_equal(opened.array(11, "velocities"), all_of(blocks, "velocities")[:60])

"""A consolidated trajectory through our reader, MDAnalysis and znh5md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import units

from hpcft.errors import UserError
from hpcft.storage.inspection import inspect_file, verify_file
from hpcft.storage.trajectory import (
    FrameBlock,
    Trajectory,
    consolidate,
    delete_segments,
    list_segments,
    read_segment,
    segment_path,
    write_h5md_view,
    write_segment,
)

NUM_SEGMENTS, FRAMES, REPLICAS = 3, 4, (0, 7)


def block(replica: int, segment: int, frames: int = FRAMES, dtype: type = np.float32) -> FrameBlock:
    """Frames in a triclinic, breathing cell; every number is different."""
    random = np.random.default_rng([replica, segment])
    numbers = np.array([29, 79, 29, 79, 79][: 4 + (replica > 0)])
    n = len(numbers)
    steps = np.arange(segment * FRAMES, segment * FRAMES + frames)
    cell = np.array([[8.0, 0.0, 0.0], [0.5, 9.0, 0.0], [0.25, 0.75, 10.0]])
    return FrameBlock(
        replica=replica,
        numbers=numbers,
        masses=np.linspace(60.0, 200.0, n),
        pbc=np.array([True, True, True]),
        step=steps * 10,
        time_fs=steps * 25.0,
        positions=random.normal(scale=20, size=(frames, n, 3)).astype(dtype),
        velocities=random.normal(scale=1e-3, size=(frames, n, 3)).astype(dtype),
        forces=random.normal(size=(frames, n, 3)).astype(dtype),
        cell=cell * (1 + 0.01 * steps)[:, None, None],
        potential_energy=random.normal(size=frames),
        temperature_K=random.normal(300, 20, size=frames),
        observables={"sane": np.arange(frames) < 3, "descriptor": random.normal(size=(frames, 6))},
    )


def joined(replica: int, name: str) -> Any:
    blocks = [block(replica, segment) for segment in range(NUM_SEGMENTS)]
    return np.concatenate([(one.per_frame() | one.observables)[name] for one in blocks])


@pytest.fixture
def trajectory(tmp_path: Path) -> Path:
    for number in range(NUM_SEGMENTS):
        blocks = [block(replica, number) for replica in REPLICAS]
        assert write_segment(
            segment_path(tmp_path, number), blocks, {"segment": number, "random": {"state": 1 << 100}}
        )
    consolidate(
        list_segments(tmp_path), tmp_path / "md.h5", {"model": "abc", "seed": 5, "versions": {"torch": "2"}}
    )
    delete_segments(tmp_path)
    return tmp_path / "md.h5"


@pytest.mark.parametrize("replica", REPLICAS)
def test_every_array_comes_back_to_the_bit(trajectory: Path, replica: int) -> None:
    expected = block(replica, 0)
    with Trajectory(trajectory) as opened:
        assert opened.replicas == list(REPLICAS)
        assert opened.num_frames(replica) == NUM_SEGMENTS * FRAMES
        assert opened.observable_names(replica) == ["descriptor", "sane"]
        for name, values in expected.static().items():
            np.testing.assert_array_equal(opened.array(replica, name), values, strict=True)
        for name in expected.per_frame() | expected.observables:
            np.testing.assert_array_equal(opened.array(replica, name), joined(replica, name), strict=True)
        assert opened.checkpoint() == {"segment": NUM_SEGMENTS - 1, "random": {"state": 1 << 100}}
        assert opened.provenance == {"model": "abc", "seed": 5, "versions": {"torch": "2"}}


def test_a_frame_is_an_ase_structure_in_ase_units(trajectory: Path) -> None:
    with Trajectory(trajectory) as opened:
        atoms = opened.frame(7, -2)
        some = list(opened.frames(7, slice(1, None, 5)))
    np.testing.assert_array_equal(atoms.positions, joined(7, "positions")[-2])
    np.testing.assert_array_equal(atoms.cell.array, joined(7, "cell")[-2])
    np.testing.assert_allclose(atoms.get_velocities() * units.fs, joined(7, "velocities")[-2], rtol=1e-6)
    np.testing.assert_array_equal(atoms.get_masses(), block(7, 0).masses)
    assert atoms.pbc.all()
    assert atoms.info["step"] == 100
    assert atoms.info["time_fs"] == 250.0
    assert atoms.info["potential_energy"] == joined(7, "potential_energy")[-2]
    assert atoms.info["temperature_K"] == joined(7, "temperature_K")[-2]
    assert atoms.info["sane"] is True
    np.testing.assert_array_equal(atoms.info["descriptor"], joined(7, "descriptor")[-2])
    assert [one.info["step"] for one in some] == [10, 60, 110]


@pytest.mark.parametrize("replica", REPLICAS)
def test_mdanalysis_opens_the_view_of_a_replica_with_units_converted(trajectory: Path, replica: int) -> None:
    import MDAnalysis
    from MDAnalysis.coordinates.H5MD import H5MDReader

    view = trajectory.parent / "view.h5md"
    write_h5md_view(trajectory, replica, view)
    assert view.stat().st_size < 2048
    universe = MDAnalysis.Universe(str(view), to_guess=())
    assert isinstance(universe.trajectory, H5MDReader)
    assert universe.trajectory.n_frames == NUM_SEGMENTS * FRAMES
    for index, frame in enumerate(universe.trajectory):
        np.testing.assert_array_equal(frame.positions, joined(replica, "positions")[index])
        np.testing.assert_allclose(
            frame.velocities, joined(replica, "velocities")[index] * 1000, rtol=1e-6
        )  # Å/ps
        np.testing.assert_array_equal(
            frame.data["forces"], joined(replica, "forces")[index]
        )  # eV/Å, as stored
        lengths = np.linalg.norm(joined(replica, "cell")[index], axis=1)
        np.testing.assert_allclose(frame.dimensions[:3], lengths, rtol=1e-6)
        assert frame.dimensions[5] == pytest.approx(np.degrees(np.arctan2(9.0, 0.5)), rel=1e-6)
        assert frame.time == pytest.approx(joined(replica, "time_fs")[index] / 1000)  # ps
        assert frame.data["step"] == joined(replica, "step")[index]
        energy = frame.data["trajectory/potential_energy"]
        assert energy == joined(replica, "potential_energy")[index]


def test_ase_opens_the_view_through_znh5md(trajectory: Path) -> None:
    view = trajectory.parent / "view.h5"
    write_h5md_view(trajectory, 7, view)
    frames = ase.io.read(view, ":", format="znh5md")
    assert len(frames) == NUM_SEGMENTS * FRAMES
    for index, atoms in enumerate(frames):
        np.testing.assert_array_equal(atoms.numbers, block(7, 0).numbers)
        np.testing.assert_array_equal(atoms.positions, joined(7, "positions")[index])
        np.testing.assert_array_equal(atoms.cell.array, joined(7, "cell")[index])
        np.testing.assert_array_equal(atoms.get_forces(), joined(7, "forces")[index])
        assert atoms.get_potential_energy() == joined(7, "potential_energy")[index]
        assert atoms.pbc.all()


def test_a_view_and_its_trajectory_may_move_together(trajectory: Path, tmp_path: Path) -> None:
    import h5py

    (tmp_path / "views").mkdir()
    write_h5md_view(trajectory, 0, tmp_path / "views" / "zero.h5md")
    moved = tmp_path / "elsewhere"
    (moved / "views").mkdir(parents=True)
    shutil.move(trajectory, moved)
    shutil.move(tmp_path / "views" / "zero.h5md", moved / "views")
    with h5py.File(moved / "views" / "zero.h5md") as file:
        found = file["particles/trajectory/position/value"][()]
        assert file["h5md"].attrs["version"].tolist() == [1, 1]
    np.testing.assert_array_equal(found, joined(0, "positions"))


def test_a_trajectory_follows_h5md_where_readers_look(trajectory: Path) -> None:
    import h5py

    with h5py.File(trajectory) as file:
        root = file["replicas/0007"]
        box = root["particles/trajectory/box"]
        assert box.attrs["dimension"] == 3
        assert list(box.attrs["boundary"]) == ["periodic"] * 3
        position = root["particles/trajectory/position"]
        assert position["value"].attrs["unit"] == "Angstrom"
        assert position["value"].compression is None
        assert position["value"].chunks == (NUM_SEGMENTS * FRAMES, 5, 3)  # small frames share a chunk
        assert root["particles/trajectory/velocity/value"].attrs["unit"] == "Angstrom fs-1"
        assert root["particles/trajectory/forces/value"].attrs["unit"] == "eV Angstrom-1"
        assert position["time"].attrs["unit"] == "fs"
        for element in ("particles/trajectory/box/edges", "observables/trajectory/potential_energy"):
            assert root[element]["step"] == position["step"]  # the same object, not a copy
        assert root["h5md"] == file["h5md"]


def test_a_replica_that_stopped_early_keeps_its_frames_and_the_others_go_on(tmp_path: Path) -> None:
    write_segment(segment_path(tmp_path, 0), [block(0, 0), block(7, 0, frames=2)], {})
    write_segment(segment_path(tmp_path, 1), [block(0, 1), block(7, 1, frames=0), block(8, 1, frames=0)], {})
    write_segment(segment_path(tmp_path, 2), [block(0, 2)], {})
    consolidate(list_segments(tmp_path), tmp_path / "md.h5", {})
    with Trajectory(tmp_path / "md.h5") as opened:
        assert {replica: opened.num_frames(replica) for replica in opened.replicas} == {0: 12, 7: 2}


def test_a_checkpoint_can_be_read_without_the_frames(tmp_path: Path) -> None:
    path = segment_path(tmp_path, 0)
    write_segment(path, [block(7, 0), block(0, 0)], {"velocities": block(0, 0).velocities[-1]})
    blocks, checkpoint = read_segment(path)
    assert [one.replica for one in blocks] == [0, 7]
    nothing, again = read_segment(path, frames=False)
    assert nothing == []
    np.testing.assert_array_equal(again["velocities"], checkpoint["velocities"], strict=True)


def test_wrong_files_replicas_frames_and_names_are_named(trajectory: Path, tmp_path: Path) -> None:
    write_segment(segment_path(tmp_path, 0), [block(0, 0)], {})
    with pytest.raises(UserError, match=r"segment-0000.h5 is of kind segment, but trajectory is needed"):
        Trajectory(segment_path(tmp_path, 0))
    with pytest.raises(UserError, match="does not exist"):
        Trajectory(tmp_path / "none.h5")
    with Trajectory(trajectory) as opened:
        with pytest.raises(UserError, match=r"no replica 3; it holds 2 replicas \(0 to 7\)"):
            opened.num_frames(3)
        with pytest.raises(UserError, match="replica 7 has 12 frames, so there is no frame 12"):
            opened.frame(7, 12)
        with pytest.raises(UserError, match=r"has no 'charge'; it has numbers, .* descriptor, sane"):
            opened.array(0, "charge")
    with pytest.raises(UserError, match="no replica 3"):
        write_h5md_view(trajectory, 3, tmp_path / "view.h5md")


@pytest.mark.parametrize(
    "second, complaint",
    [
        (block(0, 0), "step 0 after step 30"),
        (block(0, 1, dtype=np.float64), "other observables, shapes or number types"),
    ],
)
def test_segments_that_do_not_continue_each_other_are_refused(
    tmp_path: Path, second: FrameBlock, complaint: str
) -> None:
    write_segment(segment_path(tmp_path, 0), [block(0, 0)], {})
    write_segment(segment_path(tmp_path, 1), [second], {})
    with pytest.raises(UserError, match=f"segment-0001.h5 does not continue.*replica 0 has {complaint}"):
        consolidate(list_segments(tmp_path), tmp_path / "md.h5", {})
    assert not (tmp_path / "md.h5").exists()


def test_no_segments_make_no_trajectory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run committed nothing yet"):
        consolidate([], tmp_path / "md.h5", {})


def test_inspection_summarises_each_replica_in_json(trajectory: Path, tmp_path: Path) -> None:
    report = json.loads(json.dumps(inspect_file(trajectory)))
    assert report["kind"] == "trajectory"
    assert report["provenance"]["model"] == "abc"
    summary = report["replicas"][1]
    energy = joined(7, "potential_energy")
    assert summary["replica"] == 7
    assert summary["formula"] == "Au3Cu2"
    assert (summary["num_atoms"], summary["num_frames"], summary["num_flagged_frames"]) == (5, 12, 3)
    assert (summary["first_step"], summary["last_step"], summary["last_time_fs"]) == (0, 110, 275.0)
    assert summary["potential_energy_eV"]["min"] == energy.min()
    assert summary["potential_energy_eV"]["mean"] == pytest.approx(energy.mean())
    write_segment(segment_path(tmp_path, 0), [block(7, 0)], {})
    segment = inspect_file(segment_path(tmp_path, 0))
    assert segment["kind"] == "segment"
    assert segment["replicas"][0]["num_frames"] == FRAMES
    assert inspect_file(trajectory)["num_bytes"] == trajectory.stat().st_size


def test_verification_finds_one_flipped_bit(trajectory: Path) -> None:
    assert verify_file(trajectory) == "trajectory"
    content = bytearray(trajectory.read_bytes())
    content[len(content) // 3] ^= 0x10
    trajectory.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256 is not the one"):
        verify_file(trajectory)

"""hpcft inspect, and what other commands write under a name that the user gives."""

from __future__ import annotations

import os
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from typer.testing import CliRunner, Result

from hpcft.cli.main import app
from hpcft.errors import UserError
from hpcft.models.files import save_model
from hpcft.models.morse import MorsePotential
from hpcft.storage.structures import write_structures
from hpcft.storage.trajectory import FrameBlock, Trajectory, consolidate, segment_path, write_segment

STEPS = [0, 10, 20]


def block(replica: int) -> FrameBlock:
    """Three frames of two atoms, the last without forces; a short observable and a long one."""
    random = np.random.default_rng(replica)
    positions, velocities, forces = random.normal(size=(3, 3, 2, 3)).astype(np.float32)
    forces[-1] = np.nan
    return FrameBlock(
        replica=replica,
        numbers=np.array([29, 29]),
        masses=np.full(2, 63.546),
        pbc=np.ones(3, dtype=bool),
        step=np.array(STEPS),
        time_fs=np.array(STEPS) * 1.0,
        positions=positions,
        velocities=velocities,
        forces=forces,
        cell=np.tile(np.eye(3) * 5, (3, 1, 1)),
        potential_energy=random.normal(size=3),
        temperature_K=random.normal(size=3),
        observables={"descriptor": random.normal(size=(3, 64)), "committee_energies": np.ones((3, 2))},
    )


@pytest.fixture
def trajectory(tmp_path: Path) -> Path:
    (tmp_path / "segments").mkdir()
    segment = segment_path(tmp_path / "segments", 0)
    write_segment(segment, [block(0), block(7)], {"0000": {}})
    consolidate([segment], tmp_path / "md.h5", {})
    return tmp_path / "md.h5"


def hpcft(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


def refused(message: str, *words: object) -> None:
    with pytest.raises(UserError, match=message):
        hpcft(*words)


# What is written where something is already


@pytest.mark.parametrize("option", ["--extxyz", "--h5md"])
def test_an_export_overwrites_nothing_unless_it_is_told_to_and_its_own_input_never(
    trajectory: Path, option: str
) -> None:
    sound, words = trajectory.read_bytes(), ("inspect", trajectory, "--replica", "0", option)
    out = trajectory.with_name("campaign.yaml")
    out.write_text("mine")
    refused("campaign.yaml is there already; .*--force", *words, out)
    assert out.read_text() == "mine"
    assert hpcft(*words, out, "--force").exit_code == 0
    assert out.read_bytes() != b"mine"
    hard, soft = trajectory.with_name("hard.h5"), trajectory.with_name("soft.h5")
    os.link(trajectory, hard)
    soft.symlink_to(trajectory)
    for itself in (trajectory, hard, soft):
        refused("is an input or a folder", *words, itself, "--force")
    assert trajectory.read_bytes() == sound


def test_a_model_is_not_exported_over_itself_nor_over_another_file(tmp_path: Path) -> None:
    model = tmp_path / "same.pt"
    save_model(model, MorsePotential([29], cutoff=4.0))
    sound = model.read_bytes()
    refused("is an input or a folder", "model", "export", model, model, "--force")
    (tmp_path / "mine.model").write_text("mine")
    refused("mine.model is there already", "model", "export", model, tmp_path / "mine.model")
    assert (model.read_bytes(), (tmp_path / "mine.model").read_text()) == (sound, "mine")


def test_a_foundation_model_that_is_there_is_not_made_again_over_it(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "campaigns" / "foundation" / "emt-metals.yaml"
    for there in ("mine.pt", "mine-replay.extxyz"):
        (tmp_path / there).write_text("mine")
        refused(f"{there} is there already", "model", "pretrain", recipe, "-o", tmp_path / "mine.pt")
        (tmp_path / there).unlink()


# Extended XYZ


def test_frames_come_back_from_extended_xyz_with_energy_and_forces_where_they_have_them(
    trajectory: Path,
) -> None:
    out = trajectory.with_name("out.extxyz")
    said = hpcft("inspect", trajectory, "--extxyz", out).output
    assert "6 structures" in said and "descriptor (64 numbers)" in said
    assert max(map(len, out.read_text().splitlines())) < 600
    frames = ase.io.read(out, ":")
    assert [(atoms.info["replica"], atoms.info["step"]) for atoms in frames] == [
        (replica, step) for replica in (0, 7) for step in STEPS
    ]
    with Trajectory(trajectory) as stored:
        expected = [atoms for replica in stored for atoms in stored[replica]]
    for found, atoms in zip(frames, expected, strict=True):
        assert found.get_potential_energy() == atoms.get_potential_energy()
        assert found.calc.results.keys() == atoms.calc.results.keys()
        assert ("forces" in found.calc.results) == (found.info["step"] < STEPS[-1])
        if "forces" in found.calc.results:
            np.testing.assert_array_equal(found.get_forces(), atoms.get_forces())
        np.testing.assert_array_equal(found.positions, atoms.positions)
        np.testing.assert_array_equal(found.get_momenta(), atoms.get_momenta())
        assert found.info["committee_energies"].tolist() == [1, 1]
        assert "descriptor" not in found.info


def test_no_frames_are_no_export(tmp_path: Path) -> None:
    write_structures(tmp_path / "none.h5", [])
    refused("holds no frames", "inspect", tmp_path / "none.h5", "--extxyz", tmp_path / "out.extxyz")
    assert not (tmp_path / "out.extxyz").exists()


# What is shown


def test_what_is_no_hdf5_file_is_told_apart_from_a_damaged_one(trajectory: Path) -> None:
    model = trajectory.with_name("model.pt")
    save_model(model, MorsePotential([29], cutoff=4.0))
    refused(r"model\.pt is no HDF5 file.*hpcft model info .*model\.pt", "inspect", model)
    refused(r"is a folder; name an HDF5 file in it, such as .*md\.h5", "inspect", trajectory.parent)
    trajectory.unlink()
    (trajectory.parent / "segments").rename(trajectory.with_name("segments-0000"))
    refused(r"such as .*segments-0000/segment-0000\.h5", "inspect", trajectory.parent)


def test_a_trajectory_whose_seal_is_broken_or_gone_is_shown_with_a_warning(trajectory: Path) -> None:
    assert hpcft("inspect", trajectory).stderr == ""
    content = trajectory.read_bytes()
    digest = content.index(b"sha256 ") + len(b"sha256 ")
    other = b"1" if content[digest : digest + 1] == b"0" else b"0"
    trajectory.write_bytes(content[:digest] + other + content[digest + 1 :])
    said = hpcft("inspect", trajectory)
    assert said.exit_code == 0 and "Cu2" in said.stdout
    assert "its SHA-256 is not the one that was written" in said.stderr
    trajectory.write_bytes(b"x" * 20 + content[20:])
    assert "has lost hpcft's seal" in hpcft("inspect", trajectory).stderr


def test_of_relaxations_the_energies_steps_and_forces_are_shown(tmp_path: Path) -> None:
    structures = [Atoms("Cu2", positions=np.eye(3)[:2] * 2.5) for _ in range(3)]
    for number, atoms in enumerate(structures):
        atoms.info = {"energy_start": -2.0, "energy_relaxed": -4.0 - number, "num_steps": 5 + number}
        atoms.info |= {"max_force": 0.01, "converged": int(number > 0)}
    write_structures(tmp_path / "relaxations.h5", structures)
    shown = hpcft("inspect", tmp_path / "relaxations.h5").stdout
    assert "none" not in shown.lower()
    assert "start energy per atom eV: -1 … -1" in shown
    assert "relaxed energy per atom eV: -3 … -2 (mean -2.5)" in shown
    assert "num steps: 5 … 7" in shown
    assert "max force eV per Angstrom: 0.01 … 0.01" in shown
    assert "num converged: 2" in shown
    for number, atoms in enumerate(structures):  # as the probe stage writes them
        atoms.info = {"model_energy": -2.0, "steps": 5 + number, "converged": 1}
    write_structures(tmp_path / "relaxed.h5", structures)
    shown = hpcft("inspect", tmp_path / "relaxed.h5").stdout
    assert "model energy per atom eV: -1 … -1" in shown and "num steps: 5 … 7" in shown

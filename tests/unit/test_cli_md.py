"""hpcft md: the command as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.io import write

from hpcft.cli.main import main
from hpcft.models.files import save_model
from hpcft.models.morse import MorsePotential
from hpcft.storage.trajectory import Trajectory

BASIC = ("in.extxyz", "--model", "morse.pt", "--steps", "40", "--frame-every", "5", "--segment-frames", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "morse.pt", MorsePotential([13, 29], cutoff=4.0, length=2.6).double())
    save_model(tmp_path / "other.pt", MorsePotential([13, 29], cutoff=4.0, length=2.7).double())
    crystal = bulk("Cu", a=3.6, cubic=True)
    slab = crystal.repeat((2, 1, 1))
    slab.set_constraint(FixAtoms([0]))
    write(tmp_path / "in.extxyz", [crystal, slab])
    return tmp_path


def in_this_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hpcft", "md", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def start(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, sys.executable, "-m", "hpcft", "md", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def frames(path: Path) -> dict[str, np.ndarray]:
    with Trajectory(path) as trajectory:
        return {
            f"{replica} {name}": trajectory.array(replica, name)
            for replica in trajectory.replicas
            for name in ("step", "positions", "velocities", "forces", "cell", "potential_energy")
        }


def test_it_leaves_a_trajectory_and_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*BASIC, "-o", "out", "--copies", "2", "--temperature", "200:600", "--rattle", "0.01")
    code, said, _ = in_this_process(folder, monkeypatch, capsys, *options)
    assert code == 0
    assert "segment 4 of 4" in said and "trajectory: out/trajectory.h5" in said
    found = frames(folder / "out" / "trajectory.h5")
    assert found["0 step"].tolist() == [5, 10, 15, 20, 25, 30, 35, 40]
    assert {name.split()[0] for name in found} == {"0", "1", "2", "3"}
    assert np.ptp(found["2 positions"][:, 0], axis=0).max() == 0  # fixed
    assert np.ptp(found["2 positions"][:, 1], axis=0).max() > 0.01
    assert not np.array_equal(found["0 positions"], found["1 positions"])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["run.json", "trajectory.h5"]

    before = (folder / "out" / "trajectory.h5").read_bytes()
    code, said, _ = in_this_process(folder, monkeypatch, capsys, *options)
    assert code == 0 and "segment" not in said  # it is over: nothing is run twice
    assert (folder / "out" / "trajectory.h5").read_bytes() == before


def test_velocities_and_forces_are_kept_as_often_as_was_asked_and_the_run_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    often = ("--velocities-every", "20", "--forces-every", "10")
    assert in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "all")[0] == 0
    assert in_this_process(folder, monkeypatch, capsys, *BASIC, *often, "-o", "some")[0] == 0
    everything, some = (frames(folder / name / "trajectory.h5") for name in ("all", "some"))
    steps = everything["0 step"]
    for name, values in everything.items():
        every = {"velocities": 20, "forces": 10}.get(name.split()[1], 1)
        kept = steps % every == 0
        np.testing.assert_array_equal(some[name][kept], values[kept], err_msg=name)
        assert every == 1 or np.isnan(some[name][~kept]).all()
    code, _, error = in_this_process(
        folder, monkeypatch, capsys, *BASIC, "--forces-every", "20", "-o", "some"
    )
    assert (
        code == 2 and "holds another run (forces-every: 10 -> 20, velocities-every: 20 -> not there)" in error
    )


def test_a_cell_under_pressure_shrinks_and_its_volume_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "in.extxyz", [bulk("Cu", a=3.6, cubic=True)] * 2)
    options = (*BASIC, "-o", "out", "--ensemble", "npt", "--pressure-GPa", "0:30", "--barostat-fs", "20")
    code, said, _ = in_this_process(folder, monkeypatch, capsys, *options)
    assert code == 0
    assert "V / Å³" in said
    cells = frames(folder / "out" / "trajectory.h5")["0 cell"]
    volumes = np.linalg.det(cells)
    assert volumes[-1] < 0.98 * volumes[0]


def test_killed_it_goes_on_to_the_same_frames(folder: Path) -> None:
    """Fails if a kill loses or repeats a frame, or if replicas go on from where they were not."""
    options = (
        *BASIC[:3],
        "--steps",
        "3000",
        "--frame-every",
        "10",
        "--segment-frames",
        "5",
        "--precision",
        "float64",
    )
    process = start(folder, *options, "-o", "undisturbed")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    kills = 0
    for _ in range(40):
        process = start(folder, *options, "-o", "out")
        segments = folder / "out" / "segments-0000"
        before = len(list(segments.glob("*.h5"))) if segments.exists() else 0
        while process.poll() is None and kills < 3:
            if segments.exists() and len(list(segments.glob("*.h5"))) > before + 5:
                process.send_signal(signal.SIGKILL)
                kills += 1
            time.sleep(0.01)
        process.communicate()
        if process.returncode == 0:
            break
    assert kills == 3
    undisturbed, found = (frames(folder / name / "trajectory.h5") for name in ("undisturbed", "out"))
    assert undisturbed.keys() == found.keys()
    for name, values in undisturbed.items():
        np.testing.assert_array_equal(found[name], values)


def test_two_ranks_give_the_trajectories_of_one(folder: Path) -> None:
    options = (*BASIC, "--copies", "2", "--precision", "float64")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python")
    alone, both = start(folder, *options, "-o", "alone"), None
    said, _ = alone.communicate()
    assert alone.returncode == 0, said
    both = start(folder, *options, "-o", "both", launcher=launcher)
    said, _ = both.communicate()
    assert both.returncode == 0, said
    assert {path.name for path in (folder / "both").glob("*.h5")} == {
        "rank-0000.h5",
        "rank-0001.h5",
        "trajectory.h5",
    }
    one, two = (frames(folder / name / "trajectory.h5") for name in ("alone", "both"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=0, atol=1e-8, err_msg=name)


def test_a_committee_says_how_far_it_spreads_and_stops_where_it_is_unsure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*BASIC, "--temperature", "1500", "--committee", "other.pt", "--q-reference", "in.extxyz")
    code, _, error = in_this_process(folder, monkeypatch, capsys, *options, "-o", "out")
    assert code == 0, error
    with Trajectory(folder / "out" / "trajectory.h5") as trajectory:
        spread = trajectory.array(0, "force_spread")
        assert (trajectory.array(0, "q_residual") > 1).all()  # all perfect crystals are alike
        assert trajectory.array(0, "committee_energies").shape == (8, 2)
        energies = trajectory.array(0, "committee_energies")[:, 0]
        np.testing.assert_allclose(energies, trajectory.array(0, "potential_energy"), rtol=1e-5)
    assert (spread > 0).all()
    limit = float(np.sort(spread)[-3])
    code, said, _ = in_this_process(
        folder, monkeypatch, capsys, *options, "-o", "stopped", "--max-spread", str(limit)
    )
    assert code == 1 and "force_spread" in said
    with Trajectory(folder / "stopped" / "trajectory.h5") as trajectory:
        last = trajectory.array(0, "force_spread")
        assert last[-1] > limit >= last[:-1].max(initial=0)
        assert trajectory.array(0, "at_stop").tolist() == [False] * (len(last) - 1) + [True]


def test_it_says_how_far_frames_are_from_what_is_known_and_stops_beyond_a_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cool dynamics is the reference of hot dynamics: explore until the model is unsure."""
    assert in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "cool")[0] == 0
    with Trajectory(folder / "cool" / "trajectory.h5") as trajectory:
        write(folder / "known.extxyz", [atoms for replica in trajectory for atoms in trajectory[replica]])
    reference = ("--q-reference", "known.extxyz")
    assert in_this_process(folder, monkeypatch, capsys, *BASIC, *reference, "-o", "again")[0] == 0
    with Trajectory(folder / "again" / "trajectory.h5") as trajectory:
        within = trajectory.array(1, "q_residual")
    assert 0 < within.max() < 1.01  # the same frames
    hot = (*BASIC, *reference, "--temperature", "3000")
    code, said, error = in_this_process(folder, monkeypatch, capsys, *hot, "-o", "hot")
    assert code == 0, error
    assert "principal components of 96 atoms" in said
    with Trajectory(folder / "hot" / "trajectory.h5") as trajectory:
        residuals = trajectory.array(1, "q_residual")
        assert trajectory.frame(1, -1).info["q_residual"] == residuals[-1]
    assert residuals.max() > 3
    limit = ("--max-q-residual", "2")
    code, said, _ = in_this_process(folder, monkeypatch, capsys, *hot, *limit, "-o", "stopped")
    assert code == 1 and "q_residual" in said
    with Trajectory(folder / "stopped" / "trajectory.h5") as trajectory:
        last = trajectory.array(1, "q_residual")
        assert last[-1] > 2 >= last[:-1].max(initial=0)
        assert trajectory.array(1, "at_stop").tolist() == [False] * (len(last) - 1) + [True]
        assert str(trajectory.checkpoint()["0001"]["stopped"]) == "q_residual"


def test_bad_input_is_refused_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crystal = bulk("Cu", a=3.6, cubic=True)
    close, gold, flat, left = crystal.copy(), crystal.copy(), crystal.copy(), crystal.copy()
    close.positions[1] = close.positions[0] + [0.3, 0, 0]
    gold.numbers[2] = 79
    flat.cell[2] = 0
    left.set_cell(left.cell.array[[1, 0, 2]])
    cluster = Atoms("Cu2", positions=[[0, 0, 0], [2.5, 0, 0]])
    cases = [
        ([crystal, close], (), "structure 1: atoms 0 and 1 are 0.30 Å apart"),
        ([gold, close], (), "structure 0: holds Au, which the model does not know; structure 1: atoms"),
        ([flat], (), "periodic along a cell vector of no length"),
        ([left], ("--ensemble", "npt"), "left-handed cell"),
        ([cluster], ("--ensemble", "npt"), "not periodic in all directions"),
        ([crystal], ("--temperature", "hot"), "--temperature is hot"),
        ([crystal], ("--temperature", "-3"), "--temperature is -3; it must not be below 0"),
        ([crystal], ("--timestep", "0"), "--timestep is 0"),
        ([crystal], ("--max-spread", "0.1"), "--committee"),
        ([crystal], ("--max-q-residual", "2"), "--q-reference"),
        ([crystal], ("--forces-every", "7"), "--forces-every is 7, and a frame is stored every 5 steps"),
        ([crystal], ("--model", "in.extxyz"), "in.extxyz is no model file"),
        ([crystal], ("--model", "gone.pt"), "there is no model file gone.pt"),
        ([crystal], ("--committee", "gone.pt"), "there is no model file gone.pt"),
        ([crystal], ("--q-reference", "gone.extxyz"), "gone.extxyz does not exist or is no file"),
        ([crystal], ("-o", "morse.pt"), "morse.pt is a file; name a folder"),
    ]
    for structures, options, message in cases:
        write(folder / "in.extxyz", structures)
        code, _, error = in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "out", *options)
        assert code == 2, (message, error)
        assert message in error, (message, error)
        assert "Traceback" not in error
        assert not (folder / "out").exists()


def test_a_folder_of_another_run_is_refused_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "out")[0] == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").glob("*.*")}
    for other, different in (
        (("--seed", "1"), "(seed: 0 -> 1)"),
        (("--steps", "50"), "(steps: 40 -> 50)"),
        (("--model", "other.pt"), "(models: the file's content has changed"),
        (("--temperature", "400"), "(max-temperature: 1500 -> 2000, temperature: 300 -> 400)"),
        (("--temperature", "300:200"), '(temperature: 300 -> "300:200")'),
        (("--friction-per-ps", "0.5"), "(friction-per-ps: 10 -> 0.5)"),
        (("--max-spread", "1", "--committee", "other.pt"), "max-spread: not there -> 1, models: "),
    ):
        code, _, error = in_this_process(folder, monkeypatch, capsys, *BASIC, *other, "-o", "out")
        assert code == 2
        assert "out holds another run" in error and different in error, error
        assert "cannot be made longer" in error
    assert {path.name: path.read_bytes() for path in (folder / "out").glob("*.*")} == before
    assert json.loads(before["run.json"])["stretch"]["steps"] == 40
    (folder / "training").mkdir()
    (folder / "training" / "run.json").write_text('{"model": "sha256:0"}')
    code, _, error = in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "training")
    assert code == 2 and "training holds another run (of another kind)" in error


def test_a_folder_of_a_campaign_is_no_folder_for_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "campaign.json").write_text("{}")
    code, _, error = in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "runs")
    assert code == 2 and "runs belongs to a campaign; choose another folder" in error
    assert [path.name for path in (folder / "runs").iterdir()] == ["campaign.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_without_a_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = in_this_process(folder, monkeypatch, capsys, *BASIC, "-o", "out", "--device", "cuda")
    assert code == 2 and "torch sees no GPU here" in error


def test_hydrogen_with_a_long_time_step_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(folder / "h.pt", MorsePotential([1], cutoff=3.0, length=0.8).double())
    write(folder / "h2.extxyz", Atoms("H2", positions=[[0, 0, 0], [0.8, 0, 0]]))
    rest = ("--model", "h.pt", "--steps", "2", "--frame-every", "1", "--min-distance", "0.3")
    code, _, error = in_this_process(
        folder, monkeypatch, capsys, "h2.extxyz", *rest, "--timestep", "2", "-o", "out"
    )
    assert code == 0
    assert "long for hydrogen" in error
    code, _, error = in_this_process(
        folder, monkeypatch, capsys, "h2.extxyz", *rest, "--timestep", "0.5", "-o", "out2"
    )
    assert code == 0
    assert "hydrogen" not in error

"""hpcft train: the command as a user types it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import write
from train_command import OPTIONS, command, labelled, write_files

from hpcft.cli.main import main
from hpcft.models.files import load_model
from hpcft.models.protocol import as_module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path)
    return tmp_path


def train(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *command(*options)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def in_this_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str]:
    """Exit code and standard error, without the seconds that a new Python takes."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hpcft", *command(*options)[3:]])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_model_figures_and_a_table(folder: Path) -> None:
    done = train(folder)
    assert done.returncode == 0, done.stderr
    assert "9 train, 4 validation; 3 steps an epoch, 1 ranks" in done.stdout
    rows = history(folder)
    kept = 1 + int(np.argmin([row["valid/loss"] for row in rows]))
    assert f"after: epoch {kept} of 6 kept" in done.stdout
    assert "warning" not in done.stdout
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["valid/loss"] < 0.5 * rows[0]["valid/loss"]
    assert all(row["structures_per_s"] > 0 and row["gradient_norm"] > 0 for row in rows)
    errors = json.loads((folder / "out" / "errors.json").read_text())
    for name in ("train", "validation"):
        key = "force_mae_meV_per_A"
        assert errors["after"][name][key] < 0.7 * errors["before"][name][key]
    for name in ("training.png", "parity.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    model = load_model(folder / "out" / "model.pt")
    best = min(row["valid/loss"] for row in rows)
    assert errors["after"]["validation"]["loss"] == pytest.approx(best, rel=1e-9)
    assert all(torch.isfinite(p).all() for p in as_module(model).parameters())

    before = (folder / "out" / "model.pt").read_bytes()
    again = train(folder)  # it is over: nothing is trained twice
    assert again.returncode == 0, again.stderr
    assert (folder / "out" / "model.pt").read_bytes() == before


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"),
            id="torchrun",
            marks=pytest.mark.nightly,  # two ranks are in every run under srun, and as plain processes
        ),
        pytest.param(
            ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"),
            id="mpirun",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_two_ranks_of_any_launcher_train_as_one_does(folder: Path, launcher: tuple[str, ...]) -> None:
    """Fails if each rank trains alone, which looks the same from outside."""
    done = train(folder)
    assert done.returncode == 0, done.stderr
    alone = history(folder)
    (folder / "out").rename(folder / "alone")
    done = train(folder, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    for ours, theirs in zip(history(folder), alone, strict=True):
        for key in ("loss", "valid/loss", "labels/forces", "gradient_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10)


def test_killed_it_goes_on_to_the_same_bits_and_a_signal_only_makes_it_save(folder: Path) -> None:
    """Guards that SIGUSR2, by which Slurm announces the end, is no end; and that what it saves is taken up."""
    (folder / "train.yaml").write_text(
        "precision: float64\nbatch_size: 3\nsteps_per_epoch: 300\ncheckpoint_every_epochs: 2\n"
    )
    options = (
        "--model",
        "morse.pt",
        "--data",
        "a.extxyz",
        "--valid",
        "valid.extxyz",
        "--config",
        "train.yaml",
        "--epochs",
        "2",
    )
    assert train(folder, *options, "-o", "undisturbed").returncode == 0
    out = folder / "out"
    argv = [sys.executable, "-m", "hpcft", "train", *options, "-o", "out"]
    process = subprocess.Popen(
        argv, cwd=folder, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while not (
            out / "metrics.jsonl"
        ).exists():  # the first epoch is over, and no checkpoint of it is written
            assert process.poll() is None
            time.sleep(0.01)
        assert not list(out.glob("checkpoint-*.pt"))
        process.send_signal(signal.SIGUSR2)
        while not list(out.glob("checkpoint-000001-*.pt")):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (out / "model.pt").exists()
    assert train(folder, *options, "-o", "out").returncode == 0
    models = [
        as_module(load_model(folder / name / "model.pt")).state_dict() for name in ("undisturbed", "out")
    ]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_folder_of_another_training_is_refused_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, *OPTIONS, "--epochs", "1").returncode == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    for other in (("--epochs", "2"), ("--epochs", "1", "--data", "valid.extxyz")):
        code, error = in_this_process(folder, monkeypatch, capsys, *OPTIONS, *other)
        assert code == 2
        assert "holds another training" in error
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_validation_data_that_is_trained_on_as_well_is_warned_of(folder: Path) -> None:
    (folder / "link.extxyz").symlink_to("b.extxyz")
    done = train(folder, *OPTIONS, "--valid", "link.extxyz", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert f"warning: {folder / 'b.extxyz'} is training data and validation data" in done.stdout


def test_bad_input_is_refused_before_anything_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    xenon = labelled(2, 0)
    xenon[1].numbers[0] = 54
    write(folder / "xenon.extxyz", xenon)
    plain = labelled(2, 0)
    for atoms in plain:
        atoms.info["my_energy"] = atoms.info.pop("REF_energy")
        del atoms.arrays["REF_forces"]
    write(folder / "plain.extxyz", plain)
    absurd = labelled(3, 0)
    absurd[2].arrays["REF_forces"][1, 1] = np.nan
    write(folder / "absurd.extxyz", absurd)
    (folder / "wrong.yaml").write_text("epoch: 3\n")
    (folder / "runs").mkdir()
    (folder / "runs" / "campaign.json").write_text("{}")
    rest = ("--valid", "valid.extxyz", "-o", "out")
    cases = [
        (("--data", "xenon.extxyz", *rest), "Xe, which the model does not know"),
        (("--data", "plain.extxyz", *rest), "plain.extxyz"),
        (("--data", "absurd.extxyz", *rest), "frame 2 of absurd.extxyz"),
        (("--data", "none.extxyz", *rest), "none.extxyz"),
        (("--data", "a.extxyz", *rest, "--config", "wrong.yaml"), "epoch"),
        (("--data", "a.extxyz", *rest, "--learning-rate", "-1"), "learning_rate"),
        (("--data", "a.extxyz", "--valid", "valid.extxyz", "-o", "a.extxyz"), "is a file"),
        (("--data", "a.extxyz", "--valid", "valid.extxyz", "-o", "runs"), "runs belongs to a campaign"),
    ]
    if importlib.util.find_spec("tensorboard") is None:
        cases.append((("--data", "a.extxyz", *rest, "--tensorboard"), "tensorboard is not installed"))
    for options, message in cases:
        code, error = in_this_process(folder, monkeypatch, capsys, "--model", "morse.pt", *options)
        assert code == 2, (options, error)
        assert message in error, (options, error)
        assert "Traceback" not in error
        assert not (folder / "out" / "model.pt").exists()


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    copper = []
    for atoms in labelled(8, 0):
        atoms.numbers[:] = 29
        copper.append(atoms)
    (tmp_path / "example.py").write_text(program)
    errors = runpy.run_path("example.py", init_globals={"labelled": copper})["outcome"]
    assert errors.after["validation"]["loss"] < errors.before["validation"]["loss"]

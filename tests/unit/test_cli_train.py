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
from ase import Atoms
from ase.build import bulk
from ase.io import write

from hpcft.models.files import load_model, save_model
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import as_module, evaluate

OPTIONS = (
    "--model",
    "morse.pt",
    "--data",
    "a.extxyz",
    "--data",
    "b.extxyz",
    "--valid",
    "valid.extxyz",
    "-o",
    "out",
)


def labelled(number: int, first: int) -> list[Atoms]:
    teacher = MorsePotential([13, 29], cutoff=4.0, length=2.6).double()
    found = []
    for seed in range(first, first + number):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.numbers[seed % 4] = 13
        atoms.rattle(0.15, seed=seed)
        result = evaluate(teacher, build_graph([atoms], 4.0))
        atoms.info["REF_energy"] = float(result.energies_b[0])
        atoms.arrays["REF_forces"] = result.forces_n3.numpy()
        found.append(atoms)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "morse.pt", MorsePotential([13, 29], cutoff=4.0, length=2.8).double())
    write(tmp_path / "a.extxyz", labelled(6, 0))
    write(tmp_path / "b.extxyz", labelled(3, 6))
    write(tmp_path / "valid.extxyz", labelled(4, 20))
    (tmp_path / "train.yaml").write_text(
        "learning_rate: 0.02\nprecision: float64\nweights: {energy: 1}\nema: 0.8\nbatch_size: 3\n"
    )
    return tmp_path


def train(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [
        *launcher,
        sys.executable,
        "-m",
        "hpcft",
        "train",
        *(options or (*OPTIONS, "--config", "train.yaml", "--epochs", "6")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        argv, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=600
    )


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_model_figures_and_a_table(folder: Path) -> None:
    done = train(folder)
    assert done.returncode == 0, done.stderr
    assert "9 train, 4 validation; 3 steps an epoch, 1 ranks" in done.stdout
    assert "best epoch:" in done.stdout
    rows = history(folder)
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


def test_a_folder_of_another_training_is_refused_and_kept(folder: Path) -> None:
    assert train(folder, *OPTIONS, "--epochs", "1").returncode == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    for other in (("--epochs", "2"), ("--epochs", "1", "--data", "valid.extxyz")):
        done = train(folder, *OPTIONS, *other)
        assert done.returncode == 2
        assert "holds another training" in done.stderr
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_bad_input_is_refused_before_anything_is_trained(folder: Path) -> None:
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
    rest = ("--valid", "valid.extxyz", "-o", "out")
    cases = [
        (("--data", "xenon.extxyz", *rest), "Xe, which the model does not know"),
        (("--data", "plain.extxyz", *rest), "plain.extxyz"),
        (("--data", "absurd.extxyz", *rest), "frame 2 of absurd.extxyz"),
        (("--data", "none.extxyz", *rest), "none.extxyz"),
        (("--data", "a.extxyz", *rest, "--config", "wrong.yaml"), "epoch"),
        (("--data", "a.extxyz", *rest, "--learning-rate", "-1"), "learning_rate"),
        (("--data", "a.extxyz", "--valid", "valid.extxyz", "-o", "a.extxyz"), "is a file"),
    ]
    if importlib.util.find_spec("tensorboard") is None:
        cases.append((("--data", "a.extxyz", *rest, "--tensorboard"), "tensorboard is not installed"))
    for options, message in cases:
        done = train(folder, "--model", "morse.pt", *options)
        assert done.returncode == 2, (options, done.stdout, done.stderr)
        assert message in done.stderr, (options, done.stderr)
        assert "Traceback" not in done.stderr
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

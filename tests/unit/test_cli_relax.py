"""hpcft relax: the command as a user types it, with a small Morse model."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.constraints import FixAtoms, FixedPlane
from ase.io import read, write
from typer.testing import CliRunner

from hpcft.cli.main import app
from hpcft.errors import UserError
from hpcft.models.files import load_model, save_model
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.relaxation import OPTIMISERS, relax

HPCFT = str(Path(sys.executable).with_name("hpcft"))


def starts() -> list[Atoms]:
    alloy = bulk("Cu", a=3.7, cubic=True)
    alloy.numbers[::2] = 13
    crystal, vacancy = alloy.copy(), alloy.repeat((2, 1, 1))
    del vacancy[3]
    crystal.rattle(0.1, seed=1)
    vacancy.rattle(0.1, seed=2)
    vacancy.set_constraint(FixAtoms([0]))
    vacancy.info["name"] = "a vacancy"
    return [crystal, vacancy]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "morse.pt", MorsePotential([13, 29], cutoff=4.0).double())
    write(folder / "starts.extxyz", starts())
    return folder


@dataclass
class Done:
    """What is left of a command."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with links to the inputs."""
    for path in inputs.iterdir():
        os.link(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real(folder: Path) -> Command:
    """The command as a process of its own."""

    def run(file: str, *options: str) -> Done:
        argv = [HPCFT, "relax", file, "--model", "morse.pt", *options]
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def command(folder: Path) -> Command:
    """The same in this process, which has imported torch already."""

    def run(file: str, *options: str) -> Done:
        done = CliRunner().invoke(app, ["relax", file, "--model", "morse.pt", *options])
        if done.exception is None or isinstance(done.exception, SystemExit):
            return Done(done.exit_code, done.stdout, done.stderr)
        assert isinstance(done.exception, UserError), done.exception  # the command's own exit code 2
        return Done(2, done.stdout, str(done.exception))

    return run


def test_it_writes_what_the_library_finds_and_a_table_of_it(real: Command, folder: Path) -> None:
    done = real("starts.extxyz", "--table", "table.csv", "--fmax", "0.002")
    assert (done.returncode, done.stderr) == (0, "")
    potential = load_model(folder / "morse.pt")
    given = read(folder / "starts.extxyz", ":")
    expected = relax(potential, given, fmax=0.002)
    written = read(folder / "starts-relaxed.extxyz", ":")
    with (folder / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(written) == len(rows) == 2
    for number, (atoms, result, row) in enumerate(zip(written, expected, rows, strict=True)):
        np.testing.assert_allclose(atoms.positions, result.atoms.positions, atol=1e-9)
        assert atoms.info["model_energy"] == pytest.approx(result.energy, abs=1e-9)
        assert (bool(atoms.info["converged"]), atoms.info["num_steps"]) == (True, result.num_steps)
        forces = evaluate(potential, build_graph([atoms], potential.cutoff)).forces_n3.numpy()
        fixed = [0] if number == 1 else []
        free = np.delete(np.arange(len(atoms)), fixed)
        np.testing.assert_allclose(atoms.arrays["model_forces"][free], forces[free], atol=1e-9)
        assert not atoms.arrays["model_forces"][fixed].any()
        assert [row["number"], row["atoms"], row["converged"]] == [str(number), str(len(atoms)), "True"]
        assert float(row["energy_before_eV"]) == pytest.approx(result.energy_start)
        assert float(row["energy_after_eV"]) == pytest.approx(result.energy)
        assert float(row["max_force_eV_per_A"]) < 0.002
        moved = np.linalg.norm(atoms.positions - given[number].positions, axis=1).max()
        assert float(row["max_displacement_A"]) == pytest.approx(moved, abs=1e-9)
        assert "volume_change_percent" not in row
    np.testing.assert_array_equal(written[1].positions[0], given[1].positions[0])
    assert written[1].info["name"] == "a vacancy"
    assert written[1].constraints[0].index.tolist() == [0]
    assert "2 of 2 converged" in done.stdout
    assert "Al2Cu2" in done.stdout


def test_with_the_cell_it_says_how_the_volume_changed_and_the_stress_is_gone(
    command: Command, folder: Path
) -> None:
    options = ["--cell", "--optimiser", "lbfgs", "--max-stress-GPa", "0.05", "--table", "table.csv"]
    done = command("starts.extxyz", *options, "-o", "other.xyz")
    assert done.returncode == 0, done.stderr
    potential = load_model(folder / "morse.pt")
    with (folder / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for before, after, row in zip(
        read(folder / "starts.extxyz", ":"),
        read(folder / "other.xyz", ":", format="extxyz"),
        rows,
        strict=True,
    ):
        graph = build_graph([after], potential.cutoff)
        stress = evaluate(potential, graph, stress=True).stress_b33
        assert stress is not None
        assert float(stress.abs().max()) < 0.05 * units.GPa
        assert float(row["max_stress_GPa"]) == pytest.approx(float(stress.abs().max()) / units.GPa, rel=1e-4)
        change = 100 * (after.get_volume() / before.get_volume() - 1)
        assert abs(change) > 1
        assert float(row["volume_change_percent"]) == pytest.approx(change, rel=1e-6)


def test_a_structure_that_does_not_converge_is_written_too_and_the_exit_code_is_1(
    real: Command, folder: Path
) -> None:
    done = real("starts.extxyz", "--max-steps", "3", "--precision", "float32", "--batch-atoms", "4")
    assert (done.returncode, done.stderr) == (1, "")
    assert "0 of 2 converged" in done.stdout
    written = read(folder / "starts-relaxed.extxyz", ":")
    assert [(bool(a.info["converged"]), a.info["num_steps"]) for a in written] == [(False, 3)] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_keeps_what_had_ended(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("hpcft.cli.relax._SAVE_EVERY_S", 0)
    alone = Atoms("Cu", info={"name": "without forces"})
    write(folder / "mixed.extxyz", [starts()[0], alone])
    target = folder / "mixed-relaxed.extxyz"

    def interrupt() -> None:
        while not target.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = command("mixed.extxyz", "--fmax", "1e-300", "--max-steps", "1000000000", "--table", "table.csv")
    thread.join()
    assert done.returncode == 130
    assert "1 of 2 converged" in done.stdout
    assert "interrupted: 1 had not ended" in done.stdout
    (atoms,) = read(target, ":")
    assert (atoms.info["name"], atoms.info["input_index"]) == ("without forces", 1)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["number"] for row in rows] == ["1"]


def test_what_is_there_is_overwritten_only_by_force(command: Command, folder: Path) -> None:
    target = folder / "starts-relaxed.extxyz"
    target.write_text("precious")
    done = command("starts.extxyz")
    assert (done.returncode, done.stdout) == (2, "")
    assert "starts-relaxed.extxyz is there already" in done.stderr
    assert target.read_text() == "precious"
    assert command("starts.extxyz", "--force").returncode == 0
    assert len(read(target, ":")) == 2


def spoilt(change: str) -> list[Atoms]:
    structures = starts()
    bad = structures[1]
    if change == "element":
        bad.numbers[4] = 26
    elif change == "constraint":
        bad.set_constraint(FixedPlane([0], [0, 0, 1]))
    elif change == "no atoms":
        structures[1] = Atoms(cell=[3, 3, 3], pbc=True)
    elif change == "NaN":
        bad.positions[2, 0] = np.nan
    elif change == "open":
        structures[1] = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]])
    elif change == "no cell":
        structures[1] = Atoms("Cu", pbc=True)
    return structures


def test_a_mistake_is_one_message_without_a_traceback_and_exit_code_2(real: Command, folder: Path) -> None:
    write(folder / "bad.extxyz", [bulk("Fe")])
    done = real("bad.extxyz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "hpcft: structure 0 of bad.extxyz (Fe) holds Fe, which the model does not know"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("element", [], r"structure 1 of bad.traj (Al4Cu2Fe)"),
        ("element", [], r"holds Fe, which the model does not know"),
        ("constraint", [], "structure 1 of bad.traj (Al4Cu3) has the constraint FixedPlane"),
        ("no atoms", [], "structure 1 of bad.traj has no atoms"),
        ("NaN", [], "structure 1 of bad.traj has positions or cell vectors that are no numbers"),
        ("open", ["--cell"], "structure 1 of bad.traj has no periodic cell to relax"),
        ("no cell", [], "structure 1 of bad.traj is periodic but lacks a cell vector"),
    ],
)
def test_a_structure_that_cannot_be_relaxed_is_named_before_anything_is_computed(
    command: Command, folder: Path, change: str, options: list[str], message: str
) -> None:
    write(folder / "bad.traj", spoilt(change))
    before = sorted(folder.iterdir())
    done = command("bad.traj", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("gone.extxyz", [], "gone.extxyz does not exist"),
        ("empty.extxyz", [], "empty.extxyz is empty"),
        ("text.extxyz", [], "text.extxyz cannot be read by ASE"),
        ("starts.extxyz", ["--fmax", "0"], "--fmax is 0.0; it must be positive"),
        ("starts.extxyz", ["--fmax", "nan"], "--fmax is nan; it must be positive"),
        ("starts.extxyz", ["--model", "gone.pt"], "there is no model file gone.pt"),
        ("starts.extxyz", ["-o", "out.cif"], "only extended XYZ is written"),
        ("starts.extxyz", ["-o", "gone/out.extxyz"], "there is no folder gone to write out.extxyz to"),
        ("starts.extxyz", ["-o", "starts.extxyz", "--force"], "is an input or a folder"),
        ("starts.extxyz", ["-o", "a.xyz", "--table", "a.xyz"], "cannot hold both"),
        ("starts.extxyz", ["--optimiser", "magic"], "magic"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2(
    command: Command, folder: Path, file: str, options: list[str], message: str
) -> None:
    (folder / "empty.extxyz").touch()
    (folder / "text.extxyz").write_text("two\nlines of nothing\n")
    before = sorted(folder.iterdir())
    done = command(file, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(command: Command) -> None:
    done = command("starts.extxyz", "--device", "cuda")
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr


def test_of_many_structures_those_are_shown_that_did_not_converge(command: Command, folder: Path) -> None:
    at_rest = relax(load_model(folder / "morse.pt"), starts()[:1], fmax=1e-3)[0].atoms
    write(folder / "many.extxyz", [at_rest] * 44 + starts()[1:])
    done = command("many.extxyz", "--max-steps", "1")
    assert done.returncode == 1
    assert "and 5 more; --table writes all of them" in done.stdout
    assert "Al4Cu3" in done.stdout
    assert "44 of 45 converged" in done.stdout


def test_the_commands_start_without_torch_and_know_every_optimiser() -> None:
    code = "import sys, hpcft.cli.main; sys.exit(bool({'torch', 'mace', 'ase', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    from hpcft.cli.relax import Optimiser

    assert {optimiser.value for optimiser in Optimiser} == set(OPTIMISERS)

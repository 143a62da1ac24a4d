"""Models that leave hpcft as MACE files, and MACE files that come in: with MACE's own programs on the other side."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.models.files import export_mace, load_model, save_model, sha256_of
from hpcft.models.graph import build_graph
from hpcft.models.protocol import Evaluation, Potential, as_module, evaluate
from hpcft.models.trust import trust
from hpcft.training.data import LabelledSet
from hpcft.training.trainer import Lora, Trainer, TrainingData, TrainingSettings

FOUNDATION = Path(__file__).parents[2] / "campaigns" / "foundation" / "emt-metals.pt"


@pytest.fixture(scope="module", params=["changed", "trained"])
def foundation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Potential:
    """The shipped foundation, its weights changed a little; or trained with LoRA, after its zero of energy has moved."""
    potential = load_model(FOUNDATION, dtype=torch.float64)
    if request.param == "trained":
        potential.shift_energies({13: -50.0, 29: 7.5})
        atoms = structures()[0]
        atoms.info["REF_energy"] = 8 * -3.5 - 35.0
        atoms.arrays["REF_forces"] = np.zeros((8, 3))
        data = TrainingData(LabelledSet([atoms], potential.cutoff, torch.float64))
        settings = TrainingSettings(3, 1, learning_rate=0.02, lora=Lora(2, 2.0), ema=0.5)
        Trainer(potential, data, settings).run(tmp_path_factory.mktemp("training"))
        return potential
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in as_module(potential).parameters():
            parameter.mul_(1.0 + 0.01 * torch.randn_like(parameter))
    return potential


@pytest.fixture(scope="module")
def exported(foundation: Potential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "fine-tuned.model"
    export_mace(foundation, path)
    return path


def structures() -> list[Atoms]:
    alloy = bulk("Cu", a=3.8, cubic=True).repeat((2, 1, 1))
    alloy.set_chemical_symbols(["Cu", "Au", "Pd", "Cu", "Al", "Ni", "Ag", "Pt"])
    alloy.rattle(0.1, seed=0)
    cluster = Atoms("Au3Cu", positions=[[0, 0, 0], [2.7, 0, 0], [0, 2.8, 0.3], [1.2, 1, 2.3]])
    return [alloy, cluster]


def by_hpcft(potential: Potential, atoms: Atoms, stress: bool = False) -> Evaluation:
    return evaluate(potential, build_graph([atoms], potential.cutoff), stress=stress)


@pytest.fixture
def default_dtype_kept() -> Iterator[None]:
    """MACECalculator sets torch's default dtype for the whole process."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_an_exported_model_gives_the_same_results_in_maces_ase_calculator(
    foundation: Potential, exported: Path, default_dtype_kept: None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch.load, torch.jit and the calculator's own, of mace-torch 0.3.16
        from mace.calculators import MACECalculator

        calculator = MACECalculator(model_paths=str(exported), device="cpu", default_dtype="float64")
        for atoms in structures():
            expected = by_hpcft(foundation, atoms, stress=bool(atoms.pbc.all()))
            assert expected.forces_n3.abs().max() > 0.1
            atoms.calc = calculator
            assert atoms.get_potential_energy() == pytest.approx(float(expected.energies_b), abs=1e-9)
            np.testing.assert_allclose(atoms.get_forces(), expected.forces_n3.numpy(), atol=1e-9)
            if expected.stress_b33 is not None:
                stress = atoms.get_stress(voigt=False)
                np.testing.assert_allclose(stress, expected.stress_b33[0].numpy(), atol=1e-10)


def test_lammps_export_takes_the_model_and_torch_loads_the_result(exported: Path) -> None:
    command = [Path(sys.executable).parent / "mace_create_lammps_model", exported.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=exported.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = exported.parent.glob("*-lammps.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit itself, in torch 2.13
        scripted = torch.jit.load(str(result))
    assert scripted.r_max.item() == pytest.approx(5.0)
    assert scripted.atomic_numbers.tolist() == [13, 28, 29, 46, 47, 78, 79]


def test_an_exported_model_comes_back_once_it_is_trusted(
    foundation: Potential, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(tmp_path / "trusted.json"))
    with pytest.raises(UserError, match="hpcft model import"):
        load_model(exported)
    trust(sha256_of(exported), exported)
    loaded = load_model(exported)
    for atoms in structures():
        a, b = by_hpcft(foundation, atoms), by_hpcft(loaded, atoms)
        assert torch.equal(a.energies_b, b.energies_b) and torch.equal(a.forces_n3, b.forces_n3)
    # From there on it is a model of ours: no pickle any more.
    save_model(tmp_path / "ours.pt", loaded)
    again = load_model(tmp_path / "ours.pt")
    for atoms in structures():
        assert torch.equal(by_hpcft(again, atoms).forces_n3, by_hpcft(loaded, atoms).forces_n3)


def test_a_model_of_single_precision_exports_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(tmp_path / "trusted.json"))
    shipped, path = load_model(FOUNDATION), tmp_path / "shipped.model"
    export_mace(shipped, path)
    trust(sha256_of(path), path)
    loaded = load_model(path)
    for (name, a), b in zip(
        as_module(shipped).state_dict().items(), as_module(loaded).state_dict().values(), strict=True
    ):
        assert a.dtype == b.dtype and torch.equal(a, b), name

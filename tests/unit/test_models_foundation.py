"""The shipped foundation model: the file that was measured, its file format, and how good it is at home."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT

from hpcft.config.pretrain import load_recipe
from hpcft.models.files import elements_of_file, load_model, read_header, save_model, sha256_of
from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, as_module, evaluate
from hpcft.training.crystals import at_equilibrium, crystals, disturbed

FOLDER = Path(__file__).parents[2] / "campaigns" / "foundation"
FILE = FOLDER / "emt-metals.pt"


@pytest.fixture(scope="module")
def foundation() -> Potential:
    return load_model(FILE)


def test_the_shipped_file_is_the_one_whose_hash_is_written_beside_it() -> None:
    digest, name = (FOLDER / "emt-metals.sha256").read_text().split()
    assert (digest, name) == (sha256_of(FILE), FILE.name)
    subprocess.run(["sha256sum", "--check", "--strict", "emt-metals.sha256"], cwd=FOLDER, check=True)


def test_a_mace_model_comes_back_from_its_file_bit_for_bit(tmp_path: Path, foundation: Potential) -> None:
    header = read_header(FILE)
    assert header["architecture"] == "mace"
    digest = save_model(tmp_path / "copy.pt", foundation, header["provenance"])
    assert digest == sha256_of(FILE)
    loaded = load_model(tmp_path / "copy.pt")
    graph = build_graph([fresh_crystals(1)[0]], loaded.cutoff, dtype=torch.float32)
    assert torch.equal(evaluate(loaded, graph).forces_n3, evaluate(foundation, graph).forces_n3)
    for (name, a), (other, b) in zip(
        as_module(foundation).state_dict().items(), as_module(loaded).state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name


def test_the_model_knows_the_seven_metals_of_emt(foundation: Potential) -> None:
    assert set(foundation.elements) == elements_of_file(FILE) == {13, 28, 29, 46, 47, 78, 79}


SYMBOLS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")


def test_the_atomic_energies_in_the_file_are_those_of_emt() -> None:
    written = read_header(FILE)["configuration"]["atomic_energies"][0]
    expected = []
    for symbol in SYMBOLS:  # in order of atomic number
        atom = Atoms(symbol, cell=[20, 20, 20], pbc=True)
        atom.calc = EMT()
        expected.append(atom.get_potential_energy())
    assert written == pytest.approx(expected, abs=1e-6)


def test_an_atom_alone_has_the_energy_that_emt_gives_it(foundation: Potential) -> None:
    for symbol in SYMBOLS:
        atom = Atoms(symbol, cell=[20, 20, 20], pbc=True)
        energy = float(
            evaluate(foundation, build_graph([atom], foundation.cutoff, dtype=torch.float32)).energies_b
        )
        atom.calc = EMT()
        assert energy == pytest.approx(atom.get_potential_energy(), abs=1e-5), symbol


def fresh_crystals(count: int) -> list[Atoms]:
    """Crystals of the recipe that the training never saw: another seed; labelled by EMT."""
    recipe = load_recipe(FOLDER / "emt-metals.yaml")
    random = np.random.default_rng(20240101)
    kinds = [crystal for _, crystal in crystals(recipe.elements, recipe.data.crystals)]
    found = []
    for index in random.permutation(len(kinds))[:count]:
        atoms = at_equilibrium(kinds[index], EMT())
        atoms = disturbed(atoms, recipe.data.repeat, recipe.data.max_strain, recipe.data.rattle, random)
        atoms.calc = EMT()
        found.append(atoms)
    return found


def test_it_is_good_on_fresh_crystals_of_the_kind_it_learnt_from(foundation: Potential) -> None:
    errors, predicted, reference = [], [], []
    for atoms in fresh_crystals(25):
        result = evaluate(foundation, build_graph([atoms], foundation.cutoff, dtype=torch.float32))
        errors.append(abs(float(result.energies_b) - atoms.get_potential_energy()) / len(atoms))
        predicted.append(result.forces_n3.numpy().ravel())
        reference.append(atoms.get_forces().ravel())
    p, r = np.concatenate(predicted), np.concatenate(reference)
    assert np.abs(r).mean() > 0.2  # there are forces to get wrong
    assert 1e3 * np.mean(errors) < 15  # meV/atom
    assert float(p @ r / (r @ r)) == pytest.approx(1.0, abs=0.05)

"""The shipped silicon model: the file that was measured, what it knows, and how good it is at home."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from hpcft.config.pretrain import load_recipe
from hpcft.labelling.classical import tersoff
from hpcft.labelling.teacher import mace
from hpcft.models.files import elements_of_file, sha256_of
from hpcft.training.crystals import at_equilibrium, crystals, disturbed

FOLDER = Path(__file__).parents[2] / "campaigns" / "foundation"
FILE = FOLDER / "silicon-tersoff.pt"
BOND = 2.3517  # Å, of silicon under Tersoff's potential of 1989: a = 5.432 Å


def test_the_shipped_file_is_the_one_whose_hash_is_written_beside_it() -> None:
    assert (FOLDER / "silicon-tersoff.sha256").read_text().split() == [sha256_of(FILE), FILE.name]


def test_it_knows_silicon_alone_and_a_lone_atom_has_no_energy() -> None:
    assert elements_of_file(FILE) == {14}
    atom = Atoms("Si", cell=[20, 20, 20], pbc=True)
    atom.calc = mace(str(FILE))
    assert atom.get_potential_energy() == pytest.approx(0.0, abs=1e-5)


def test_diamond_is_made_of_eight_atoms_with_four_bonds_each_of_the_reference_s_length() -> None:
    ((name, atoms),) = crystals(["Si"], ["diamond"])
    relaxed = at_equilibrium(atoms, tersoff())
    distances = relaxed.get_all_distances(mic=True)
    neighbours = np.sort(distances, axis=1)[:, 1:5]
    assert (name, len(atoms)) == ("diamond-Si8", 8)
    assert neighbours == pytest.approx(np.full((8, 4), BOND), abs=2e-3)


def test_it_is_good_on_fresh_crystals_of_the_kind_it_learnt_from() -> None:
    data = load_recipe(FOLDER / "silicon-tersoff.yaml").data
    random = np.random.default_rng(20240101)
    ((_, atoms),) = crystals(["Si"], data.crystals)
    equilibrium = at_equilibrium(atoms, tersoff())
    errors, predicted, reference = [], [], []
    for _ in range(12):
        fresh = disturbed(equilibrium, 1, data.max_strain, data.rattle, random)
        found = []
        for calculator in (mace(str(FILE)), tersoff()):
            fresh.calc = calculator
            found.append((fresh.get_potential_energy() / len(fresh), fresh.get_forces().ravel()))
        errors.append(abs(found[0][0] - found[1][0]))
        predicted.append(found[0][1])
        reference.append(found[1][1])
    p, r = np.concatenate(predicted), np.concatenate(reference)
    assert np.abs(r).mean() > 0.2  # there are forces to get wrong
    assert 1e3 * np.mean(errors) < 5  # meV/atom
    assert 1e3 * np.abs(p - r).mean() < 80  # meV/Å
    assert float(p @ r / (r @ r)) == pytest.approx(1.0, abs=0.05)

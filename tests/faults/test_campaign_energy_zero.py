"""A reference with another zero of energy than the foundation's, and a campaign with every option of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from tiny import CAMPAIGN, hpcft, hpcft_to_end, write_campaign

from hpcft.storage.structures import write_extxyz

OFFSET = -250.0  # eV for each atom


def write_replay(path: Path) -> None:
    """What the foundation has seen, with EMT's own zero."""
    found = []
    for seed in range(6):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.rattle(0.05, seed=seed)
        calculator = EMT()
        atoms.info["REF_energy"] = float(calculator.get_potential_energy(atoms))
        atoms.arrays["REF_forces"] = calculator.get_forces(atoms)
        found.append(atoms)
    write_extxyz(path, found)


@pytest.fixture
def calculators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def campaign(folder: Path, **train: Any) -> Path:
    changes = {
        "rounds": 2,
        "reference": {
            "calculator": "calculators.OtherZeroEMT",
            "arguments": {"offset": OFFSET},
            "elements": ["Cu"],
        },
        "train": {**CAMPAIGN["train"], **train},
    }
    file = write_campaign(folder, changes)
    write_replay(folder / "replay.extxyz")
    return file


def product(root: Path, stage: str) -> Any:
    return json.loads((root / stage / "product.json").read_text())


def test_it_is_refused_after_round_0_unless_the_zero_is_fitted(tmp_path: Path, calculators: None) -> None:
    file = campaign(tmp_path / "inputs")
    process = hpcft("run", file, "--dir", tmp_path / "campaign", cwd=tmp_path)
    said, _ = process.communicate()
    assert process.returncode != 0
    assert "another zero of energy" in said
    assert "train.energy_zero" in said


@pytest.mark.nightly
def test_a_fitted_zero_is_kept_through_all_rounds_and_replay_has_it_too(
    tmp_path: Path, calculators: None
) -> None:
    """With averages, validation and all else that a training may be told, on two ranks."""
    options = {
        "energy_zero": "fit",
        "replay": {"file": "replay.extxyz", "batch_size": 2},
        "ema": 0.9,
        "rates": {"log_*": 0.5},
        "huber": {},
        "validation": {"fraction": 0.25, "patience": 3},
        "max_edges": 2000,
        "checkpoint_every_min": 0.001,
    }
    root = tmp_path / "campaign"
    hpcft_to_end("run", campaign(tmp_path / "inputs", **options), "--dir", root, cwd=tmp_path)
    foundation = product(root, "round-000/evaluate")["metrics"]["energy_bias_meV_per_atom"]["value"]
    assert abs(foundation) > 200e3
    shifts = []
    for round_ in ("round-001", "round-002"):
        metrics = product(root, f"{round_}/evaluate")["metrics"]
        assert abs(metrics["energy_bias_meV_per_atom"]["value"]) < 1000
        # Without its shift the replay would be 250 eV/atom off.
        assert metrics["replay_energy_mae_meV_per_atom"]["value"] < 2000
        trained = product(root, f"{round_}/train")
        shifts.append(trained["energy_shifts"])
        assert 0 < trained["validation"] < trained["labels"]
        assert np.isfinite(trained["last"]["valid/loss"])
        assert 1 <= trained["best_epoch"] <= 4
    assert shifts[0] == shifts[1]
    assert abs(shifts[0]["Cu"] + 250) < 3


@pytest.mark.nightly
def test_the_energies_of_isolated_atoms_may_be_given(tmp_path: Path, calculators: None) -> None:
    isolated = float(EMT().get_potential_energy(Atoms("Cu"))) + OFFSET
    file = campaign(tmp_path / "inputs", energy_zero={"Cu": isolated})
    root = tmp_path / "campaign"
    hpcft_to_end("run", file, "--dir", root, cwd=tmp_path)
    assert product(root, "round-002/train")["energy_shifts"] == {"Cu": pytest.approx(isolated, abs=1e-6)}
    # The foundation's copper is bound by 2.5 eV/atom too little, which a few steps do not mend; its zero is right.
    assert abs(product(root, "round-002/evaluate")["metrics"]["energy_bias_meV_per_atom"]["value"]) < 5000


def test_the_same_structure_is_set_aside_in_every_round() -> None:
    from hpcft.stages.train import set_aside

    structures = []
    for seed in range(40):
        atoms = bulk("Cu", a=3.6)
        atoms.rattle(0.1, seed=seed)
        structures.append(atoms)
    kept, aside = set_aside(structures, 0.25)
    assert 3 < len(aside) < 20
    assert len(kept) + len(aside) == 40
    _, fewer = set_aside(structures[:20], 0.25)
    assert all(any(a == b for b in aside) for a in fewer)
    for fraction in (1e-9, 1 - 1e-9):  # one of each kind at least
        kept, aside = set_aside(structures, fraction)
        assert min(len(kept), len(aside)) == 1

"""Reference codes that run here, as users call them: forces and stress are the derivatives of the energy that is returned."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from hpcft.config.reference import Reference as Config
from hpcft.labelling.item import Item
from hpcft.labelling.journal import read_journals
from hpcft.labelling.label import Label
from hpcft.labelling.reference import build_calculator, check_arguments, reference_from
from hpcft.labelling.requirements import lacks
from hpcft.labelling.worker import label_items

FOUNDATION = Path(__file__).parents[2] / "campaigns" / "foundation" / "silicon-tersoff.pt"
PSEUDOPOTENTIALS = Path("/usr/share/espresso/pseudo")


def silicon() -> Atoms:
    atoms = bulk("Si")
    atoms.positions[1] += [0.1, -0.05, 0.02]
    return atoms


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.1, seed=0)
    return atoms


def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.positions[1] += [0.05, 0.05, 0.0]
    return atoms


@dataclass(frozen=True)
class Case:
    """A short name with arguments on a structure, and how well energy and its derivatives should agree."""

    atoms: Atoms
    arguments: dict[str, Any] = field(default_factory=dict)
    step: float = 1.0e-4
    tolerance: float = 1.0e-5
    """In eV/Å, and for the stress in eV/Å³."""
    has_stress: bool = True
    needs: str | None = None
    """A module or program without which there is nothing to test."""


CASES = {
    "emt": Case(copper()),
    "tersoff": Case(silicon()),
    "stillinger-weber": Case(silicon()),
    "mace": Case(silicon(), {"model": str(FOUNDATION)}),
    "gfn2-xtb": Case(water(), has_stress=False, needs="tblite", tolerance=1.0e-4),
    # In plane waves the stress holds at a constant number of waves, and energies at a constant cut-off: no comparison.
    "espresso": Case(
        silicon(),
        {
            "pseudo_dir": str(PSEUDOPOTENTIALS),
            "pseudopotentials": {"Si": "Si.pz-vbc.UPF"},
            "input_data": {"ecutwfc": 16},
            "kpts": [2, 2, 2],
        },
        step=0.02,
        tolerance=5.0e-3,
        has_stress=False,
        needs="pw.x",
    ),
    "gpaw": Case(
        silicon(),
        {"mode": {"ecut": 200}, "xc": "LDA", "kpts": [2, 2, 2]},
        step=0.02,
        tolerance=1.0e-2,
        has_stress=False,
        needs="gpaw",
    ),
}


def skip_without(case: Case) -> None:
    if case.needs and not (shutil.which(case.needs) or importlib.util.find_spec(case.needs)):
        pytest.skip(f"{case.needs} is not installed")


def displaced(atoms: Atoms, direction_n3: np.ndarray, step: float) -> Atoms:
    moved = atoms.copy()
    moved.positions += step * direction_n3
    return moved


def strained(atoms: Atoms, strain_33: np.ndarray, step: float) -> Atoms:
    deformed = atoms.copy()
    deformed.set_cell(atoms.cell.array @ (np.eye(3) + step * strain_33), scale_atoms=True)
    return deformed


def labels(name: str, case: Case, structures: list[Atoms], folder: Path) -> list[Label]:
    reference = reference_from(Config(calculator=name, arguments=case.arguments))
    summary = label_items([Item.single_point(atoms) for atoms in structures], reference, folder)
    records = read_journals(folder)
    assert summary.num_done == len(structures), [record.result for record in records.values()]
    return [records[index].result for index in range(len(structures))]


@pytest.mark.parametrize("name", CASES)
def test_forces_and_stress_are_the_derivatives_of_the_energy(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    skip_without(case)
    atoms, step = case.atoms, case.step
    assert lacks(Config(calculator=name, arguments=case.arguments), sorted(set(atoms.symbols))) == []
    random = np.random.default_rng(1)
    direction_n3 = random.normal(size=(len(atoms), 3))
    direction_n3 /= np.linalg.norm(direction_n3)
    strain_33 = random.normal(size=(3, 3))
    strain_33 = 0.5 * (strain_33 + strain_33.T)
    structures = [atoms, displaced(atoms, direction_n3, step), displaced(atoms, direction_n3, -step)]
    if case.has_stress:
        structures += [strained(atoms, strain_33, step), strained(atoms, strain_33, -step)]
    first, *others = labels(name, case, structures, tmp_path)
    slope = (others[0].energy - others[1].energy) / (2 * step)
    assert abs(slope) > 20 * case.tolerance  # there is a force to get wrong
    assert -(first.forces_n3 * direction_n3).sum() == pytest.approx(slope, abs=case.tolerance)
    assert (first.stress_6 is not None) == bool(atoms.pbc.all())
    if case.has_stress:
        slope = (others[2].energy - others[3].energy) / (2 * step) / atoms.get_volume()
        xx, yy, zz, yz, xz, xy = first.stress_6
        stress_33 = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        assert (stress_33 * strain_33).sum() == pytest.approx(slope, abs=case.tolerance)


def test_a_teacher_gives_the_energies_of_its_model_and_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from hpcft.labelling import teacher
    from hpcft.models.files import load_model
    from hpcft.models.graph import build_graph
    from hpcft.models.protocol import evaluate

    loaded = []

    def load_and_count(path: Path, **options: Any) -> Any:
        loaded.append(path)
        return load_model(path, **options)

    monkeypatch.setattr(teacher, "load_model", load_and_count)
    copy = tmp_path / "teacher.pt"
    shutil.copy(FOUNDATION, copy)
    atoms = silicon()
    for _ in range(3):
        atoms.calc = teacher.mace(str(copy))
        energy = atoms.get_potential_energy()
    assert loaded == [copy]
    potential = load_model(FOUNDATION, dtype=torch.float64)
    expected = evaluate(potential, build_graph([atoms], potential.cutoff))
    assert energy == pytest.approx(float(expected.energies_b), abs=1e-10)
    copy.write_bytes(b"another")
    with pytest.raises(Exception, match="not a model file"):
        teacher.mace(str(copy))


def test_gpaw_writes_its_output_into_the_folder_of_the_calculation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(CASES["gpaw"])
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    reference = reference_from(Config(calculator="gpaw", arguments={"txt": "gpaw.txt"}))
    check_arguments(reference)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    build_calculator(reference, tmp_path / "run")
    assert (tmp_path / "run" / "gpaw.txt").is_file()


@pytest.mark.parametrize("name", ["gpaw", "gfn2-xtb", "espresso"])
def test_every_rung_of_a_ladder_stands_for_the_same_physics(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    skip_without(case)
    reference = reference_from(Config(calculator=name, arguments=case.arguments))
    rungs = [reference.at_rung(arguments) for arguments in reference.rungs()]
    energies = []
    for index, rung in enumerate(rungs):
        item = Item.single_point(case.atoms)
        assert label_items([item], rung, tmp_path / str(index)).num_done == 1
        energies.append(read_journals(tmp_path / str(index))[0].result.energy)
    assert len(energies) >= 3
    assert energies == pytest.approx([energies[0]] * len(energies), abs=1.0e-5)

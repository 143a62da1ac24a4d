"""hpcft store: what a user sees."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from typer.testing import CliRunner

from hpcft.cli.main import app
from hpcft.errors import UserError
from hpcft.storage.extxyz import write_extxyz

REFERENCE = """\
calculator: ase.calculators.emt.EMT
arguments: {asap_cutoff: false}
label: {shards: 4}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Three structures with labels, one of them marked as not converged, and the reference's file."""
    (tmp_path / "emt.yaml").write_text(REFERENCE)
    structures = []
    for number in range(3):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=number)
        atoms.info |= {"REF_energy": -float(number), "REF_stress": np.zeros(6), "converged": number != 1}
        atoms.set_array("REF_forces", np.zeros((4, 3)))
        structures.append(atoms)
    write_extxyz(tmp_path / "mine.extxyz", structures)
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["store", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_labels_are_imported_counted_and_exported_for_mace(mine: Path) -> None:
    store, reference = mine / "labels", mine / "emt.yaml"
    with pytest.raises(UserError, match=r"frame 1 of .*mine\.extxyz: it is marked as not converged"):
        run("import", store, mine / "mine.extxyz", "--reference", reference)
    said = run("import", store, mine / "mine.extxyz", "--reference", reference, "--skip-faulty")
    assert "frame 1 of" in said
    assert "2 labels imported, 0 were there already, 1 left out" in said

    counts = json.loads(run("info", store, "--json"))
    assert list(counts["labels"].values()) == [2]
    assert "ase.calculators.emt.EMT" in next(iter(counts["labels"]))
    assert "2 labels and 0 relaxations in 1 shards" in run("info", store)

    run("export", store, "-o", mine / "out.extxyz", "--reference", reference)
    with pytest.raises(UserError, match=r"out\.extxyz is there already"):
        run("export", store, "-o", mine / "out.extxyz", "--reference", reference)
    run("export", store, "-o", mine / "out.extxyz", "--reference", reference, "--force")
    exported = ase.io.read(mine / "out.extxyz", ":")
    assert sorted(atoms.info["REF_energy"] for atoms in exported) == [-2.0, 0.0]
    assert all(atoms.arrays["REF_forces"].shape == (4, 3) for atoms in exported)
    assert all(len(atoms.info["key"]) == 64 for atoms in exported)
    again = run("import", mine / "other", mine / "out.extxyz", "--reference", reference)
    assert "2 labels imported" in again


def test_structures_without_labels_are_told_where_labels_come_from(mine: Path) -> None:
    write_extxyz(mine / "plain.extxyz", [bulk("Cu", cubic=True)] * 2)
    with pytest.raises(UserError, match=r"2 of 2 structures are no labels.*--energy-key.*hpcft label\."):
        run("import", mine / "labels", mine / "plain.extxyz", "--reference", mine / "emt.yaml")


def test_a_store_that_does_not_exist_and_a_reference_without_labels_are_told(mine: Path) -> None:
    with pytest.raises(UserError, match="there is no label store"):
        run("info", mine / "nowhere")
    run("import", mine / "labels", mine / "mine.extxyz", "--reference", mine / "emt.yaml", "--skip-faulty")
    (mine / "other.yaml").write_text("calculator: ase.calculators.emt.EMT\narguments: {asap_cutoff: true}\n")
    with pytest.raises(UserError, match=r"holds no labels of the reference in .*other\.yaml"):
        run("export", mine / "labels", "-o", mine / "out.extxyz", "--reference", mine / "other.yaml")
    (mine / "wrong.yaml").write_text("calculator: ase.calculators.emt.EMT\nargument: {}\n")
    with pytest.raises(UserError, match=r"wrong\.yaml:2: argument: unknown key; did you mean 'arguments'"):
        run("export", mine / "labels", "-o", mine / "out.extxyz", "--reference", mine / "wrong.yaml")

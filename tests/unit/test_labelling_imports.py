"""A user's own calculations become labels of a store: as they are, once, and only those that are sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from code_outputs import PWO, outcar, vasprun

from hpcft.errors import UserError
from hpcft.labelling.exports import contents, labelled_structures
from hpcft.labelling.imports import Import, import_labels
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.label import Label
from hpcft.labelling.labelled_frame import LabelKeys
from hpcft.labelling.reference import Reference
from hpcft.labelling.store import LabelStore
from hpcft.labelling.worker import label_items
from hpcft.storage.extxyz import write_extxyz
from hpcft.storage.structures import write_structures

REFERENCE = Reference("ase.calculators.espresso.Espresso", {"pseudopotentials": {"Si": "Si.upf"}})


def silicon(seed: int) -> Atoms:
    """Two atoms with labels that might come from a reference; numbers that a text file of eight digits holds exactly."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Si", a=5.4)
    atoms.positions = np.round(atoms.positions + rng.normal(scale=0.1, size=(2, 3)), 6)
    atoms.info["REF_energy"] = round(-200.0 + rng.normal(), 6)
    atoms.info["REF_stress"] = np.round(rng.normal(scale=0.01, size=6), 6)
    forces = np.round(rng.normal(size=3), 6)
    atoms.arrays["REF_forces"] = np.array([forces, -forces])
    return atoms


def as_results(atoms: Atoms) -> Atoms:
    """The same labels where ASE keeps them, the energy without entropy 0.05 eV above the free one."""
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    free = atoms.info["REF_energy"]
    results = {"energy": free + 0.05, "free_energy": free, "forces": atoms.arrays["REF_forces"]}
    plain.calc = SinglePointCalculator(plain, stress=atoms.info["REF_stress"], **results)
    return plain


def write_db(path: Path, structures: list[Atoms]) -> None:
    with ase.db.connect(path) as database:
        for atoms in structures:
            database.write(as_results(atoms))


WRITERS: dict[str, Callable[[Path, list[Atoms]], None]] = {
    "ref.extxyz": write_extxyz,
    "results.extxyz": lambda path, structures: ase.io.write(path, [as_results(a) for a in structures]),
    "own.h5": write_structures,
    "results.db": write_db,
    "vasprun.xml": lambda path, structures: _write(path, vasprun(structures, [9] * len(structures))),
    "OUTCAR": lambda path, structures: _write(path, outcar(structures, [True] * len(structures))),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path / "store")


def refusal(store: LabelStore, paths: list[Path], **options: object) -> str:
    with pytest.raises(UserError) as caught:
        import_labels(store, paths, REFERENCE, **options)  # type: ignore[arg-type]
    assert not list(store.shards()), "nothing is imported where something is refused"
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_labels_of_every_format_are_found_again_with_their_numbers(
    name: str, tmp_path: Path, store: LabelStore
) -> None:
    structures = [silicon(seed) for seed in range(3)]
    WRITERS[name](tmp_path / name, structures)
    assert import_labels(store, [tmp_path / name], REFERENCE) == Import(3, 0, [])
    found = sorted(labelled_structures(store), key=lambda atoms: float(np.round(atoms.info["REF_energy"], 6)))
    structures.sort(key=lambda atoms: float(atoms.info["REF_energy"]))
    for one, other in zip(found, structures, strict=True):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-6)
        assert one.info["REF_energy"] == pytest.approx(other.info["REF_energy"], abs=1e-7)
        np.testing.assert_allclose(one.arrays["REF_forces"], other.arrays["REF_forces"], atol=1e-6)
        if name != "vasprun.xml":
            np.testing.assert_allclose(one.info["REF_stress"], other.info["REF_stress"], atol=1e-7)
        assert one.info["energy_kind"] == "free_energy"
        assert str(tmp_path / name) in one.info["origin"]
    assert import_labels(store, [tmp_path / name], REFERENCE) == Import(0, 3, []), "once is enough"


def test_a_campaign_that_reads_the_same_file_pays_for_none_of_its_structures(
    tmp_path: Path, store: LabelStore
) -> None:
    ase.io.write(tmp_path / "mine.extxyz", [as_results(silicon(seed)) for seed in range(3)])
    import_labels(store, [tmp_path / "mine.extxyz"], REFERENCE)
    items = [Item.single_point(atoms) for atoms in ase.io.read(tmp_path / "mine.extxyz", ":")]
    known = store.find(item_key(item, REFERENCE) for item in items)
    assert len(known) == 3
    summary = label_items(items, REFERENCE, tmp_path / "shard", known=known)
    assert (summary.num_found, summary.num_computed) == (3, 0)
    other = replace(REFERENCE, arguments={**REFERENCE.arguments, "kpts": [2, 2, 2]})
    assert not store.find(item_key(item, other) for item in items), "another reference has other labels"


def test_the_energy_is_the_one_that_the_reference_asks_for(tmp_path: Path, store: LabelStore) -> None:
    structure = silicon(0)
    _write(tmp_path / "OUTCAR", outcar([structure], [True]))
    extrapolated = replace(REFERENCE, energy="extrapolated")
    import_labels(store, [tmp_path / "OUTCAR"], extrapolated)
    [label] = labelled_structures(store)
    assert label.info["REF_energy"] == pytest.approx(structure.info["REF_energy"] + 0.05)
    assert label.info["energy_kind"] == "energy"


def test_labels_under_names_of_their_own_are_found_by_them(tmp_path: Path, store: LabelStore) -> None:
    atoms = silicon(0)
    atoms.info["dft_energy"] = atoms.info.pop("REF_energy")
    atoms.arrays["dft_forces"] = atoms.arrays.pop("REF_forces")
    write_extxyz(tmp_path / "mine.extxyz", [atoms])
    assert "it has no energy" in refusal(store, [tmp_path / "mine.extxyz"])
    keys = LabelKeys("dft_energy", "dft_forces")
    assert import_labels(store, [tmp_path / "mine.extxyz"], REFERENCE, keys=keys).num_new == 1


# --- what is no label ------------------------------------------------------------------------------------------------


def test_steps_of_vasp_that_did_not_converge_are_refused_by_name_and_never_imported(
    tmp_path: Path, store: LabelStore
) -> None:
    structures = [silicon(seed) for seed in range(3)]
    _write(tmp_path / "vasprun.xml", vasprun(structures, [12, 60, 59]))
    _write(tmp_path / "OUTCAR", outcar([silicon(4), silicon(5)], [False, True]))
    message = refusal(store, [tmp_path / "vasprun.xml", tmp_path / "OUTCAR"])
    assert "2 of 5 structures are no labels" in message
    assert f"frame 1 of {tmp_path / 'vasprun.xml'}: its self-consistent field did not converge" in message
    assert f"frame 0 of {tmp_path / 'OUTCAR'}: its self-consistent field did not converge" in message
    done = import_labels(store, [tmp_path / "vasprun.xml", tmp_path / "OUTCAR"], REFERENCE, skip_faulty=True)
    assert (done.num_new, len(done.skipped)) == (3, 2)
    energies = sorted(atoms.info["REF_energy"] for atoms in labelled_structures(store))
    expected = sorted(a.info["REF_energy"] for a in (structures[0], structures[2], silicon(5)))
    np.testing.assert_allclose(energies, expected)


def test_a_vasprun_that_was_cut_off_gives_the_steps_that_it_finished(
    tmp_path: Path, store: LabelStore
) -> None:
    text = vasprun([silicon(seed) for seed in range(3)], [5, 5, 5])
    _write(tmp_path / "vasprun.xml", text[: text.rindex("<scstep>")])
    assert import_labels(store, [tmp_path / "vasprun.xml"], REFERENCE).num_new == 2
    _write(tmp_path / "vasprun.xml", text[: text.index("<scstep>")])
    with pytest.raises(UserError, match="no finished calculation"):
        import_labels(store, [tmp_path / "vasprun.xml"], REFERENCE)


def test_every_step_of_a_relaxation_by_espresso_is_a_label_and_its_reprinted_end_is_none(
    store: LabelStore,
) -> None:
    assert import_labels(store, [PWO], REFERENCE) == Import(4, 0, [])
    energies = sorted(atoms.info["REF_energy"] / 13.605693 for atoms in labelled_structures(store))
    assert energies == pytest.approx([-14.49975045, -14.49975040, -14.49948575, -14.49432735], abs=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("convergence has been achieved in   4", "convergence NOT achieved after   4", "did not converge"),
        # What pw.x 6.7 writes with scf_must_converge = .false. when its steps run out.
        (
            "<       0.00000002 Ry",
            "<       0.01173034 Ry",
            "estimated accuracy 0.0117303 Ry, threshold 1e-06 Ry",
        ),
        ("convergence has been achieved in   4 iterations", "", "broke off"),
    ],
)
def test_a_step_of_espresso_that_did_not_converge_is_refused_whatever_it_says(
    old: str, new: str, reason: str, tmp_path: Path, store: LabelStore
) -> None:
    text = PWO.read_text()
    assert text.count(old) == 1
    _write(tmp_path / "relax.pwo", text.replace(old, new))
    message = refusal(store, [tmp_path / "relax.pwo"])
    assert f"1 of 4 structures are no labels: frame 1 of {tmp_path / 'relax.pwo'}" in message
    assert reason in message
    assert import_labels(store, [tmp_path / "relax.pwo"], REFERENCE, skip_faulty=True).num_new == 3


def spoilt(kind: str) -> Atoms:
    atoms = silicon(9)
    if kind == "nan":
        atoms.info["REF_energy"] = np.nan
    elif kind == "net-force":
        atoms.arrays["REF_forces"][1] = atoms.arrays["REF_forces"][0]
    elif kind == "element":
        atoms.symbols[1] = "Ge"
    elif kind == "asymmetric":
        atoms.info["REF_stress"] = np.array([1, 0.5, 0, -0.5, 1, 0, 0, 0, 1.0])
    elif kind == "absurd":
        atoms.arrays["REF_forces"] *= 1e5
    elif kind == "kbar":
        atoms.info["REF_stress"] = np.array([52.0, 51.0, 50.0, 0, 0, 0])
    elif kind == "marked":
        atoms.info["converged"] = False
    return atoms


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "hold NaN or infinity"),
        ("net-force", "the forces add up to"),
        ("element", "it has Ge, which the reference does not know"),
        ("asymmetric", "its stress is not symmetric"),
        ("absurd", "and no reference gives more than 1000"),
        ("kbar", "it has a stress of 52 eV/Å³ (8.33e+03 GPa), more than 5: is it in kbar or GPa?"),
        ("marked", "it is marked as not converged"),
    ],
)
def test_a_frame_that_cannot_be_right_is_refused_with_its_name_and_the_reason(
    kind: str, reason: str, tmp_path: Path, store: LabelStore
) -> None:
    write_extxyz(tmp_path / "good.extxyz", [silicon(0)])
    write_extxyz(tmp_path / "bad.extxyz", [spoilt(kind)])
    message = refusal(store, [tmp_path / "good.extxyz", tmp_path / "bad.extxyz"])
    assert f"frame 0 of {tmp_path / 'bad.extxyz'}: " in message
    assert reason in message


def test_labels_of_one_structure_that_differ_are_refused_within_an_import_and_against_the_store(
    tmp_path: Path, store: LabelStore
) -> None:
    right, wrong = silicon(0), silicon(0)
    wrong.info["REF_energy"] += 0.1
    write_extxyz(tmp_path / "both.extxyz", [right, silicon(1), wrong])
    message = refusal(store, [tmp_path / "both.extxyz"], skip_faulty=True)
    both = tmp_path / "both.extxyz"
    assert f"frame 0 of {both} and frame 2 of {both}: energy by 0.05 eV/atom" in message

    write_extxyz(tmp_path / "right.extxyz", [right])
    write_extxyz(tmp_path / "wrong.extxyz", [wrong, silicon(2)])
    import_labels(store, [tmp_path / "right.extxyz"], REFERENCE)
    with pytest.raises(UserError, match=r"frame 0 of .*wrong\.extxyz and the store: energy by 0\.05 eV/atom"):
        import_labels(store, [tmp_path / "wrong.extxyz"], REFERENCE, skip_faulty=True)
    assert contents(store).labels == {next(iter(contents(store).labels)): 1}


def test_an_import_that_was_killed_before_it_was_registered_is_completed_by_repeating_it(
    tmp_path: Path, store: LabelStore
) -> None:
    write_extxyz(tmp_path / "mine.extxyz", [silicon(0), silicon(1)])
    import_labels(store, [tmp_path / "mine.extxyz"], REFERENCE)
    [index] = store.folder.glob("shards-*.h5")
    index.unlink()
    assert import_labels(store, [tmp_path / "mine.extxyz"], REFERENCE).num_new == 2
    assert len(list((store.folder / "imports").iterdir())) == 1
    assert contents(store).num_shards == 1


def test_a_reference_that_asks_for_more_than_imports_have_is_refused(
    tmp_path: Path, store: LabelStore
) -> None:
    write_extxyz(tmp_path / "mine.extxyz", [silicon(0)])
    with pytest.raises(UserError, match="asks for magmoms"):
        import_labels(store, [tmp_path / "mine.extxyz"], replace(REFERENCE, properties=("magmoms",)))


# --- export ----------------------------------------------------------------------------------------------------------


def test_labels_of_two_references_are_exported_one_at_a_time(tmp_path: Path, store: LabelStore) -> None:
    other = replace(REFERENCE, arguments={**REFERENCE.arguments, "kpts": [2, 2, 2]})
    write_extxyz(tmp_path / "one.extxyz", [silicon(0), silicon(1)])
    write_extxyz(tmp_path / "other.extxyz", [silicon(0)])
    import_labels(store, [tmp_path / "one.extxyz"], REFERENCE)
    import_labels(store, [tmp_path / "other.extxyz"], other)
    assert sorted(contents(store).labels.values()) == [1, 2]
    with pytest.raises(UserError, match="labels of several references"):
        list(labelled_structures(store))
    assert len(list(labelled_structures(store, REFERENCE))) == 2
    assert len(list(labelled_structures(store, other))) == 1


def test_a_label_that_several_shards_hold_is_counted_and_exported_once(
    tmp_path: Path, store: LabelStore
) -> None:
    write_extxyz(tmp_path / "mine.extxyz", [silicon(0), silicon(1)])
    import_labels(store, [tmp_path / "mine.extxyz"], REFERENCE)
    [shard] = store.shards()
    copy = tmp_path / "copy"
    shard.rename(copy)
    shard.mkdir()
    for file in copy.iterdir():
        (shard / file.name).write_bytes(file.read_bytes())
    store.register(copy)
    assert contents(store).num_shards == 2
    assert sum(contents(store).labels.values()) == 2
    assert len(list(labelled_structures(store))) == 2
    record = next(iter(store.find([next(labelled_structures(store)).info["key"]]).values()))
    assert isinstance(record.result, Label)

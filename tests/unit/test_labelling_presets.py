"""Short names of reference calculators: what a label's key depends on, and the input that codes are given."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk, molecule

from hpcft.config.reference import SHORT_NAMES
from hpcft.config.reference import Reference as Config
from hpcft.errors import MissingInput, UserError
from hpcft.labelling.presets import PRESETS
from hpcft.labelling.reference import build_calculator, reference_from, unknown_elements, unsuitable

FOUNDATION = Path(__file__).parents[2] / "campaigns" / "foundation" / "emt-metals.pt"
ALL = ("energy", "forces", "stress")

# Arguments, and others that stand for other physics.
PHYSICS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "emt": ({}, {"asap_cutoff": True}),
    "tersoff": ({}, {"parameters": "Erhart_PRB_71_035211_Si"}),
    "stillinger-weber": ({}, {"parameters": "Russo_PRX_8_021040_Si"}),
    "gfn2-xtb": ({}, {"method": "GFN1-xTB"}),
    "gpaw": ({"xc": "PBE"}, {"xc": "PBE", "mode": {"ecut": 300}}),
    "espresso": ({"input_data": {"ecutwfc": 30}}, {"input_data": {"ecutwfc": 40}}),
    "vasp": ({"xc": "PBE", "encut": 400}, {"xc": "PBE", "encut": 500}),
    "cp2k": ({"xc": "PBE"}, {"xc": "BLYP"}),
    "aims": ({"xc": "pbe"}, {"xc": "pw-lda"}),
    "orca": ({"orcasimpleinput": "PBE def2-SVP"}, {"orcasimpleinput": "PBE def2-TZVP"}),
    "mace": ({"model": str(FOUNDATION)}, {"model": str(FOUNDATION), "dtype": "float32"}),
}
PROGRAMS = [name for name, preset in PRESETS.items() if preset.command is not None]


def make(name: str, arguments: Mapping[str, Any], mpi: str = "", **others: Any) -> Any:
    return reference_from(Config(calculator=name, arguments=dict(arguments), **others), mpi)


def test_every_short_name_that_users_may_write_is_spelt_out() -> None:
    assert set(PRESETS) == set(SHORT_NAMES) == set(PHYSICS)


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_key_depends_on_the_physics(name: str) -> None:
    one, other = (make(name, arguments).fingerprint() for arguments in PHYSICS[name])
    assert one != other
    assert one == make(name, PHYSICS[name][0]).fingerprint()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_key_does_not_depend_on_how_a_code_is_started(name: str) -> None:
    arguments = PHYSICS[name][0]
    plain = make(name, arguments)
    many = make(name, arguments, "srun -n 8", command="{mpi} /opt/code/bin/code -nk 2", ladder=())
    assert "srun -n 8 /opt/code/bin/code -nk 2" in str(many.arguments)
    assert many.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("name", sorted(set(SHORT_NAMES) - set(PROGRAMS)))
def test_what_runs_inside_python_takes_no_command(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} takes none: it runs inside Python"):
        make(name, PHYSICS[name][0], command="{mpi} code")


def test_the_mpi_launcher_of_the_site_stands_before_the_code() -> None:
    arguments = make("espresso", {}, "mpi-here 4").arguments
    assert arguments["profile"]["command"] == "mpi-here 4 pw.x"
    assert make("espresso", {}).arguments["profile"]["command"] == "pw.x"


def pseudopotential(folder: Path, text: str = "<UPF/>") -> dict[str, Any]:
    folder.mkdir()
    (folder / "Si.UPF").write_text(text)
    return {"pseudo_dir": str(folder), "pseudopotentials": {"Si": "Si.UPF"}, "input_data": {"ecutwfc": 30}}


def test_a_pseudopotential_enters_a_key_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    here, there = (pseudopotential(tmp_path / name) for name in ("here", "there"))
    other = pseudopotential(tmp_path / "other", "<UPF version='2'/>")
    keys = [make("espresso", arguments).fingerprint() for arguments in (here, there, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_tilde_is_the_user_s_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pseudopotential(tmp_path / "pseudo")
    shutil.copy(FOUNDATION, tmp_path / "teacher.pt")
    arguments = {"pseudo_dir": "~/pseudo", "pseudopotentials": {"Si": "Si.UPF"}}
    calculator = build_calculator(make("espresso", arguments), tmp_path)
    assert calculator.profile.pseudo_dir == str(tmp_path / "pseudo")
    assert build_calculator(make("mace", {"model": "~/teacher.pt"}), tmp_path)


def test_a_teacher_enters_a_key_by_the_content_of_its_file(tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.pt", tmp_path / "other.pt"
    shutil.copy(FOUNDATION, copy)
    other.write_bytes(FOUNDATION.read_bytes() + b"x")
    keys = [make("mace", {"model": str(path)}).fingerprint() for path in (FOUNDATION, copy, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "mace",
            {"model": "/nowhere/big.pt"},
            "model, /nowhere/big.pt, does not exist. There is no folder /nowhere",
        ),
        ("mace", {"model": "big.pt"}, "relative path big.pt"),
        ("mace", {"model": 3}, "write an absolute path"),
        ("espresso", {"pseudo_dir": "/p", "pseudopotentials": ["Si.UPF"]}, "write {Si: Si.UPF"),
        (
            "tersoff",
            {"potential_file": "/nowhere/SiC.tersoff"},
            "potential_file, /nowhere/SiC.tersoff, does not",
        ),
        (
            "espresso",
            {"pseudo_dir": "/nowhere", "pseudopotentials": {"Si": "Si.UPF"}},
            "pseudopotential of Si, /nowhere/Si.UPF, does not exist",
        ),
    ],
)
def test_a_file_that_is_not_there_is_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, arguments)


def test_a_file_that_is_away_or_unreadable_may_be_back_for_the_next_attempt(tmp_path: Path) -> None:
    away = {"model": str(tmp_path / "not-mounted" / "teacher.pt")}
    with pytest.raises(MissingInput, match="There is no folder"):
        make("mace", away)
    with pytest.raises(MissingInput, match=r"model, /proc/self/mem, cannot be read: Input/output error"):
        make("mace", {"model": "/proc/self/mem"})


def test_a_pickled_teacher_that_nobody_trusts_is_not_loaded(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "unknown.model").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="hpcft model import"):
        build_calculator(make("mace", {"model": str(tmp_path / "unknown.model")}), tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "espresso",
            {"input_data": {"ecutwf": 30}},
            "'ecutwf', which pw.x does not know. Did you mean 'ecutwfc'",
        ),
        ("espresso", {"ecutwfc": 30}, "belongs into input_data"),
        ("espresso", {}, "pseudo_dir"),
        ("vasp", {"encutt": 400}, "Did you mean 'encut'"),
        ("vasp", {"ENCUT": 400}, "Did you mean 'encut'"),
        ("vasp", {"nsw": 10}, "nsw = 10 makes .* move the atoms"),
        ("vasp", {"custom": {"IBRION": 2}}, "IBRION = 2 makes .* move the atoms"),
        ("cp2k", {"basisset": "DZVP"}, "Did you mean 'basis_set'"),
        ("cp2k", {"inp": "&FORCE_EVAL\n IGNORE_CONVERGENCE_FAILURE\n"}, "hides unconverged"),
        ("aims", {"postprocess_anyway": True}, "pass unconverged numbers off"),
        ("orca", {"method": "PBE"}, "takes no argument 'method'"),
        ("gpaw", {"convergence": {"maximum iterations": 5}}, "maximum iterations"),
        ("tersoff", {"parameters": "Tersoff"}, "Did you mean 'Tersoff_PRB_39_5566_Si_C'|It has Albe"),
        ("mace", {"modell": "x"}, "Did you mean 'model'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(
    name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_calculator(make(name, {**({"xc": "PBE"} if name == "vasp" else {}), **arguments}), tmp_path)


def written(name: str, arguments: Mapping[str, Any], atoms: Atoms, folder: Path) -> str:
    """All that the calculator of a short name writes for its code, as one text."""
    calculator = build_calculator(make(name, arguments), folder)
    if hasattr(calculator, "write_inputfiles"):
        calculator.write_inputfiles(atoms, ALL)
    else:
        calculator.initialize(atoms)
        calculator.write_input(atoms, ALL)
    return "\n".join(path.read_text() for path in sorted(folder.iterdir()) if path.is_file())


def assert_sets(text: str, settings: Mapping[str, str]) -> None:
    lines = {tuple(line.replace("=", " ").split()) for line in text.splitlines()}
    missing = [f"{key} {value}" for key, value in settings.items() if (key, *value.split()) not in lines]
    assert not missing, text


def test_pw_is_asked_for_forces_and_stress_of_a_converged_field(tmp_path: Path) -> None:
    arguments = pseudopotential(tmp_path / "pseudo") | {"kpts": [2, 2, 2]}
    arguments["input_data"] = {"SYSTEM": {"ecutwfc": 30, "Degauss": 0.02}}
    (tmp_path / "run").mkdir()
    text = written("espresso", arguments, bulk("Si"), tmp_path / "run")
    assert_sets(text, {"tprnfor": ".true.", "tstress": ".true.", "conv_thr": "1e-08", "ecutwfc": "30"})
    assert_sets(text, {"degauss": "0.02"})  # the user's, wherever it stands


@pytest.mark.filterwarnings("ignore:Loaded VASP_PP_PATH from environment")
def test_vasp_is_asked_for_forces_and_stress_of_a_single_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    potcar = tmp_path / "potpaw_PBE" / "Si" / "POTCAR"
    potcar.parent.mkdir(parents=True)
    potcar.write_text(" PAW_PBE Si 05Jan2001\n")
    monkeypatch.setenv("VASP_PP_PATH", str(tmp_path))
    (tmp_path / "run").mkdir()
    text = written("vasp", {"xc": "PBE", "encut": 400, "kpts": [2, 2, 2]}, bulk("Si"), tmp_path / "run")
    assert_sets(
        text, {"EDIFF": "1.00e-06", "PREC": "Accurate", "LREAL": ".FALSE.", "NSW": "0", "IBRION": "-1"}
    )
    assert_sets(text, {"ISIF": "2", "ISMEAR": "0", "NELM": "120"})
    assert "PAW_PBE Si" in text


@pytest.mark.filterwarnings("ignore:FHI-aims IO is moving")
def test_aims_is_asked_for_forces_and_stress_of_a_converged_field(tmp_path: Path) -> None:
    species, run = tmp_path / "species", tmp_path / "run"
    species.mkdir()
    run.mkdir()
    (species / "14_Si_default").write_text("  species        Si\n    nucleus             14\n")
    arguments = {"xc": "pbe", "kpts": [2, 2, 2], "species_dir": str(species)}
    text = written("aims", arguments, bulk("Si"), run)
    assert_sets(text, {"compute_forces": ".true.", "compute_analytical_stress": ".true.", "k_grid": "2 2 2"})
    assert_sets(text, {"sc_accuracy_rho": "1e-05", "occupation_type": "gaussian 0.05", "nucleus": "14"})
    other = written("aims", {**arguments, "smearing": ["fermi-dirac", 0.1]}, bulk("Si"), run)
    assert_sets(other, {"occupation_type": "fermi 0.100000"})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("PBE def2-SVP", "! PBE def2-SVP TightSCF EnGrad SCFConvForced"),
        ("PBE def2-SVP VeryTightSCF engrad", "! PBE def2-SVP VeryTightSCF engrad SCFConvForced"),
    ],
)
def test_orca_is_asked_for_the_gradient_of_a_converged_field(
    line: str, expected: str, tmp_path: Path
) -> None:
    text = written(
        "orca", {"orcasimpleinput": line, "orcablocks": "%pal nprocs 4 end"}, molecule("H2O"), tmp_path
    )
    assert text.splitlines()[0].strip() == expected
    assert "*xyz 0 1" in text


def test_orca_takes_no_periodic_structure_for_a_molecule() -> None:
    orca = make("orca", PHYSICS["orca"][0])
    assert unsuitable(orca, molecule("H2O")) is None
    assert unsuitable(orca, bulk("Si")) == "ORCA knows only molecules, and the structure is periodic"


@pytest.mark.parametrize(
    ("name", "arguments", "unknown"),
    [
        ("tersoff", {}, ["Cu"]),
        ("tersoff", {"parameters": "Erhart_PRB_71_035211_Si"}, ["C", "Cu"]),
        ("stillinger-weber", {}, ["C", "Cu"]),
        ("mace", {"model": str(FOUNDATION)}, ["C", "Si"]),
        ("gfn2-xtb", {}, []),
    ],
)
def test_elements_that_a_reference_does_not_know_are_told(
    name: str, arguments: dict[str, Any], unknown: list[str]
) -> None:
    assert unknown_elements(make(name, arguments), [6, 14, 29]) == unknown

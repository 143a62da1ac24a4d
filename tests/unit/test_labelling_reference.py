"""Reference calculators from settings: what is the same, what is refused, and what a wrong name suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.calculators.emt import EMT

from hpcft.errors import UserError
from hpcft.labelling.dotted_path import resolve
from hpcft.labelling.reference import Reference, build_calculator, unknown_elements

ESPRESSO = "ase.calculators.espresso.Espresso"
EMT_PATH = "ase.calculators.emt.EMT"


def espresso(**arguments: Any) -> Reference:
    return Reference(ESPRESSO, {"profile": {"command": "pw.x", "pseudo_dir": "/pseudo"}, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"ecutwfc": 16.0, "kpts": [2, 2, 2], "file": "a/b"},
        {"kpts": (2, 2, 2), "file": Path("a/b"), "ecutwfc": 16},
        {"kpts": np.array([2, 2, 2]), "ecutwfc": np.float32(16), "file": "a/b"},
    ],
)
def test_the_same_settings_have_the_same_fingerprint_however_they_are_written(
    arguments: dict[str, Any],
) -> None:
    expected = Reference("some.Calculator", {"ecutwfc": 16, "kpts": [2, 2, 2], "file": "a/b"}).fingerprint()
    assert Reference("some.Calculator", arguments).fingerprint() == expected


def test_a_fingerprint_does_not_change_between_releases() -> None:
    fingerprint = "c13aaa657414c3ac10aa2cef6af56f920d8036ebf1871168ef307bd78bd1c2fa"
    assert Reference(EMT_PATH).fingerprint() == fingerprint


@pytest.mark.parametrize(
    "other",
    [
        Reference("some.Other", {"x": 1}),
        Reference("some.Calculator", {"x": 1.0000001}),
        Reference("some.Calculator", {"x": True}),
        Reference("some.Calculator", {"x": "1"}),
        Reference("some.Calculator", {"x": 1, "y": None}),
    ],
)
def test_other_settings_have_another_fingerprint(other: Reference) -> None:
    assert other.fingerprint() != Reference("some.Calculator", {"x": 1}).fingerprint()


def test_what_does_not_change_the_numbers_does_not_change_the_fingerprint() -> None:
    plain = espresso()
    profile = {"command": "mpirun -n 2 pw.x", "pseudo_dir": "/pseudo"}
    other = Reference(
        ESPRESSO, {"profile": profile}, elements=("Si",), time_limit_s=5.0, ladder=({"mixing_beta": 0.2},)
    )
    assert other.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        {"input_data": {"electrons": {"scf_must_converge": False}}},
        {"input_data": {"SCF_MUST_CONVERGE": ".FALSE."}},
        {"input_data": {"control": {"calculation": "relax"}}},
        {"inp": "&FORCE_EVAL\n ignore_convergence_failure .TRUE."},
        {"fail_on_maxiter": "false"},
    ],
)
def test_options_that_hide_an_unconverged_result_are_refused_at_any_depth(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"unconverged|single-point"):
        espresso(**options)
    with pytest.raises(UserError):
        Reference(ESPRESSO, espresso().arguments, ladder=(options,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calculator": "EMT"}, "no dotted path"),
        ({"calculator": EMT_PATH, "elements": ("silicon",)}, "no chemical symbol"),
        ({"calculator": EMT_PATH, "time_limit_s": 0.0}, "positive"),
        ({"calculator": EMT_PATH, "time_limit_s": float("nan")}, "positive"),
        ({"calculator": EMT_PATH, "arguments": {"x": float("inf")}}, "finite"),
        ({"calculator": EMT_PATH, "arguments": {"x": object()}}, "object"),
        ({"calculator": EMT_PATH, "arguments": {"directory": "here"}}, "directory"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Reference(**settings)


def test_a_dotted_path_may_end_in_a_factory_of_a_class() -> None:
    assert resolve("ase.calculators.tersoff.Tersoff.from_lammps").__name__ == "from_lammps"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ase.calculators.emt.EMTT", "Did you mean 'EMT'"),
        ("ase.calculators.emtt.EMT", "Did you mean 'emt'"),
        ("ase.calculators.tersoff.Tersoff.from_lamps", "Did you mean 'from_lammps'"),
        ("no_such_code.Calculator", "not installed"),
        ("ase.calculators.emt.beta", "cannot be called"),
        ("ase..emt", r"ase\."),
    ],
)
def test_a_wrong_path_is_answered_with_the_nearest_name(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(path)


def test_a_calculator_is_built_with_its_arguments() -> None:
    calculator = build_calculator(Reference(EMT_PATH, {"asap_cutoff": True}), Path("anywhere"))
    assert isinstance(calculator, EMT)
    assert calculator.parameters["asap_cutoff"] is True


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Reference(EMT_PATH, {"asap_cutof": True}), "Did you mean 'asap_cutoff'"),
        (Reference("ase.calculators.tersoff.Tersoff"), "parameters"),
        (Reference("ase.calculators.tersoff.Tersoff.from_lammps", {"potential_file": "none"}), "none"),
        (Reference(ESPRESSO), "profile"),
        (Reference(ESPRESSO, {"profile": {"command": "pw.x"}}), "pseudo_dir"),
        (espresso(pseudopotentials={"Si": "Si.UPF"}), "/pseudo/Si.UPF"),
    ],
)
def test_arguments_that_do_not_fit_are_named(reference: Reference, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_calculator(reference, Path("anywhere"))


def test_espresso_gets_its_profile_its_folder_and_the_order_to_compute_forces_and_stress() -> None:
    calculator = build_calculator(espresso(), Path("anywhere"))
    assert (calculator.profile.command, calculator.profile.pseudo_dir) == ("pw.x", "/pseudo")
    assert calculator.directory == Path("anywhere")
    assert (
        calculator.parameters["input_data"]["tprnfor"]
        is calculator.parameters["input_data"]["tstress"]
        is True
    )


@pytest.mark.parametrize(
    ("reference", "unknown"),
    [
        (Reference(EMT_PATH), ["Si"]),
        (Reference(EMT_PATH, elements=("Si",)), ["Cu"]),
        (espresso(pseudopotentials={"Cu": "Cu.UPF"}), ["Si"]),
        (Reference("some.unheard.of.Calculator"), []),
    ],
)
def test_elements_that_a_reference_cannot_do_are_listed(reference: Reference, unknown: list[str]) -> None:
    assert unknown_elements(reference, np.array([29, 14, 29, 14])) == unknown


def test_a_ladder_changes_single_settings_at_any_depth() -> None:
    reference = espresso(
        input_data={"ecutwfc": 16, "mixing_beta": 0.7},
    )
    ladder = ({"input_data": {"mixing_beta": 0.2}},)
    rungs = list(Reference(ESPRESSO, reference.arguments, ladder=ladder).rungs())
    assert [rung["input_data"]["mixing_beta"] for rung in rungs] == [0.7, 0.2]
    assert all(rung["input_data"]["ecutwfc"] == 16 for rung in rungs)

"""Keys of labels: which settings of a short name count, and which leave the numbers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpcft.config.reference import Reference as Config
from hpcft.labelling.reference import Reference, reference_from

FOUNDATION = Path(__file__).parents[2] / "campaigns" / "foundation" / "emt-metals.pt"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gpaw": {"xc": "PBE"},
    "vasp": {"xc": "PBE", "encut": 400},
    "cp2k": {"xc": "PBE"},
    "aims": {"xc": "pbe"},
}


def make(name: str, arguments: Mapping[str, Any], **others: Any) -> Reference:
    return reference_from(Config(calculator=name, arguments=dict(arguments), **others))


@pytest.mark.parametrize(
    ("name", "arguments", "others"),
    [
        ("mace", {"model": str(FOUNDATION)}, {"device": "cuda"}),
        ("gpaw", {"xc": "PBE"}, {"txt": "gpaw.txt", "parallel": {"domain": 2}}),
        ("gfn2-xtb", {}, {"verbosity": 2}),
        ("orca", {"orcasimpleinput": "PBE"}, {"orcablocks": "%Pal\n nprocs 4\nend"}),
        ("orca", {"orcasimpleinput": "PBE"}, {"orcasimpleinput": "PBE PAL8"}),
        (
            "orca",
            {"orcablocks": "%scf maxiter 300 end\n%cpcm epsilon 80 end"},
            {"orcablocks": "%scf maxiter 300 end\n%pal nprocs 4 end\n%cpcm epsilon 80 end"},
        ),
    ],
)
def test_a_key_does_not_depend_on_where_a_code_runs_or_what_it_prints(
    name: str, arguments: dict[str, Any], others: dict[str, Any]
) -> None:
    assert make(name, arguments | others).fingerprint() == make(name, arguments).fingerprint()


def test_a_key_depends_on_the_blocks_of_orca_beside_that_of_its_ranks() -> None:
    blocks = ("%pal nprocs 4 end", "%pal nprocs 4 end\n%cpcm epsilon 80 end", "%cpcm epsilon 80 end")
    ranks, both, solvent = (make("orca", {"orcablocks": block}).fingerprint() for block in blocks)
    assert ranks != both == solvent


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("gfn2-xtb", {}, "4a4b096d5dd25a7240f0d748af5b2bbefa2989c30e999565e4dd5468c82f485b"),
        (
            "vasp",
            {"xc": "PBE", "encut": 400},
            "d49b2864a36f9d65bc7218c433aa694efea336be19f34bd5e1fe8b9184fdb9cb",
        ),
        (
            "orca",
            {"orcasimpleinput": "PBE def2-SVP"},
            "4ca206c4453c72b6d2142ca166609af8862be98938b44fba0cb42ee2e27f7203",
        ),
        ("gpaw", {"xc": "PBE"}, "d24df70f2e2f77ee4357a049fea2c47c9d6b9c985ffd37b40de8471331a36c0b"),
    ],
)
def test_the_keys_of_a_short_name_do_not_change_between_releases(
    name: str, arguments: dict[str, Any], key: str
) -> None:
    assert make(name, arguments).fingerprint() == key


def test_vasp_computes_moments_of_atoms_only_where_a_label_shall_hold_them() -> None:
    arguments = ARGUMENTS["vasp"]
    assert "lorbit" not in make("vasp", arguments).arguments
    assert make("vasp", arguments, properties=["magmoms"]).arguments["lorbit"] == 10
    own = make("vasp", {**arguments, "lorbit": 11}, properties=["magmoms"])
    assert own.arguments["lorbit"] == 11


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("vasp", "VASP_PP_PATH"),
        ("vasp", "VASP_PP_VERSION"),
        ("gpaw", "GPAW_SETUP_PATH"),
        ("cp2k", "CP2K_DATA_DIR"),
        ("aims", "AIMS_SPECIES_DIR"),
    ],
)
def test_labels_from_other_data_sets_have_another_key(name: str, variable: str) -> None:
    plain, one, other, threads = (
        make(name, ARGUMENTS[name], environment=environment).fingerprint()
        for environment in ({}, {variable: "/pots/52"}, {variable: "/pots/54"}, {"OMP_NUM_THREADS": "4"})
    )
    assert len({plain, one, other}) == 3
    assert threads == plain

"""What stands in the way of labels is found before anything is submitted, with its name and where it was looked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcft.cli import preflight
from hpcft.config.campaign import Campaign, load_campaign
from hpcft.config.reference import Reference as Config
from hpcft.config.site import Site, default_site
from hpcft.errors import UserError
from hpcft.labelling.reference import Reference, check_arguments, reference_from
from hpcft.labelling.requirements import Lack, lacks, scratch_lacks

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import hpcft, hpcft_to_end, write_campaign

EVERYTHING = {"which": lambda name: name}
NOTHING = {"which": lambda name: None}


@pytest.fixture
def pseudo(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "Si.UPF").write_text("<UPF/>")
    return {
        "pseudo_dir": str(tmp_path),
        "pseudopotentials": {"Si": "Si.UPF"},
        "input_data": {"ecutwfc": 30},
    }


def only(name: str, arguments: dict[str, Any] | None = None, *symbols: str, **others: Any) -> Lack:
    (lack,) = lacks(Config(calculator=name, arguments=arguments or {}, **others), symbols, **EVERYTHING)
    return lack


def test_a_complete_reference_lacks_nothing(pseudo: dict[str, Any]) -> None:
    assert lacks(Config(calculator="emt"), ["Cu"], **NOTHING) == []
    assert lacks(Config(calculator="espresso", arguments=pseudo), ["Si"], "mpirun -n 2", **EVERYTHING) == []


def test_a_calculator_that_does_not_import_is_named_with_the_nearest() -> None:
    lack = only("ase.calculators.emt.EMTT")
    assert lack.key == "calculator"
    assert "Did you mean 'EMT'" in lack.what


def test_a_code_that_is_an_extra_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tblite", None)  # as if it were not installed
    lack = only("gfn2-xtb")
    assert (lack.key, lack.accepted) == (
        "calculator",
        "pip install 'hpcft[xtb]' into the environment of the jobs",
    )


@pytest.mark.parametrize(
    ("name", "arguments", "symbols", "words"),
    [
        ("emt", {}, ["Cu", "Si"], "emt has nothing for Si"),
        ("emt", {"asap_cutof": True}, ["Cu"], "Did you mean 'asap_cutoff'"),
        ("tersoff", {"potential_file": "/nowhere/Si.tersoff"}, ["Si"], "/nowhere/Si.tersoff, does not exist"),
        ("mace", {"model": "/nowhere/large.model"}, ["Si"], "/nowhere/large.model, does not exist"),
        ("aims", {"xc": "pbe", "species_dir": "/nowhere"}, ["Si"], "/nowhere/14_Si_default does not exist"),
    ],
)
def test_what_the_arguments_lack_is_named(
    name: str, arguments: dict[str, Any], symbols: list[str], words: str
) -> None:
    lack = only(name, arguments, *symbols)
    assert (lack.key, lack.may_come_later) == ("arguments", False)
    assert words in lack.what


def test_pseudopotentials_are_looked_for_by_file_and_by_element(pseudo: dict[str, Any]) -> None:
    assert only("espresso", pseudo, "Si", "Ge").what.startswith("espresso has nothing for Ge")
    misspelt = {**pseudo, "pseudopotentials": {"Si": "Si.UFP"}}
    assert (
        f"{pseudo['pseudo_dir']}/Si.UFP, does not exist. Did you mean 'Si.UPF'?"
        in only("espresso", misspelt).what
    )


@pytest.mark.filterwarnings("ignore:Loaded VASP_PP_PATH from environment")
def test_potcars_are_looked_for_where_the_reference_s_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VASP_PP_PATH", raising=False)
    arguments = {"xc": "PBE", "encut": 400}
    lack = only("vasp", arguments, "Si")
    assert (lack.key, lack.may_come_later) == ("environment", True)
    environment = {"VASP_PP_PATH": str(tmp_path)}
    assert f"{tmp_path}/potpaw_PBE/Si/POTCAR" in only("vasp", arguments, "Si", environment=environment).what
    (tmp_path / "potpaw_PBE" / "Si").mkdir(parents=True)
    (tmp_path / "potpaw_PBE" / "Si" / "POTCAR").touch()
    config = Config(calculator="vasp", arguments=arguments, environment=environment)
    assert lacks(config, ["Si"], **EVERYTHING) == []
    assert "VASP_PP_PATH" not in os.environ


def test_gpaw_s_data_sets_are_looked_for_by_element_and_functional() -> None:
    pytest.importorskip("gpaw")
    config = Config(calculator="gpaw", arguments={"xc": "PBE"})
    (lack,) = lacks(config, ["Si", "U"])
    assert 'for U: Could not find required PAW dataset file "U.PBE"' in lack.what


@pytest.mark.parametrize(
    ("command", "missing", "may_come_later"),
    [
        (None, ["pw.x"], [True]),
        ("{mpi} pw.x -nk 2", ["pw.x"], [True]),
        ("env -u SLURM_STEPID pw.x", ["env", "pw.x"], [True, True]),
        ("{mpi} /opt/qe/bin/pw.x", ["/opt/qe/bin/pw.x"], [False]),
    ],
)
def test_the_launcher_and_every_program_of_a_command_are_looked_for(
    command: str | None, missing: list[str], may_come_later: list[bool], pseudo: dict[str, Any]
) -> None:
    config = Config(calculator="espresso", arguments=pseudo, command=command)
    found = lacks(config, ["Si"], "mpirun -n 4" if command is None else "", **NOTHING)
    missing = ["mpirun", *missing] if command is None else missing
    assert [lack.what.split()[1].rstrip(",") for lack in found] == missing
    assert [lack.may_come_later for lack in found][-len(may_come_later) :] == may_come_later
    assert all(lack.key == "command" for lack in found)
    if may_come_later[-1]:
        assert os.environ["PATH"] in found[-1].what


@pytest.mark.parametrize("mpi", ["", "mpirun -n 4"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ('pw.x "x', "The command 'pw.x \"x' of the reference cannot be read: No closing quotation"),
        ("{mpi}", "names no program; write one, as in '{mpi} pw.x'"),
        ("  ", "names no program"),
    ],
)
def test_a_command_that_starts_nothing_is_told_and_refused(
    command: str, words: str, mpi: str, pseudo: dict[str, Any]
) -> None:
    config = Config(calculator="espresso", arguments=pseudo, command=command)
    (lack,) = lacks(config, ["Si"], mpi, **EVERYTHING)
    assert lack.key == "command"
    assert words in lack.what
    with pytest.raises(UserError, match=r"reference (cannot be read|names no program)"):
        reference_from(config, mpi)


def test_a_command_among_the_arguments_of_a_dotted_path_is_read_too(pseudo: dict[str, Any]) -> None:
    profile = {"command": 'pw.x "x', "pseudo_dir": pseudo["pseudo_dir"]}
    arguments = {"profile": profile, "pseudopotentials": pseudo["pseudopotentials"]}
    lack = only("ase.calculators.espresso.Espresso", arguments, "Si")
    assert lack.key == "arguments"
    assert "No closing quotation" in lack.what
    with pytest.raises(UserError, match=r"profile of .* does not fit: Cannot parse command"):
        check_arguments(Reference("ase.calculators.espresso.Espresso", arguments))


def test_a_command_that_leaves_the_launcher_out_is_told(pseudo: dict[str, Any]) -> None:
    config = Config(calculator="espresso", arguments=pseudo, command="pw.x -nk 2")
    (lack,) = lacks(config, ["Si"], "mpirun -n 4", **EVERYTHING)
    assert (lack.what, lack.accepted) == (
        "has no {mpi}, so it runs without the site's MPI launcher",
        "{mpi} pw.x -nk 2",
    )


def test_scratch_that_cannot_be_written_or_is_full_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    import tempfile
    from types import SimpleNamespace

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert list(scratch_lacks()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2.0e6))
    assert list(scratch_lacks()) == [f"{tmp_path}, where calculations run (TMPDIR), has only 2 MB free"]
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    first, _ = scratch_lacks()
    assert first.startswith(f"TMPDIR is {tmp_path / 'gone'}, which is no folder that you can write to")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return load_campaign(write_campaign(tmp_path_factory.mktemp("inputs")))


def with_reference(campaign: Campaign, **settings: Any) -> Campaign:
    return campaign.model_copy(update={"reference": Config(**settings)})


def slurm_site(**settings: Any) -> Site:
    return Site.model_validate({"name": "x", "executor": "slurm", "slurm": {}, **settings})


@pytest.mark.parametrize(
    ("site", "severity"),
    [
        (default_site(), "error"),
        (slurm_site(mpi=["srun", "-n", "{ranks}"]), "warning"),
        (
            slurm_site(mpi=["srun", "-n", "{ranks}"], python=["apptainer", "exec", "image.sif", "python"]),
            "warning",
        ),
    ],
)
def test_a_program_that_a_job_s_modules_may_bring_is_a_warning(
    campaign: Campaign, site: Site, severity: str
) -> None:
    asked = with_reference(campaign, calculator="orca", command="no-such-orca")
    found = preflight.reference_problems(site, asked, preflight.read_inputs(campaign))
    assert [(problem.key, problem.severity) for problem in found if problem.source == "campaign"] == [
        ("reference.command", severity)
    ]


def test_the_elements_of_all_that_is_labelled_are_looked_up(campaign: Campaign) -> None:
    inputs = preflight.read_inputs(campaign)
    assert inputs.symbols == ("Cu",)
    asked = with_reference(campaign, calculator="stillinger-weber")
    (problem,) = preflight.reference_problems(default_site(), asked, inputs)
    assert (problem.key, problem.severity) == ("reference.arguments", "error")
    assert "stillinger-weber has nothing for Cu" in problem.what


def test_a_campaign_whose_code_is_not_there_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "Cu.UPF").write_text("<UPF/>")
    arguments = {
        "pseudo_dir": str(tmp_path),
        "pseudopotentials": {"Cu": "Cu.UPF"},
        "input_data": {"ecutwfc": 30},
    }
    reference = {"calculator": "espresso", "arguments": arguments, "command": "/nowhere/pw.x"}
    campaign = write_campaign(tmp_path / "inputs", {"reference": reference})
    run = hpcft("run", campaign, "--dir", tmp_path / "campaign", cwd=tmp_path)
    said, _ = run.communicate()
    assert run.returncode == 2
    assert "reference.command: starts /nowhere/pw.x, and there is no such program there" in said
    assert not (tmp_path / "campaign").exists()


def test_a_campaign_whose_pseudopotential_is_not_there_is_refused_with_its_path(tmp_path: Path) -> None:
    arguments = {"pseudo_dir": str(tmp_path), "pseudopotentials": {"Cu": "Cu.UPF"}}
    reference = {"calculator": "espresso", "arguments": arguments, "command": "sh"}
    campaign = write_campaign(tmp_path / "inputs", {"reference": reference})
    with pytest.raises(AssertionError, match=f"pseudopotential of Cu, {tmp_path}/Cu.UPF, does not exist"):
        hpcft_to_end("run", campaign, "--dir", tmp_path / "campaign", cwd=tmp_path)
    assert not (tmp_path / "campaign").exists()

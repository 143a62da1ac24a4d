"""What `hpcft label --dry-run` and `hpcft check` say of labels alone, before anything is submitted or computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.build import bulk
from ase.io import write
from check_commands import GOOD, hpcft, program, recorded_programs, write_site


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    return recorded_programs(tmp_path / "bin")


def wish(folder: Path, calculator: str = "emt", **more: Any) -> tuple[object, ...]:
    """The command for three cells of silicon, or of copper for EMT."""
    symbol = "Cu" if calculator == "emt" else "Si"
    write(folder / "in.extxyz", [bulk(symbol, crystalstructure="diamond", a=5.4) for _ in range(3)])
    (folder / "ref.yaml").write_text(yaml.safe_dump({"calculator": calculator, **more}, sort_keys=False))
    return "label", "in.extxyz", "--reference", "ref.yaml", "--dir", "run", "--dry-run"


def test_labels_that_would_run_are_summed_up_and_nothing_is_written(slurm: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path)
    command = wish(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, said, complaint = hpcft(*command, "--shards", 2, "--site", site, path=slurm, cwd=tmp_path)
    assert (code, complaint) == (0, "")
    assert "site good: cluster hpcft, Slurm 22.05.8" in said
    assert "labels in: 3 structures, 6 atoms in all" in said
    assert "label 2 1 1 0 - 60 (1440) - cpu" in said
    assert "explore" not in said
    assert "at most 2 core-hours" in said
    assert said.endswith("no problems found ")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_programs_and_pseudopotentials_are_told_with_the_line_of_the_reference_file(
    slurm: Path, tmp_path: Path
) -> None:
    arguments = {
        "pseudopotentials": {"Si": "Si.upf"},
        "profile": {"pseudo_dir": str(tmp_path / "pseudos")},
        "input_data": {"ecutwfc": 40},
    }
    more = {"arguments": arguments, "command": "/nowhere/pw.x", "time_limit_s": 7200}
    code, said, _ = hpcft(*wish(tmp_path, "espresso", **more), path=slurm, cwd=tmp_path)
    assert code == 2
    assert "error ref.yaml:9: command: starts /nowhere/pw.x, and there is no such program" in said
    assert (
        f"error ref.yaml:2: arguments: The pseudopotential of Si, {tmp_path}/pseudos/Si.upf, does not exist"
        in said
    )
    assert (
        "warning ref.yaml:10: time_limit_s: lets one calculation take 7200 s, but its task ends after 60 min"
        in said
    )
    assert said.endswith("2 errors, 1 warning ")


def test_a_program_without_an_mpi_launcher_is_missing_nothing_but_where_it_has_several_ranks(
    slurm: Path, tmp_path: Path
) -> None:
    program(slurm / "pw.x", "exit 1")
    (tmp_path / "Si.upf").write_text("Si")
    arguments = {"pseudopotentials": {"Si": "Si.upf"}, "profile": {"pseudo_dir": str(tmp_path)}}
    command = wish(tmp_path, "espresso", arguments=arguments, command=str(slurm / "pw.x"))
    code, said, _ = hpcft(*command, path=slurm, cwd=tmp_path)
    assert (code, said.endswith("no problems found ")) == (0, True), said
    code, said, _ = hpcft(*command, "--ranks", 4, path=slurm, cwd=tmp_path)
    assert code == 2
    assert "command: has no {mpi}, so it runs without the site's MPI launcher" in said


def test_what_the_cluster_would_refuse_of_the_label_job_is_told(slurm: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path, GOOD + "stages:\n  label: {account: nope}\n")
    command = wish(tmp_path, label={"resources": {"time_min": 5000}})
    code, said, _ = hpcft(*command, "--site", site, path=slurm, cwd=tmp_path)
    assert code == 2
    assert f"error {site}:5: stages.label.account: the user root may not use the account nope" in said
    assert (
        "error ref.yaml:4: label.resources.time_min: is 5000, but jobs in partition cpu end after 1440"
        in said
    )


def test_a_structure_that_cannot_be_relaxed_as_wished_is_named(slurm: Path, tmp_path: Path) -> None:
    command = wish(tmp_path)
    write(tmp_path / "in.extxyz", [bulk("Cu"), bulk("Cu", cubic=True) * (1, 1, 2)])
    molecule = bulk("Cu", cubic=True)
    molecule.pbc = False
    write(tmp_path / "in.extxyz", molecule, append=True)
    code, said, _ = hpcft(*command, "--relax", "--cell", path=slurm, cwd=tmp_path)
    assert code == 2
    assert "structure 2 of in.extxyz: The cell of Cu4 is to relax, but it is not periodic" in said


def test_a_wrong_key_is_told_as_by_the_command_itself(slurm: Path, tmp_path: Path) -> None:
    command = wish(tmp_path, time_limits=3)
    code, _, complaint = hpcft(*command, path=slurm, cwd=tmp_path)
    assert code == 2
    assert "ref.yaml:2: time_limits: unknown key; did you mean 'time_limit_s'?" in complaint


def test_a_folder_that_has_begun_is_checked_by_what_it_holds(slurm: Path, tmp_path: Path) -> None:
    command = wish(tmp_path)
    code, _, complaint = hpcft(*command[:-1], path=slurm, cwd=tmp_path)
    assert (code, complaint) == (0, "")
    (tmp_path / "in.extxyz").unlink()
    code, said, _ = hpcft("check", "run", path=slurm, cwd=tmp_path)
    assert code == 0
    assert "labels in: 3 structures, 6 atoms in all" in said
    assert said.endswith("no problems found ")
    site = write_site(tmp_path, GOOD.replace("cpu", "nowhere"))
    code, said, _ = hpcft("check", "run", "--site", site, path=slurm, cwd=tmp_path)
    assert code == 2
    assert f"error {site}:3: slurm.partition: there is no partition nowhere" in said

    code, _, complaint = hpcft(*wish(tmp_path, energy="extrapolated"), path=slurm, cwd=tmp_path)
    assert code == 2
    assert 'reference.energy: "free" -> "extrapolated"' in complaint


def test_a_reference_file_alone_is_no_campaign_and_the_right_command_is_named(
    slurm: Path, tmp_path: Path
) -> None:
    wish(tmp_path)
    code, _, complaint = hpcft("check", "ref.yaml", path=slurm, cwd=tmp_path)
    assert code == 2
    assert "hpcft label IN.extxyz --reference ref.yaml --dry-run" in complaint

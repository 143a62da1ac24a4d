"""`hpcft check` and `hpcft site init` as commands, on a machine whose Slurm commands print what a real Slurm printed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write
from check_commands import GOOD, hpcft, program, recorded_programs, write_site

from hpcft.campaign.create import open_or_create
from hpcft.cli import preflight
from hpcft.config.campaign import load_campaign
from hpcft.config.site import Site, default_site, load_site

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_campaign


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_campaign(folder)
    return folder


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    return recorded_programs(tmp_path / "bin")


def test_a_campaign_that_fits_is_summed_up_and_nothing_is_written(
    inputs: Path, slurm: Path, tmp_path: Path
) -> None:
    site = write_site(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, said, complaint = hpcft("check", inputs / "tiny.yaml", "--site", site, path=slurm, cwd=tmp_path)
    assert (code, complaint) == (0, "")
    assert "site good: cluster hpcft, Slurm 22.05.8, arrays of at most 1001" in said
    assert "campaign tiny: 2 rounds, 4 replicas, 62 atoms in all" in said
    assert "explore 2 1 1 0 - 60 (1440) - cpu" in said
    assert "train 1 2 2 0 - 60 (1440) - cpu" in said
    assert said.count("(estimate)") == 2
    assert said.endswith("no problems found ")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_problem_is_told_with_its_line_and_key_and_what_would_be_accepted(
    inputs: Path, slurm: Path, tmp_path: Path
) -> None:
    site = write_site(tmp_path, GOOD + "stages:\n  train: {account: nope, gpus_per_rank: 1}\n")
    code, said, complaint = hpcft("check", inputs / "tiny.yaml", "--site", site, path=slurm, cwd=tmp_path)
    assert (code, complaint) == (2, "")
    place = f"error {site}:5: stages.train"
    assert f"{place}.account: the user root may not use the account nope accepted: lab, root" in said
    assert f"{place}.gpus_per_rank: is 1, but no node in partition cpu has GPUs" in said
    assert said.endswith("2 errors ")


def test_a_start_structure_that_a_run_would_refuse_is_an_error_told_without_torch(
    slurm: Path, tmp_path: Path
) -> None:
    file = write_campaign(tmp_path / "inputs")
    atoms = bulk("Cu", cubic=True)
    atoms.positions[1] = atoms.positions[0] + [0.3, 0, 0]
    write(file.parent / "start.extxyz", [atoms])
    code, said, _ = hpcft("check", file, path=slurm, cwd=tmp_path)
    assert (code, said.endswith("1 error ")) == (2, True)
    assert "start.extxyz (structures): structure 0 (Cu4): atoms 0 and 1 are 0.30 Å apart" in said
    program = (
        "import sys; from pathlib import Path; from hpcft.cli.check import check; check(Path(sys.argv[1])); "
        "assert 'torch' not in sys.modules"
    )
    file = write_campaign(tmp_path / "inputs")
    subprocess.run([sys.executable, "-c", program, str(file)], check=True, cwd=tmp_path, capture_output=True)


def test_the_folder_of_a_campaign_is_checked_by_its_copies_of_the_inputs(slurm: Path, tmp_path: Path) -> None:
    file = write_campaign(tmp_path / "inputs")
    folder = open_or_create(load_campaign(file), file, tmp_path / "mine")
    for path in (tmp_path / "inputs").iterdir():
        path.unlink()
    site = write_site(tmp_path, GOOD.replace("cpu", "nowhere"))
    code, said, complaint = hpcft("check", "mine", "--site", site, path=slurm, cwd=tmp_path)
    assert (code, complaint) == (2, "")
    assert "campaign tiny: 2 rounds, 4 replicas, 62 atoms in all" in said
    assert f"folder {folder.root}: room for" in said
    assert f"error {site}:3: slurm.partition: there is no partition nowhere" in said
    code, said, _ = hpcft("check", "mine", path=slurm, cwd=tmp_path)
    assert (code, said.endswith("no problems found ")) == (0, True)


def test_a_site_alone_can_be_checked_and_warnings_do_not_fail(slurm: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path, GOOD.replace("cpu}", "cpu, max_array_size: 5000}"))
    code, said, _ = hpcft("check", "--site", site, path=slurm, cwd=tmp_path)
    assert (code, said.endswith("1 warning ")) == (0, True)
    assert f"warning {site}:3: slurm.max_array_size: is 5000" in said


def test_mistakes_in_both_files_are_told_at_once(inputs: Path, slurm: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path, GOOD.replace("partition", "partitoin"))
    campaign = tmp_path / "broken.yaml"
    campaign.write_text("name: x\nrounds: 0\n")
    code, said, complaint = hpcft("check", campaign, "--site", site, path=slurm, cwd=tmp_path)
    assert (code, said) == (2, "")
    assert "slurm.partitoin: unknown key; did you mean 'partition'?" in complaint
    assert "rounds: must be at least 1" in complaint


def test_a_slurm_that_does_not_answer_is_exit_code_4_after_the_problems_that_do_not_need_it(
    inputs: Path, slurm: Path, tmp_path: Path
) -> None:
    program(slurm / "scontrol", "echo Unable to contact slurm controller >&2", "exit 1")
    site = write_site(tmp_path, GOOD + "python: [/nowhere/python]\n")
    code, said, complaint = hpcft("check", inputs / "tiny.yaml", "--site", site, path=slurm, cwd=tmp_path)
    assert code == 4
    assert f"error {site}:4: python: there is no program /nowhere/python on this machine" in said
    assert "Slurm was not asked about its limits" in complaint
    assert "Unable to contact slurm controller" in complaint
    _, said, _ = hpcft("check", "--site", write_site(tmp_path), path=slurm, cwd=tmp_path)
    assert said.endswith("no problems found without Slurm ")


def test_a_machine_without_slurm_is_a_problem_of_a_slurm_site(tmp_path: Path) -> None:
    code, said, complaint = hpcft("check", "--site", write_site(tmp_path), path=None, cwd=tmp_path)
    assert (code, complaint) == (2, "")
    assert "executor: is slurm, but sbatch, squeue, scancel, scontrol, srun cannot be found" in said


def test_the_local_executor_is_checked_without_slurm(inputs: Path, slurm: Path, tmp_path: Path) -> None:
    program(slurm / "scontrol", "exit 1")
    code, said, _ = hpcft("check", inputs / "tiny.yaml", path=slurm, cwd=tmp_path)
    assert code == 0
    assert "site local: tasks are processes on this machine" in said


def test_a_site_file_is_made_from_the_cluster_s_answers_and_passes_the_check(
    slurm: Path, tmp_path: Path
) -> None:
    code, said, complaint = hpcft("site", "init", path=slurm, cwd=tmp_path)
    assert (code, complaint) == (0, "")
    assert said.startswith("hpcft.yaml written.")
    assert load_site(tmp_path / "hpcft.yaml").cluster == "hpcft"
    code, said, _ = hpcft("check", "--site", "hpcft.yaml", path=slurm, cwd=tmp_path)
    assert (code, said.endswith("no problems found ")) == (0, True), said


def test_a_site_file_that_exists_is_left_alone(slurm: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path)
    code, said, complaint = hpcft("site", "init", "--out", site, path=slurm, cwd=tmp_path)
    assert (code, said) == (2, "")
    assert f"{site} exists and is left as it is" in complaint
    assert site.read_text() == GOOD
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["site.yaml"]


def test_a_name_that_no_site_may_have_is_refused_before_there_is_a_file(slurm: Path, tmp_path: Path) -> None:
    code, _, complaint = hpcft("site", "init", "--name", "-odd", "--out", "x.yaml", path=slurm, cwd=tmp_path)
    assert code == 2
    assert complaint.startswith("hpcft: x.yaml:4: name: '-odd' is not allowed")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_machine_without_slurm_has_nothing_to_make_a_site_file_from(tmp_path: Path) -> None:
    code, said, complaint = hpcft("site", "init", path=None, cwd=tmp_path)
    assert (code, said) == (2, "")
    assert complaint.startswith("hpcft: scontrol and sinfo cannot be found on this machine")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_do_not_wait_for_torch() -> None:
    program = "import sys, hpcft.cli.main, hpcft.cli.preflight, hpcft.cluster.draft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What a run needs of this machine.


def folder_messages(root: Path, needed: preflight.Estimate | None = None) -> list[str]:
    return [problem.what for problem in preflight.folder_problems(root, needed)]


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder_messages(tmp_path / "runs" / "mine") == []
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    (message,) = folder_messages(tmp_path / "runs" / "mine")
    assert message.startswith(f"you may not write to {tmp_path}, so the campaign folder")


def test_a_folder_with_somebody_s_files_and_a_file_are_no_place_for_a_campaign(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert folder_messages(tmp_path) == [f"{tmp_path} has files in it and is no campaign folder"]
    assert folder_messages(tmp_path / "thesis.tex") == [f"{tmp_path / 'thesis.tex'} is a file"]
    (tmp_path / "campaign.json").touch()
    assert folder_messages(tmp_path) == []


def test_a_folder_that_others_can_write_is_named_with_the_command_that_mends_it(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o777)
    (message,) = folder_messages(root)
    assert message.endswith(f"do: chmod go-w {root}")


def test_a_path_that_slurm_would_read_as_something_else_is_refused(tmp_path: Path) -> None:
    (message,) = folder_messages(tmp_path / "100%")
    assert "which Slurm would read as something else" in message


def test_a_file_system_without_enough_room_is_named_with_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_space", lambda folder: (10**9, 100))
    small, large = preflight.Estimate(100, 10**9, 1, 0), preflight.Estimate(101, 2 * 10**9, 1, 0)
    assert folder_messages(tmp_path / "mine", small) == []
    assert folder_messages(tmp_path / "mine", large) == [
        f"{tmp_path} has 1 GB free, and the campaign will write about 2 GB (estimate)",
        f"{tmp_path} has room for 100 more files, and the campaign will make about 101 (estimate)",
    ]
    monkeypatch.setattr(preflight, "free_space", lambda folder: (10**12, None))  # it does not count its files
    assert folder_messages(tmp_path / "mine", large) == []


def test_hours_are_those_of_all_tasks_and_ranks_of_all_rounds(inputs: Path) -> None:
    campaign = load_campaign(inputs / "tiny.yaml")
    slurm = {"partition": "cpu", "gpus_per_rank": 1}
    gpus = Site.model_validate(
        {"name": "x", "executor": "slurm", "slurm": slurm, "stages": {"label": {"gpus_per_rank": 0}}}
    )
    needed = preflight.estimate(campaign, gpus, preflight.read_inputs(campaign))
    # probe 2, reference 2 and evaluate 1 task in three rounds; explore 2, select 1, label 2, train 2 ranks in two; an hour each.
    assert needed.core_hours == 3 * (2 + 2 + 1) + 2 * (2 + 1 + 2 + 2)
    assert needed.gpu_hours == needed.core_hours - 2 * 2
    assert preflight.estimate(campaign, default_site(), preflight.read_inputs(campaign)).gpu_hours == 0


def test_replicas_are_not_spread_over_more_tasks_than_there_are(inputs: Path) -> None:
    campaign = load_campaign(inputs / "tiny.yaml")
    many = campaign.model_copy(update={"explore": campaign.explore.model_copy(update={"tasks": 100})})
    assert preflight.num_tasks(many, "explore", preflight.read_inputs(campaign)) == 4
    assert preflight.num_tasks(many, "explore", None) == 100


def on_path(name: str) -> str | None:
    return name if name in ("sbatch", "squeue", "scancel", "scontrol", "srun", "python3") else None


@pytest.mark.parametrize(
    ("python", "severity"),
    [(["python3"], None), (["/nowhere/python"], "error"), (["in-a-module"], "warning")],
)
def test_a_python_that_is_not_there_is_an_error_unless_the_setup_may_bring_it(
    python: list[str], severity: str | None
) -> None:
    site = Site.model_validate({"name": "x", "executor": "slurm", "slurm": {}, "python": python})
    found = [p.severity for p in preflight.machine_problems(site, None, on_path) if p.key == "python"]
    assert found == ([severity] if severity else [])


def test_a_container_image_that_is_not_there_is_named() -> None:
    python = ["python3", "--bind", "/scratch", "/nowhere/image.sif", "python"]
    site = Site.model_validate({"name": "x", "executor": "slurm", "slurm": {}, "python": python})
    found = [p.what for p in preflight.machine_problems(site, None, on_path) if p.key == "python"]
    assert found == ["there is no image /nowhere/image.sif on this machine"]


def test_a_limit_on_cpu_time_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1800, 1800))
    (problem,) = preflight.machine_problems(default_site(), None)
    assert (problem.severity, problem.key) == ("warning", "ulimit")
    assert problem.what.startswith("each process here is ended after 30 min of CPU time")


def test_a_calculation_that_may_take_longer_than_its_task_is_a_warning(inputs: Path) -> None:
    campaign = load_campaign(inputs / "tiny.yaml")
    slow = campaign.reference.model_copy(update={"time_limit_s": 3601.0})
    (problem,) = preflight.machine_problems(default_site(), campaign.model_copy(update={"reference": slow}))
    assert (problem.severity, problem.key) == ("warning", "reference.time_limit_s")
    assert preflight.machine_problems(default_site(), campaign) == []


def test_a_shared_store_where_nothing_can_be_written_is_found_before_anything_is_submitted(
    inputs: Path,
) -> None:
    campaign = load_campaign(inputs / "tiny.yaml")

    def with_store(path: Path) -> list[str]:
        label = campaign.label.model_copy(update={"store": path})
        found = preflight.machine_problems(default_site(), campaign.model_copy(update={"label": label}))
        return [problem.key for problem in found]

    (inputs / "file").touch()
    assert with_store(inputs / "file" / "labels") == ["label.store"]
    assert with_store(inputs / "not" / "made" / "yet") == []

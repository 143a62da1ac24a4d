from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hpcft.config.campaign import STAGES
from hpcft.config.site import (
    JOBSCRIPTS,
    Controller,
    Site,
    Slurm,
    default_site,
    filled_in,
    load_site,
    missing_executables,
)
from hpcft.config.yaml_file import dump_yaml, load_yaml
from hpcft.errors import UserError

SHIPPED = Path(__file__).parents[2] / "site-configs"
MACHINES = sorted(
    path.name for path in SHIPPED.glob("*.yaml") if path.stem not in ("local", "test-cluster", "generic")
)

VALID = """\
name: machine
executor: slurm
environment:
  OMP_NUM_THREADS: "1"
setup:
  - module load python
slurm:
  partition: cpu
  account: lab
  srun_arguments: [--mpi=pmix]
  options: {mail-type: FAIL, exclusive: true, nice: 10}
stages:
  train:
    partition: gpu
    gpus_per_rank: 1
    account:
    options: {exclusive: false, gres-flags: enforce-binding}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.yaml"
    path.write_text(VALID)
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def problems(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_site(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def test_a_stage_without_a_section_of_its_own_has_the_slurm_section(file: Path) -> None:
    site = load_site(file)
    assert site.slurm_for("label") == site.slurm
    assert site.slurm_for("label").options == {"mail-type": "FAIL", "exclusive": True, "nice": 10}


def test_a_stage_changes_what_it_names_and_merges_options(file: Path) -> None:
    assert load_site(file).slurm_for("train") == Slurm(
        partition="gpu",
        account=None,
        gpus_per_rank=1,
        srun_arguments=("--mpi=pmix",),
        options={"mail-type": "FAIL", "exclusive": False, "nice": 10, "gres-flags": "enforce-binding"},
    )


def test_a_stored_site_is_read_back_with_the_same_stages(file: Path) -> None:
    site = load_site(file)
    again = Site.model_validate_json(site.model_dump_json())
    assert again == site
    assert again.slurm_for("train") == site.slurm_for("train")
    file.write_text(dump_yaml(site.model_dump(mode="json")))
    assert load_site(file) == site


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "executor: slurm",
            "executor: slrum",
            "2: executor: must be 'local' or 'slurm', but is 'slrum'; did you mean",
        ),
        ("executor: slurm", "executor: pbs", "2: executor: must be 'local' or 'slurm', but is 'pbs'"),
        ("executor: slurm", "execute: slurm", "2: execute: unknown key; did you mean 'executor'?"),
        ("name: machine", "name: a b", "1: name: 'a b' is not allowed: use at most 64 of"),
        ("name: machine", "name: m\npoll_s: 0", "2: poll_s: must be greater than 0 s, but is 0"),
        ("name: machine", "name: m\ndevice: gpu", "2: device: must be 'auto', 'cpu' or 'cuda', but is 'gpu'"),
        (
            "name: machine",
            "name: m\nmax_running_tasks: 0",
            "2: max_running_tasks: must be at least 1, but is 0",
        ),
        (
            "OMP_NUM_THREADS:",
            "OMP-NUM:",
            "4: environment.OMP-NUM: 'OMP-NUM' is not allowed: a variable's name has",
        ),
        ("OMP_NUM_THREADS:", '"A=$(id)\\n":', "4: environment.'A=$(id)\\n': 'A=$(id)\\n' is not allowed"),
        ('"1"', "1", "4: environment.OMP_NUM_THREADS: must be text, but is 1; put quotes around it"),
        ('"1"', "FALSE", "4: environment.OMP_NUM_THREADS: must be text, but is false; put quotes around it"),
        (
            '"1"',
            '"1\\nrm -rf /"',
            "4: environment.OMP_NUM_THREADS: '1\\nrm -rf /' is not allowed: it must be one line",
        ),
        ("- module load python", '- "a\\0"', "6: setup[0]: 'a\\x00' is not allowed: it must be one line"),
        (
            "\n  - module load python",
            " module load python",
            "5: setup: must be a list, such as [a, b], but is",
        ),
        ("partition: cpu", "partition: -w n1", "8: slurm.partition: '-w n1' is not allowed"),
        (
            "partition: cpu",
            "partition: c\n  gpus_per_rank: -1",
            "9: slurm.gpus_per_rank: must be at least 0, but is -1",
        ),
        ("partition: cpu", "partition: c\n  constraint: a;id", "9: slurm.constraint: 'a;id' is not allowed"),
        (
            "partition: cpu",
            "partition: c\n  max_array_size: 0",
            "9: slurm.max_array_size: must be at least 1",
        ),
        ("account: lab", "acount: lab", "9: slurm.acount: unknown key; did you mean 'account'?"),
        ("[--mpi=pmix]", '["--mpi\\n"]', "10: slurm.srun_arguments[0]: '--mpi\\n' is not allowed"),
        (
            "mail-type",
            "mail_type",
            "11: slurm.options.mail_type: 'mail_type' is not allowed: write a long option",
        ),
        ("mail-type", "--mail-type", "11: slurm.options.--mail-type: '--mail-type' is not allowed"),
        ("mail-type", "'x\\n#SBATCH --uid'", "11: slurm.options.'x\\\\n#SBATCH --uid':"),
        (
            "mail-type",
            "partition",
            "11: slurm.options.partition: is a key of the slurm section itself; write slurm",
        ),
        (
            "mail-type",
            "array",
            "11: slurm.options.array: is set by hpcft from the campaign and the task; delete it",
        ),
        ("FAIL", '"a\\nb"', "11: slurm.options.mail-type: 'a\\nb' is not allowed: it must be one line"),
        (
            "FAIL",
            "1.5",
            "11: slurm.options.mail-type: must be text, a whole number, true or false, but is 1.5",
        ),
        (
            "FAIL",
            "[a]",
            "11: slurm.options.mail-type: must be text, a whole number, true or false, but is a list",
        ),
        ("  train:", "  trian:", "13: stages.trian: must be 'explore', 'select', "),
        ("  train:", "  trian:", "but is 'trian'; did you mean 'train'?"),
        (
            "    partition: gpu",
            "    partitoin: gpu",
            "14: stages.train.partitoin: unknown key; did you mean 'partition'?",
        ),
        (
            "    gpus_per_rank: 1",
            "    gpus_per_rank:",
            "15: stages.train.gpus_per_rank: must be a whole number, but is empty (null)",
        ),
        (
            "OMP_NUM_THREADS:",
            "HF_TOKEN:",
            "4: environment.HF_TOKEN: looks like a secret, and others can read",
        ),
        ("OMP_NUM_THREADS:", "AWS_SECRET_ACCESS_KEY:", "export it in the shell that starts hpcft"),
        ("OMP_NUM_THREADS:", "db_password:", "4: environment.db_password: looks like a secret"),
        ("OMP_NUM_THREADS:", "WANDB_API_KEY:", "4: environment.WANDB_API_KEY: looks like a secret"),
    ],
)
def test_a_bad_value_is_told_with_line_key_and_remedy(file: Path, old: str, new: str, problem: str) -> None:
    change(file, old, new)
    (found,) = problems(file)
    assert problem in found
    assert found.isprintable()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("executor: slurm\n", "2: executor: slurm needs a section `slurm:` with what jobs ask for"),
        ("executor: local\nsetup: [module load x]\n", "3: setup: runs in Slurm jobs only; delete it"),
        ("executor: local\nstages: {train: {}}\n", "3: stages: changes the slurm section, but there is none"),
    ],
)
def test_settings_that_contradict_each_other_are_told_with_line_key_and_remedy(
    file: Path, text: str, problem: str
) -> None:
    file.write_text(f"name: machine\n{text}")
    (found,) = problems(file)
    assert problem in found


def test_a_site_without_slurm_cannot_say_what_to_ask_of_it() -> None:
    with pytest.raises(UserError, match="site local has no slurm section"):
        default_site().slurm_for("train")


def test_defaults_follow_the_executor() -> None:
    local, slurm = default_site(), Site(name="s", executor="slurm", slurm=Slurm(partition="cpu"))
    assert (local.poll_interval_s, slurm.poll_interval_s) == (0.5, 10.0)
    assert (local.task_limit(num_cores=6), slurm.task_limit(num_cores=6)) == (6, None)
    assert local.task_limit() >= 1  # type: ignore[operator]
    chosen = Site(name="s", executor="local", max_running_tasks=2, poll_s=3)
    assert (chosen.task_limit(num_cores=6), chosen.poll_interval_s) == (2, 3.0)


def test_missing_executables_are_those_that_the_executor_calls_and_path_lacks() -> None:
    slurm = Site(name="s", executor="slurm", slurm=Slurm(partition="cpu"))
    only_sbatch = {"sbatch": "/usr/bin/sbatch"}.get
    assert missing_executables(slurm, only_sbatch) == ["squeue", "scancel", "scontrol", "srun"]
    assert missing_executables(slurm, lambda name: f"/usr/bin/{name}") == []
    assert missing_executables(default_site(), lambda name: None) == []


def test_the_shipped_local_site_is_the_default_site() -> None:
    assert load_site(SHIPPED / "local.yaml") == default_site()


def test_the_shipped_test_cluster_sends_models_to_its_gpu_partition() -> None:
    site = load_site(SHIPPED / "test-cluster.yaml")
    partitions = {stage: site.slurm_for(stage).partition for stage in ("explore", "label", "train", "probe")}
    assert partitions == {"explore": "gpu", "label": "cpu", "train": "gpu", "probe": "gpu"}
    assert site.device == "cpu"
    assert site.environment["OMPI_MCA_btl"] == "self,tcp"


def test_a_site_may_leave_the_partition_to_slurm(file: Path) -> None:
    change(file, "  partition: cpu\n", "")
    site = load_site(file)
    assert site.slurm_for("label").partition is None
    assert site.slurm_for("train").partition == "gpu"


def test_words_that_only_contain_the_name_of_a_secret_are_allowed(file: Path) -> None:
    change(file, "OMP_NUM_THREADS:", "TOKENIZERS_PARALLELISM:")
    assert load_site(file).environment == {"TOKENIZERS_PARALLELISM": "1"}


def test_placeholders_become_the_job_scripts_and_this_python_when_the_site_is_loaded(file: Path) -> None:
    change(file, "module load python", '". {jobscripts}/settings ${python} ${jobscripts}"')
    change(file, "[--mpi=pmix]", '["--task-prolog={jobscripts}/prolog"]')
    change(file, '"1"', '"{jobscripts}"')
    file.write_text(file.read_text() + 'python: ["{jobscripts}/bind-rank", "{python}"]\n')
    site = load_site(file)
    assert site.python == (f"{JOBSCRIPTS}/bind-rank", sys.executable)
    assert Path(site.python[0]).is_file()
    assert site.setup == (f". {JOBSCRIPTS}/settings ${{python}} ${{jobscripts}}",)
    assert site.slurm_for("label").srun_arguments == (f"--task-prolog={JOBSCRIPTS}/prolog",)
    assert site.environment == {"OMP_NUM_THREADS": str(JOBSCRIPTS)}
    assert Site.model_validate_json(site.model_dump_json()) == site


def test_the_folder_of_the_job_scripts_is_quoted_for_the_shell_only(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    assert filled_in("{jobscripts}/x", folder) == f"{folder}/x"
    assert filled_in("{jobscripts}/x", folder, lambda text: f"<{text}>") == f"<{folder}>/x"


def test_an_installation_without_job_scripts_says_so_where_they_are_wanted(tmp_path: Path) -> None:
    assert filled_in("module load x", tmp_path / "none") == "module load x"
    with pytest.raises(ValueError, match=r"none, which is not there; install hpcft from a clone"):
        filled_in("{jobscripts}/bind-rank", tmp_path / "none")


def test_the_generic_site_shows_every_key_and_those_commented_out_load_too(file: Path) -> None:
    text = (SHIPPED / "generic.yaml").read_text()
    load_site(SHIPPED / "generic.yaml")
    file.write_text(re.sub(r"^( *)# (?= *([A-Za-z_]+:|- ))", r"\1", text, flags=re.MULTILINE))
    load_site(file)
    shown = load_yaml(file).data
    assert set(shown) == set(Site.model_fields)
    assert set(shown["slurm"]) == set(Slurm.model_fields)
    assert set(shown["controller"]) == set(Controller.model_fields) - set(Slurm.model_fields)
    for key in set(Site.model_fields) | set(Slurm.model_fields) | set(shown["controller"]):
        assert re.search(rf"^[ #]*{key}: ?.* # .*[a-z]", text, re.MULTILINE), f"{key} is not explained"


@pytest.mark.parametrize("name", MACHINES)
def test_the_file_of_a_real_machine_loads_and_names_its_sources_and_when_they_were_read(name: str) -> None:
    text = (SHIPPED / name).read_text()
    site = load_site(SHIPPED / name)
    assert site.name == Path(name).stem
    head = text[: text.index("\nname:")]
    assert re.search(r"# Looked up \d{4}-\d{2}-\d{2}", head)
    assert re.search(r"https://\S+", head)
    assert "# Not found:" in head
    assert "SBATCH_ACCOUNT" in head


@pytest.mark.parametrize("name", MACHINES)
def test_the_file_of_a_real_machine_sends_models_to_gpus_unless_it_says_cpu(name: str) -> None:
    site = load_site(SHIPPED / name)
    gpus = {stage for stage in (*STAGES, "controller") if site.slurm_for(stage).gpus_per_rank}
    assert gpus == (set() if site.device == "cpu" else {"explore", "probe", "train"})
    assert all(site.slurm_for(stage).account is None for stage in STAGES)

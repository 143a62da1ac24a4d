from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from hpcft.cluster.executors import JobSpec, _visible_gpus, slurm_parameters
from hpcft.config.campaign import Resources
from hpcft.config.site import Site

SITE: dict[str, Any] = {
    "name": "cluster",
    "executor": "slurm",
    "environment": {"HDF5_USE_FILE_LOCKING": "FALSE"},
    "setup": ["module load python"],
    "slurm": {"partition": "cpu", "options": {"mail-type": "FAIL"}},
    "stages": {
        "train": {"partition": "gpu", "gpus_per_rank": 1, "qos": "long", "options": {"exclusive": True}}
    },
}


def site(**slurm: Any) -> Site:
    return Site.model_validate({**SITE, "slurm": {**SITE["slurm"], **slurm}})


def spec(
    stage: str = "label", ranks: int = 1, folder: Path = Path("/runs/a/jobs"), **resources: Any
) -> JobSpec:
    return JobSpec(f"hpcft-0123abcd-r1-{stage}-1", stage, ranks, Resources(**resources), folder)


def script(site: Site, spec: JobSpec, map_count: int | None = None) -> list[str]:
    """The lines of the batch script that submitit would send."""
    parameters = slurm_parameters(site, spec)
    text = _make_sbatch_string("python -u work", spec.folder, map_count=map_count, **parameters)
    return text.split("\n")


def directives(lines: list[str]) -> dict[str, str | None]:
    """The options of sbatch, None for those without a value; all stand before the first command."""
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(options) < min(commands)
    words = [shlex.split(lines[number])[1].removeprefix("--").partition("=") for number in options]
    return {key: value if equals else None for key, equals, value in words}


def srun(lines: list[str]) -> list[str]:
    [command] = [line for line in lines if line.startswith("srun ")]
    return shlex.split(command)


def test_a_job_asks_for_what_the_campaign_and_the_site_say_and_for_nothing_else() -> None:
    lines = script(site(), spec(time_min=90, cpus_per_rank=4, ranks=2))
    assert directives(lines) == {
        "job-name": "hpcft-0123abcd-r1-label-1",
        "partition": "cpu",
        "time": "90",
        "nodes": "1",
        "ntasks-per-node": "2",
        "cpus-per-task": "4",
        "mail-type": "FAIL",
        "hold": None,
        "requeue": None,
        "open-mode": "append",
        "output": "/runs/a/jobs/%j_0_log.out",
        "error": "/runs/a/jobs/%j_0_log.err",
        "signal": "USR2@90",
    }


def test_a_job_is_held_whatever_the_site_says() -> None:
    for changes in ({}, {"options": {}}, {"options": {"exclusive": False}}):
        options = directives(script(site(**changes), spec()))
        assert "hold" in options
        assert "exclusive" not in options


def test_a_workload_key_is_given_only_where_the_site_has_one() -> None:
    assert "wckey" not in directives(script(site(), spec()))
    assert directives(script(site(wckey="chem"), spec()))["wckey"] == "chem"


def test_account_qos_and_constraint_are_given_where_the_site_has_them() -> None:
    options = directives(script(site(account="lab", qos="normal", constraint="zen4&ib"), spec()))
    assert (options["account"], options["qos"], options["constraint"]) == ("lab", "normal", "zen4&ib")


def test_each_stage_has_its_own_partition_gpus_and_options() -> None:
    label = directives(script(site(account="lab"), spec("label")))
    train = directives(script(site(account="lab"), spec("train", ranks=4)))
    assert (label["partition"], train["partition"]) == ("cpu", "gpu")
    assert "gpus-per-node" not in label
    assert train["gpus-per-node"] == "4"
    assert train["qos"] == "long"
    assert train["account"] == "lab"
    assert train["mail-type"] == "FAIL"
    assert train["exclusive"] is None
    assert not {"qos", "exclusive"} & label.keys()


@pytest.mark.parametrize(
    ("memory_GB", "asked"), [(4, "4096M"), (0.5, "512M"), (1.9999, "2048M"), (1e-6, "1M"), (None, None)]
)
def test_memory_is_rounded_up_and_never_asked_for_as_0_which_means_all(
    memory_GB: float | None, asked: str | None
) -> None:
    assert directives(script(site(), spec(memory_GB=memory_GB))).get("mem") == asked


def test_the_elements_of_an_array_write_logs_of_their_own_and_run_as_many_as_the_site_allows() -> None:
    options = directives(script(site(), spec(), map_count=7))
    assert options["array"] == "0-6%7"
    assert options["output"] == "/runs/a/jobs/%A_%a_0_log.out"
    assert directives(script(site(array_parallelism=3), spec(), map_count=7))["array"] == "0-6%3"


def test_all_ranks_end_with_the_first_that_fails_and_have_their_cores() -> None:
    words = srun(
        script(site(srun_arguments=["--mpi=pmix", "--cpu-bind=none"]), spec(ranks=2, cpus_per_rank=4))
    )
    assert words[:2] == ["srun", "--unbuffered"]
    assert "--kill-on-bad-exit=1" in words
    assert "--cpus-per-task=4" in words
    assert words[-5:] == ["--mpi=pmix", "--cpu-bind=none", "python", "-u", "work"]


def test_variables_are_set_before_the_setup_lines_and_those_before_the_work() -> None:
    lines = script(site(), spec(cpus_per_rank=4))
    exports = [line for line in lines if line.startswith("export ") and "SUBMITIT" not in line]
    assert exports == [
        "export OMP_NUM_THREADS=4",
        "export MKL_NUM_THREADS=4",
        "export OPENBLAS_NUM_THREADS=4",
        "export PYTHONSAFEPATH=1",
        "export HDF5_USE_FILE_LOCKING=FALSE",
    ]
    order = [lines.index(line) for line in (*exports, "module load python", shlex.join(srun(lines)))]
    assert order == sorted(order)


def test_the_site_has_the_last_word_on_a_variable() -> None:
    changed = Site.model_validate({**SITE, "environment": {"OMP_NUM_THREADS": "1"}})
    lines = script(changed, spec(cpus_per_rank=4))
    assert [line for line in lines if "OMP_NUM" in line] == ["export OMP_NUM_THREADS=1"]


def test_packed_tasks_have_a_rank_and_memory_each_and_one_that_fails_leaves_the_others_alone() -> None:
    packed = replace(spec(ranks=4, memory_GB=1.5, cpus_per_rank=2), are_packed=True)
    lines = script(site(), packed)
    options = directives(lines)
    assert (options["ntasks-per-node"], options["cpus-per-task"], options["mem"]) == ("4", "2", "6144M")
    assert "--kill-on-bad-exit=0" in srun(lines)
    alone = script(site(), spec(ranks=4, memory_GB=1.5))
    assert directives(alone)["mem"] == "1536M"


def test_nodes_are_excluded_only_where_there_are_any_to_exclude() -> None:
    assert directives(script(site(), replace(spec(), exclude=("n1", "n7"))))["exclude"] == "n1,n7"
    assert "exclude" not in directives(script(site(), spec()))


def test_a_controller_waits_for_the_jobs_before_it_instead_of_being_held_and_has_no_step() -> None:
    lines = script(site(), replace(spec("controller"), after=("812", "815")))
    options = directives(lines)
    assert options["dependency"] == "afterany:812:815"
    assert "hold" not in options
    assert not [line for line in lines if line.startswith("srun ")]


# In a process of its own: submitit leaves its children to themselves, which Python warns of.
LOCAL = """
import os, sys, time
from pathlib import Path
from hpcft.cluster.executors import JobSpec, submit
from hpcft.cluster.local import job_is_alive
from hpcft.config.campaign import Resources
from hpcft.config.site import Site

def work(name):
    names = ("OMP_NUM_THREADS", "COLOUR", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_GLOBALID")
    values = " ".join(os.environ[name] for name in names)
    Path(f"{name}.{os.environ['SUBMITIT_LOCAL_GLOBALID']}.part").write_text(values)
    Path(f"{name}.{os.environ['SUBMITIT_LOCAL_GLOBALID']}.part").rename(f"{name}.{values.split()[-1]}")
    wait_until(Path("go").exists)

def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

folder = Path.cwd() / "jobs"
site = Site(name="here", executor="local", environment={"COLOUR": "red"})
ids = submit(site, JobSpec("any", "train", 2, Resources(cpus_per_rank=3), folder), work, [("a",), ("b",)])
assert len(set(ids)) == 2
assert "COLOUR" not in os.environ
wait_until(lambda: len(list(Path.cwd().glob("[ab].[01]"))) == 4)
assert all(job_is_alive(job_id, folder) for job_id in ids)
Path("go").touch()
wait_until(lambda: not any(job_is_alive(job_id, folder) for job_id in ids))
"""


def test_local_elements_run_with_their_ranks_and_the_variables_of_the_site(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", LOCAL]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("[ab].[01]")} == {
        f"{name}.{rank}": f"3 red 2 {rank}" for name in "ab" for rank in (0, 1)
    }


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("0,2", {"gpus_per_node": 2, "visible_gpus": [0, 2]}),
        ("3", {"gpus_per_node": 1, "visible_gpus": [3]}),
        ("", {}),
    ],
)
def test_local_tasks_see_the_gpus_that_this_process_sees(
    listed: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert _visible_gpus() == expected

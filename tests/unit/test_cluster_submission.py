"""What sbatch is given, and what its words mean: jobs, a refusal, or nothing that can be relied on."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from hpcft.cluster.executors import JobSpec, submit, write_inputs
from hpcft.config.campaign import Resources
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable, SubmissionRefused

SITE = Site.model_validate(
    {
        "name": "cluster",
        "executor": "slurm",
        "environment": {"HDF5_USE_FILE_LOCKING": "FALSE"},
        "slurm": {"partition": "cpu"},
    }
)


def site() -> Site:
    return SITE


def spec(folder: Path, **resources: Any) -> JobSpec:
    return JobSpec("hpcft-0123abcd-r1-label-1", "label", 1, Resources(**resources), folder)


def directives(lines: list[str]) -> dict[str, str | None]:
    options = [
        shlex.split(line)[1].removeprefix("--").partition("=") for line in lines if line.startswith("#SBATCH")
    ]
    return {key: value if equals else None for key, equals, value in options}


SBATCH = """#!/bin/sh
cp "$1" "{folder}/script"
env > "{folder}/environment"
{then}
"""


@pytest.fixture
def slurm_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an sbatch on PATH that keeps what it gets and then does what it is told, and an srun that only exists."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def install(then: str) -> None:
        for name, text in {
            "sbatch": SBATCH.format(folder=tmp_path, then=then),
            "srun": "#!/bin/sh\n",
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    return install


def test_several_elements_are_one_array_and_each_has_its_id(slurm_shim: Any, tmp_path: Path) -> None:
    slurm_shim("echo Submitted batch job 812")
    job = spec(folder=tmp_path / "jobs", cpus_per_rank=2)
    assert submit(site(), job, print, [("a",), ("b",), ("c",)]) == ["812_0", "812_1", "812_2"]
    sent = directives((tmp_path / "script").read_text().split("\n"))
    assert sent["array"] == "0-2%3"
    assert "hold" in sent
    assert "wckey" not in sent
    assert "OMP_NUM_THREADS=2" in (tmp_path / "environment").read_text().split("\n")
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_a_single_element_is_a_single_job(slurm_shim: Any, tmp_path: Path) -> None:
    slurm_shim("echo Submitted batch job 813 on cluster big")
    assert submit(site(), spec(folder=tmp_path / "jobs"), print, [("a",)]) == ["813"]
    assert "array" not in directives((tmp_path / "script").read_text().split("\n"))


def test_the_environment_of_a_shell_reaches_sbatch_with_the_variables_of_the_site(
    slurm_shim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")
    monkeypatch.setenv("COLOUR", "red")
    slurm_shim("echo Submitted batch job 812")
    submit(site(), spec(tmp_path / "jobs"), print, [("a",)])
    seen = environment_of_sbatch(tmp_path)
    assert (seen["COLOUR"], seen["HDF5_USE_FILE_LOCKING"]) == ("red", "FALSE")
    assert seen["SLURM_MEM_PER_CPU"] == "1000", "somebody has set it in this shell on purpose"


def environment_of_sbatch(folder: Path) -> dict[str, str]:
    lines = (folder / "environment").read_text().splitlines()
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}


OF_THE_JOB = {
    "SLURM_JOB_ID": "700",
    "SLURM_MEM_PER_CPU": "1000",
    "SLURM_NTASKS": "1",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_ARRAY_JOB_ID": "700",
    "SLURMD_NODENAME": "n1",
    "SRUN_DEBUG": "3",
    "SUBMITIT_EXECUTOR": "slurm",
    "PMI_RANK": "0",
    "PMIX_RANK": "0",
}


def test_a_job_that_submits_hands_nothing_on_that_is_only_true_of_itself(
    slurm_shim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM_MEM_PER_CPU of a controller job would contradict the memory that the new job asks for."""
    kept = {
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_CLUSTERS": "big",
        "SBATCH_ACCOUNT": "lab",
        "COLOUR": "red",
    }
    for name, value in {**OF_THE_JOB, **kept}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    slurm_shim("echo Submitted batch job 812")
    submit(site(), spec(tmp_path / "jobs"), print, [("a",)])
    seen = environment_of_sbatch(tmp_path)
    assert not OF_THE_JOB.keys() & seen.keys()
    assert {name: seen.get(name) for name in kept} == kept
    assert dict(os.environ) == before


UNCLEAR = [
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    "sbatch: error: Batch job submission failed: Unexpected message received on socket",
    "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
    "sbatch: error: Batch job submission failed: Communication connection failure",
    "sbatch: error: Batch job submission failed: Transport endpoint is not connected",
    "sbatch: error: Batch job submission failed: Unspecified error",
    "sbatch: error: If munged is up, restart with --num-threads=10",
    "",
]
NEVER = [
    "Batch job submission failed: Invalid account or account/partition combination specified",
    "Batch job submission failed: Invalid partition name specified",
    "Batch job submission failed: Invalid qos specification",
    "Batch job submission failed: Invalid feature specification",
    "Batch job submission failed: Invalid generic resource (gres) specification",
    "Batch job submission failed: Invalid job array specification",
    "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
    "Batch job submission failed: Requested node configuration is not available",
    "Batch job submission failed: Memory specification can not be satisfied",
    "Batch job submission failed: User's group not permitted to use this partition",
    "Batch job submission failed: Access/permission denied",
    "unrecognized option '--partitoin=cpu'",
    "Invalid --time specification",
    "invalid number of nodes: 0",
]
TOO_MANY = [
    "AssocMaxSubmitJobLimit",
    "QOSMaxSubmitJobPerUserLimit",
    "QOSGrpSubmitJobsLimit",
]
POLICY = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


def outcome(then: str, slurm_shim: Any, tmp_path: Path) -> Exception:
    slurm_shim(then)
    before = dict(os.environ)
    with pytest.raises((SchedulerUnavailable, SubmissionRefused)) as caught:
        submit(site(), spec(tmp_path / "jobs"), print, [("a",), ("b",)])
    assert dict(os.environ) == before
    return caught.value


def says(*lines: str) -> str:
    return "".join(f"echo {shlex.quote(line)} >&2; " for line in lines) + "exit 1"


@pytest.mark.parametrize("then", [*map(says, UNCLEAR), "kill -9 $$", "echo strange"])
def test_a_submission_that_slurm_did_not_confirm_is_neither_taken_for_made_nor_for_refused(
    then: str, slurm_shim: Any, tmp_path: Path
) -> None:
    error = outcome(then, slurm_shim, tmp_path)
    assert isinstance(error, SchedulerUnavailable)
    assert "hpcft-0123abcd-r1-label-1" in str(error)


@pytest.mark.parametrize("words", NEVER)
def test_a_submission_that_slurm_will_never_take_is_refused_with_its_words(
    words: str, slurm_shim: Any, tmp_path: Path
) -> None:
    error = outcome(says(f"sbatch: error: {words}"), slurm_shim, tmp_path)
    assert isinstance(error, SubmissionRefused)
    assert not error.is_limit
    assert words in str(error)


@pytest.mark.parametrize("limit", TOO_MANY)
def test_a_submission_of_too_many_jobs_is_refused_for_now(
    limit: str, slurm_shim: Any, tmp_path: Path
) -> None:
    error = outcome(says(f"sbatch: error: {limit}", f"sbatch: error: {POLICY}"), slurm_shim, tmp_path)
    assert isinstance(error, SubmissionRefused)
    assert error.is_limit
    assert limit in str(error)


def test_jobs_that_submitit_did_not_see_submitted_get_their_input_under_their_ids(tmp_path: Path) -> None:
    from submitit.core.utils import DelayedSubmission

    write_inputs(tmp_path, ["812_0", "812_1"], print, [("a", 1), ("b", 2)])
    read = [DelayedSubmission.load(tmp_path / f"812_{number}_submitted.pkl") for number in (0, 1)]
    assert [(job.function, job.args) for job in read] == [(print, ("a", 1)), (print, ("b", 2))]


@pytest.mark.parametrize(
    ("limit", "is_limit"),
    [
        ("QOSMaxSubmitJobPerUserLimit", True),
        ("AssocMaxSubmitJobLimit", True),
        ("AssocGrpSubmitJobsLimit", True),
        ("QOSMaxWallDurationPerJobLimit", False),
        ("QOSMaxGRESPerJob", False),
        ("", True),
    ],
)
def test_only_a_limit_on_the_number_of_jobs_is_worth_waiting_for(
    slurm_shim: Any, tmp_path: Path, limit: str, is_limit: bool
) -> None:
    """Slurm's last line is the same for every limit."""
    named = f"echo 'sbatch: error: {limit}' >&2; " if limit else ""
    policy = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    slurm_shim(f'{named}echo "sbatch: error: Batch job submission failed: {policy}" >&2; exit 1')
    with pytest.raises(SubmissionRefused) as refusal:
        submit(site(), spec(tmp_path / "jobs"), print, [(1,)])
    assert refusal.value.is_limit is is_limit

"""`hpcft check` and `hpcft site init` against a real cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcft.cluster.limits import effective, read_cluster
from hpcft.config.site import load_site

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_campaign

pytestmark = pytest.mark.slurm

HPCFT = str(Path(sys.executable).with_name("hpcft"))


@pytest.fixture(autouse=True)
def on_slurm(slurm_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_cluster.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("SBATCH_ACCOUNT", "SBATCH_QOS", "SBATCH_PARTITION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("inputs"))


def write_site(folder: Path, **changes: Any) -> Path:
    content = {"name": "test", "executor": "slurm", "slurm": {"partition": "cpu"}, **changes}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def hpcft(*arguments: object, cwd: Path) -> tuple[int, str]:
    """Exit code, and what was said with its lines joined, as they break where the terminal ends."""
    done = subprocess.run(
        [HPCFT, *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, re.sub(r"\s+", " ", done.stdout)


def refusal(site: Path, campaign: Path) -> str:
    code, said = hpcft("check", campaign, "--site", site, cwd=site.parent)
    assert code == 2, said
    return said


def test_a_site_that_fits_the_cluster_has_no_problem(campaign: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path, cluster="hpcft", stages={"train": {"partition": "gpu", "gpus_per_rank": 2}})
    code, said = hpcft("check", campaign, "--site", site, cwd=tmp_path)
    assert code == 0, said
    assert "cluster hpcft, Slurm" in said
    assert said.endswith("no problems found ")


def test_a_partition_that_does_not_exist_is_named_with_those_that_do(campaign: Path, tmp_path: Path) -> None:
    said = refusal(write_site(tmp_path, slurm={"partition": "cpux"}), campaign)
    assert "slurm.partition: there is no partition cpux" in said
    assert "accepted: cpu, gpu, preempt" in said


def test_an_account_that_does_not_exist_is_named_with_the_user_s_own(campaign: Path, tmp_path: Path) -> None:
    said = refusal(write_site(tmp_path, slurm={"partition": "cpu", "account": "nope"}), campaign)
    assert re.search(r"slurm.account: the user \S+ may not use the account nope accepted: lab\b", said)


def test_a_qos_that_does_not_exist_is_named_with_those_that_the_account_has(
    campaign: Path, tmp_path: Path
) -> None:
    said = refusal(write_site(tmp_path, slurm={"partition": "cpu", "qos": "huge"}), campaign)
    assert "slurm.qos: there is no QOS huge accepted: high, normal, tiny" in said


def test_a_time_limit_over_the_partition_s_is_named_with_the_most_that_there_is(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path / "inputs", {"label": {"shards": 2, "resources": {"time_min": 1441}}})
    said = refusal(write_site(tmp_path), campaign)
    assert "label.resources.time_min: is 1441, but jobs in partition cpu" in said
    assert "accepted: at most 1440" in said


def test_more_gpus_than_a_node_has_are_named_with_how_many_there_are(campaign: Path, tmp_path: Path) -> None:
    train = {"partition": "gpu", "gpus_per_rank": 3}
    said = refusal(write_site(tmp_path, stages={"train": train}), campaign)
    assert "stages.train.gpus_per_rank: asks for 6 GPUs on a node for 2 ranks" in said
    assert "accepted: at most 4 GPUs on a node" in said


def test_a_site_for_another_cluster_is_named_with_the_cluster_that_this_is(
    campaign: Path, tmp_path: Path
) -> None:
    said = refusal(write_site(tmp_path, cluster="elsewhere"), campaign)
    assert "cluster: is elsewhere, but Slurm on this machine says ClusterName hpcft" in said


def test_what_check_refuses_sbatch_refuses_too() -> None:
    """Else a check would stand in the way of jobs that would run. (A held job's size is not looked at until its release.)"""
    for wish in ("--partition=cpux", "--account=nope", "--qos=huge", "--partition=gpu --gpus-per-node=5"):
        done = subprocess.run(
            ["sbatch", *wish.split(), "--output=/dev/null", "--wrap=true"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0, wish


def test_the_limits_are_those_of_the_cluster(tmp_path: Path) -> None:
    cluster = read_cluster()
    assert (cluster.name, cluster.max_array_size, cluster.default_account) == ("hpcft", 1001, "lab")
    assert {name: p.max_time_min for name, p in cluster.partitions.items()} == {
        "cpu": 1440,
        "gpu": 1440,
        "preempt": 1440,
    }
    assert cluster.qos["tiny"].max_submitted == 4
    site = load_site(write_site(tmp_path, stages={"label": {"qos": "tiny"}, "train": {"max_time_min": 60}}))
    label, train = effective(site, "label", cluster), effective(site, "train", cluster)
    assert (label.max_array_size, label.max_submitted, label.max_time_min) == (1001, 4, 1440)
    assert (train.max_submitted, train.max_time_min, train.max_memory_GB) == (None, 60, 4000 / 1024)


def test_an_array_of_the_largest_size_is_taken_and_one_larger_is_not() -> None:
    size = read_cluster().max_array_size
    assert size is not None
    for num_elements, is_taken in ((size, True), (size + 1, False)):
        argv = ["sbatch", "--hold", "--parsable", f"--array=0-{num_elements - 1}", "--output=/dev/null"]
        done = subprocess.run([*argv, "--wrap=true"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            subprocess.run(["scancel", done.stdout.strip()], check=True)
        assert (done.returncode == 0) is is_taken, done.stderr


def test_a_site_file_made_from_the_cluster_passes_the_check_and_its_jobs_run(
    campaign: Path, tmp_path: Path
) -> None:
    code, said = hpcft("site", "init", "--out", "new.yaml", cwd=tmp_path)
    assert code == 0, said
    code, said = hpcft("check", campaign, "--site", "new.yaml", cwd=tmp_path)
    assert code == 0, said
    site = load_site(tmp_path / "new.yaml")
    for stage in ("label", "explore"):
        asked = site.slurm_for(stage)
        wishes = {"partition": asked.partition, "account": asked.account, "qos": asked.qos}
        options = [f"--{key}={value}" for key, value in wishes.items() if value]
        options += [f"--gpus-per-node={asked.gpus_per_rank}"] if asked.gpus_per_rank else []
        done = subprocess.run(
            ["srun", *options, "--ntasks=1", "--time=1", "printenv", "SLURM_JOB_PARTITION"],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        assert (done.returncode, done.stdout.strip()) == (0, asked.partition), done.stderr
    assert site.slurm_for("explore").gpus_per_rank == 1

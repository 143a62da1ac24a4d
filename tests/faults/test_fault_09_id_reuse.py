"""The controller's memory is wiped, and job numbers begin anew: a number alone says nothing about whose job it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_campaign import OnSlurm, campaigns_on, command, own_cluster, restart_controller

from hpcft.campaign.manager import Manager

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of our own, whose job numbers may be spoilt."""
    with own_cluster() as cluster:
        yield cluster


@pytest.fixture
def campaign(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnSlurm]:
    with campaigns_on(cluster, tmp_path, monkeypatch) as make:
        yield make()


def submit_and_forget(campaign: OnSlurm, manager: Manager, cluster: Any) -> str:
    """Submit jobs that stay held, then wipe the controller's memory; the next job gets their number, which is returned."""
    release, manager.scheduler.release = manager.scheduler.release, lambda job_ids: None  # type: ignore[method-assign]
    campaign.submit(manager)
    manager.scheduler.release = release  # type: ignore[method-assign]
    # Nobody knows any more what became of them: waiting for it passes thirty times as fast.
    manager.scheduler._clock = lambda: 30 * time.monotonic()
    [array] = campaign.arrays()
    cluster.down("slurmctld")
    for path in (cluster.folder / "state").iterdir():
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    restart_controller(cluster, f"FirstJobId={array}\n")
    return array


def test_another_s_job_that_got_our_number_is_neither_taken_for_ours_nor_touched(
    campaign: OnSlurm, cluster: Any
) -> None:
    """Fails if jobs are matched by number alone, in squeue or in sacct."""
    with campaign.managed() as manager:
        array = submit_and_forget(campaign, manager, cluster)
        argv = ("sbatch", "--parsable", "--hold", "--array=0-1", "--job-name=other", "--wrap=exit 1")
        assert command(*argv, "--output=/dev/null") == array
        campaign.finish_stage(manager)
    assert (
        command("squeue", "-h", "--array", "-o", "%j %T %r", "-j", array).splitlines()
        == ["other PENDING JobHeldUser"] * 2
    )
    command("scancel", array)
    assert campaign.endings() == {(0, 1): "lost", (1, 1): "lost"}
    assert array not in campaign.arrays()
    campaign.assert_undisturbed()

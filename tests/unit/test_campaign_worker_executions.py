"""Several executions of one task: the newest owns it, an older one ends itself; and what signals of a scheduler do."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from one_element import element, files, plan, planned_campaign, run, running

from hpcft.campaign.worker import SUPERSEDED_EXIT
from hpcft.cluster.local import lock_is_held
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder, TaskFolder

WAITS = {"answer": 40, "wait": True}


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    folder = planned_campaign(tmp_path / "small")
    plan(folder, WAITS)
    return folder


@pytest.fixture
def task(folder: CampaignFolder) -> TaskFolder:
    return folder.stage(0, "evaluate").task(0)


def test_an_execution_leaves_a_mark_that_says_where_it_runs(folder: CampaignFolder, task: TaskFolder) -> None:
    with running(folder, 0, 1) as process:
        mark = read_json(task.run(1))
        assert mark.keys() == {"token", "attempt", "host", "node", "pid", "job", "restarts", "at"}
        assert (mark["attempt"], mark["pid"], mark["restarts"]) == (1, process.pid, 0)
    assert folder.stage(0, "evaluate").list_outcomes().runs == {0: 1}


def test_a_task_whose_older_execution_does_not_end_is_left_to_it_until_that_one_is_killed(
    folder: CampaignFolder, task: TaskFolder
) -> None:
    with running(folder, 0, 1) as first:
        assert lock_is_held(task.lock)
        printed, complaint = run(folder, 0, 1)
        assert printed == []
        assert "another execution of this task still holds" in complaint
        assert "still holds" in read_json(task.error(1))["message"]
        first.kill()
        first.wait()
    assert not lock_is_held(task.lock)
    plan(folder, {"answer": 40})
    assert run(folder, 0, 1)[0][1] == "done"
    assert read_json(task.result)["about"]["execution"] == 3


def test_an_older_execution_ends_itself_when_a_newer_one_begins(
    folder: CampaignFolder, task: TaskFolder
) -> None:
    """Slurm may lose sight of a node and start its job again elsewhere, while the first execution lives on."""
    with running(folder, 0, 1, lock_wait_s=300.0) as first:
        plan(folder, {"answer": 41})
        argv = element(folder, 0, 1, lock_wait_s=300.0)
        second = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert first.wait() == SUPERSEDED_EXIT
        assert second.stdout.splitlines()[1] == "done"
    about = read_json(task.result)["about"]
    assert about["execution"] == 2
    assert not task.error(1).exists()


def test_a_second_execution_waits_for_the_first_to_end(folder: CampaignFolder, task: TaskFolder) -> None:
    with running(folder, 0, 1) as first:
        argv = element(folder, 0, 1, lock_wait_s=300.0)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            looks = 0
            while looks < 3 and second.poll() is None:
                time.sleep(0.05)
                looks += has_open(second.pid, task.lock)
            plan(folder, {"answer": 40})
            first.kill()
            assert second.stdout.readline() == "run 1 {'answer': 40}\n"


def has_open(pid: int, path: Path) -> bool:
    try:
        return any(link.readlink() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # a file that was closed while we looked
        return False


def test_a_task_that_is_told_of_its_time_limit_by_slurm_goes_on(
    folder: CampaignFolder, task: TaskFolder
) -> None:
    with running(folder, 0, 1, executor="slurm") as process:
        os.kill(process.pid, signal.SIGUSR2)
        output, _ = process.communicate("")
        assert output.splitlines()[0] == "done"
    assert task.result.exists()
    assert not task.error(1).exists()


def test_a_task_that_is_told_of_its_time_limit_on_this_machine_says_so_and_ends(
    folder: CampaignFolder, task: TaskFolder
) -> None:
    with running(folder, 0, 1, executor="local") as process:
        os.kill(process.pid, signal.SIGUSR2)
        assert process.wait() != 0
    error = read_json(task.error(1))
    assert (error["cause"], error["final"]) == ("time-limit", False)
    assert not task.result.exists()


def test_a_task_that_is_told_to_end_leaves_at_once_and_says_nothing(
    folder: CampaignFolder, task: TaskFolder
) -> None:
    """It was preempted or cancelled, which is no failure of the task: Slurm may queue it again."""
    with running(folder, 0, 1, executor="slurm") as process:
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    assert files(folder, 0).keys() == {"lock", "0000.run-0001.json"}
    assert not lock_is_held(task.lock)

"""Fault 22: a file system has room for so many files: the check counts them beforehand, and a campaign that meets the end
of them stops with the reason, keeps what it has, and goes on once there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_stage import drive, drive_to_end, labels_to_do
from slurm_campaign import NUM_TASKS, OnSlurm
from tiny import write_campaign

from hpcft.campaign.tidy import tidy
from hpcft.cli import preflight

HPCFT = str(Path(sys.executable).with_name("hpcft"))
FILES = 60


def mount(folder: Path, *options: str) -> bool:
    argv = ["mount", "-t", "tmpfs", "-o", ",".join(options), "hpcft-test", str(folder)]
    return os.geteuid() == 0 and subprocess.run(argv, capture_output=True, check=False).returncode == 0


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 60 files and folders."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, "size=64m", f"nr_inodes={FILES}"):
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_the_check_says_how_many_files_there_is_room_for_and_how_many_are_needed(
    few_files: Path, tmp_path: Path
) -> None:
    """Guards the estimate of files: fails if free space alone is looked at."""
    file = write_campaign(tmp_path / "inputs")
    argv = [HPCFT, "check", str(file), "--dir", str(few_files / "tiny")]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "400"}
    )
    said_ = " ".join((done.stdout + done.stderr).split())
    assert f"has room for {FILES - 1} more files, and the campaign will make about" in said_
    assert done.returncode != 0
    assert not list(few_files.iterdir())


def count(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*")) + 1


def test_a_campaign_without_room_for_a_file_stops_with_the_reason_and_goes_on_when_there_is_some(
    few_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards records that cannot be written: fails if one is half there, or a label is paid for twice, or has its own file."""
    campaign = labels_to_do(few_files, monkeypatch)
    monkeypatch.setenv("HPCFT_TEST_CALLS", str(few_files.parent / "calls"))
    campaign = OnSlurm(campaign.folder, few_files.parent, campaign.site)
    ballast = FILES - count(few_files) - 4
    for number in range(ballast):
        (few_files / f"ballast-{number}").touch()
    log = few_files.parent / "driven.log"
    manager = drive(campaign.folder, 0, "reference", log=log)
    assert manager.wait(timeout=120) != 0
    assert "No space left on device" in log.read_text()
    assert not campaign.here.product.exists()
    for number in range(ballast):
        (few_files / f"ballast-{number}").unlink()
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", str(few_files)], check=True)
    drive_to_end(campaign.folder, 0, "reference")
    campaign.assert_undisturbed()
    # What the check counts on, however many structures there are.
    tasks = preflight._FILES_PER_TASK * NUM_TASKS
    running = preflight._FILES_PER_RUNNING_TASK * NUM_TASKS
    assert count(campaign.here.path) <= preflight._FILES_PER_STAGE + tasks + running
    tidy(campaign.here)
    assert count(campaign.here.path) <= preflight._FILES_PER_STAGE + tasks

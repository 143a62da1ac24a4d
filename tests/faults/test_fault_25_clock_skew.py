"""Fault 25: clocks of hosts differ, or run wild: durations are monotonic, and nothing is ordered by a file's time."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from one_stage import drive, drive_to_end, labels_to_do
from shims import killed_at, with_clock

from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.training.checkpoint import Checkpoint, load_latest, save_checkpoint

DAY_S = 86_400


def shuffle_times(folder: CampaignFolder) -> None:
    """Let every file's time of change lie anywhere within a century."""
    chance = random.Random(0)
    for path in folder.root.rglob("*"):
        seconds = chance.uniform(0, 36_500 * DAY_S)
        os.utime(path, (seconds, seconds), follow_symlinks=False)


@pytest.mark.parametrize(
    ("first", "second", "moment"),
    [
        (2, 0, "0001-jobs"),  # an intent of the day after tomorrow, and no job
        pytest.param(-2, 2, "product.json", marks=pytest.mark.nightly),
        pytest.param(2, -2, "0001-submitted.json", marks=pytest.mark.nightly),
    ],
)
def test_a_manager_takes_over_from_one_whose_clock_is_days_away(
    first: int, second: int, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards what is reckoned from times that another host wrote: fails if the next manager waits for them to come."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    dying = with_clock(first * DAY_S, beside=killed_at(1, campaign.root, moment))
    assert drive(campaign.folder, 0, "reference", dying).wait(timeout=300) == -signal.SIGKILL
    shuffle_times(campaign.folder)
    drive_to_end(campaign.folder, 0, "reference", with_clock(second * DAY_S))
    campaign.assert_undisturbed()


def test_time_limits_and_durations_do_not_follow_a_clock_that_runs_wild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards each deadline of a task: by this clock a day passes in nine seconds, and a calculation may take a minute."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    drive_to_end(campaign.folder, 0, "reference", with_clock(rate=10_000))
    campaign.assert_undisturbed()
    assert campaign.endings() == {}
    results = campaign.here.read_results()
    assert all(0 <= result["about"]["wall_s"] < 300 for result in results.values())


def test_the_newest_checkpoint_is_that_of_the_last_epoch_whatever_its_time_of_change(tmp_path: Path) -> None:
    """Guards the order of checkpoints by their number."""
    for epoch in (9, 10):
        save_checkpoint(tmp_path, Checkpoint(epoch, {}, {}, []))
    os.utime(tmp_path / "checkpoint-000010.pt", (0, 0))
    found = load_latest(tmp_path)
    assert found is not None and found.epoch == 10

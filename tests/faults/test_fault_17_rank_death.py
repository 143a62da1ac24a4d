"""Fault 17: one rank of a training is killed: the whole step ends, no collective hangs, and the next attempt goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
from one_stage import campaign_before, drive, said, write_labels
from small_training import start, state_of, structures
from tiny import CAMPAIGN, history_of, kill, processes_of

ENDLESS = 100_000


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_the_other_rank_of_a_killed_one_ends_with_an_error_and_a_new_pair_goes_on(
    victim: int, tmp_path: Path
) -> None:
    """Guards that no rank waits for a dead one (its own time-out is ten minutes), and that what rank 0 saved is sound."""
    ranks = [start(tmp_path, ENDLESS, rank, 2, "first") for rank in range(2)]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "1\n"
        os.kill(ranks[victim].pid, signal.SIGKILL)
        ranks[1 - victim].stdout.read()  # type: ignore[union-attr]
        assert ranks[1 - victim].wait(timeout=120) != 0
        done = len(state_of(tmp_path)[0])
        assert done >= 1
        ranks += [start(tmp_path, done + 2, rank, 2, "second") for rank in range(2)]
        assert [rank.communicate(timeout=120)[0] for rank in ranks[2:]] == [f"{done + 1}\n{done + 2}\n"] * 2
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [row["epoch"] for row in state_of(tmp_path)[0]] == list(range(1, done + 3))


def test_a_train_task_of_a_campaign_that_loses_a_rank_gets_a_new_attempt_and_repeats_no_epoch(
    tmp_path: Path, wait_until_gone: Callable[[Iterable[int]], None]
) -> None:
    """Guards the way from a dead rank to a new attempt: the job ends, its end is noticed, the checkpoint is taken up."""
    train = {key: value for key, value in CAMPAIGN["train"].items() if key != "relaxation"}
    changes = {"rounds": 1, "train": {**train, "ranks": 2, "epochs": 60, "steps_per_epoch": 4}}
    folder = campaign_before(tmp_path, 1, "train", changes)
    write_labels(folder.stage(1, "label"), structures())
    here = folder.stage(1, "train")
    manager = drive(folder, 1, "train")
    metrics = here.task(0).path / "metrics.jsonl"
    try:
        while not metrics.exists():
            assert manager.poll() is None, said(folder)
            time.sleep(0.02)
        ranks = {rank_of(pid): pid for pid in processes_of(folder.root) if rank_of(pid) is not None}
        assert ranks.keys() == {0, 1}
        os.kill(ranks[1], signal.SIGKILL)
        wait_until_gone(ranks.values())
        assert manager.wait(timeout=300) == 0, said(folder)
    finally:
        kill(processes_of(folder.root))
    history = history_of(folder.root, "round-001/train")
    assert sum(bool(re.search(r"/\d+-intent\.json$", name)) for name in history) == 2
    epochs = [int(e) for e in re.findall(r'"epoch": (\d+)', metrics.read_text())]
    assert epochs == list(range(1, 61))


def rank_of(pid: int) -> int | None:
    """The rank of a process that submitit's local executor has started as one."""
    try:
        number = psutil.Process(pid).environ().get("SUBMITIT_LOCAL_GLOBALID")
    except psutil.Error:
        return None
    return None if number is None else int(number)

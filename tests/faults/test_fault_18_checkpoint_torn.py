"""Fault 18: a writer of checkpoints is killed anywhere: there is always a good one, and leftovers are ignored.

Run as a script, this file forks writers and kills them: `python test_fault_18_checkpoint_torn.py FOLDER HOW KILLS`.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shims import killed_at

from hpcft.training.checkpoint import Checkpoint, load_latest, save_checkpoint

# Of three checkpoints, one after the other: at the third an old one goes.
CALLS = 15


def make(epoch: int) -> Checkpoint:
    """A megabyte that tells which epoch it is of."""
    weights = torch.full((2**17,), float(epoch), dtype=torch.float64)
    return Checkpoint(
        epoch, {"weights": weights}, {"state": {0: {"exp_avg": -weights}}}, [{"loss": 1.0}] * epoch
    )


def next_epoch(folder: Path) -> int:
    checkpoint = load_latest(folder)
    return 1 if checkpoint is None else checkpoint.epoch + 1


def assert_good(folder: Path, reported: int) -> None:
    """A whole checkpoint of the last reported epoch, or of one after it."""
    checkpoint = load_latest(folder)
    if checkpoint is None:
        assert reported == 0
        return
    expected = make(checkpoint.epoch)
    assert checkpoint.epoch in (reported, reported + 1)
    assert torch.equal(checkpoint.model["weights"], expected.model["weights"])
    assert torch.equal(checkpoint.optimiser["state"][0]["exp_avg"], expected.optimiser["state"][0]["exp_avg"])
    assert checkpoint.history == expected.history


def test_there_is_a_good_checkpoint_whichever_durable_call_a_writer_dies_at(tmp_path: Path) -> None:
    """Guards the order new file, rename, old file: fails if one is deleted before the next is safe."""
    argv = [sys.executable, "-W", "ignore", __file__, str(tmp_path), "every-call", str(CALLS)]
    done = subprocess.run(argv, env=killed_at(0, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(CALLS)
    assert next_epoch(tmp_path) > 4


@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 25), *(pytest.param(s, 200, marks=pytest.mark.nightly) for s in range(1, 5))]
)
def test_there_is_a_good_checkpoint_after_kills_at_random_moments(
    seed: int, kills: int, tmp_path: Path
) -> None:
    """Guards what lies between durable calls, a half-written file above all: fails if a leftover is taken for a checkpoint."""
    argv = [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(seed), str(kills)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(kills)
    leftovers = [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    assert leftovers, "no kill has hit a write"
    assert len([path for path in tmp_path.iterdir() if path not in leftovers]) <= 3


def kill_writers(folder: Path, how: str, kills: int) -> None:
    """Fork a writer that is killed at a random moment, or dies at its Nth durable call, and look at what it has left."""
    chance = random.Random(how)
    for number in range(1, kills + 1):
        reading, writing = os.pipe()
        before = next_epoch(folder)
        pid = os.fork()
        if pid == 0:
            if how == "every-call":
                shim = ctypes.CDLL(None)
                ctypes.c_long.in_dll(shim, "shim_calls").value = 0
                ctypes.c_long.in_dll(shim, "shim_at").value = number
            for epoch in range(before, before + 10_000):
                save_checkpoint(folder, make(epoch))
                os.write(writing, b"%d\n" % epoch)
        os.close(writing)
        if how != "every-call":
            time.sleep(chance.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with os.fdopen(reading) as stream:
            reported = [int(line) for line in stream]
        assert_good(folder, reported[-1] if reported else before - 1)
        print(number)


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

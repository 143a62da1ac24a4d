"""Fault 19: a training killed after N epochs and started again ends as one of 2N: same losses and weights, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from small_training import start, state_of

N = 3


def train(folder: Path, kill_after: int | None = None, world_size: int = 1, token: str = "0") -> None:
    """2N epochs, unless all ranks are killed once this epoch's checkpoint is there."""
    ranks = [start(folder, 2 * N, rank, world_size, token) for rank in range(world_size)]
    for rank in ranks:
        assert rank.stdout is not None
        for line in rank.stdout:
            if int(line) == kill_after:
                for each in ranks:
                    each.send_signal(signal.SIGKILL)
                break
    codes = []
    for rank in ranks:
        rank.communicate(timeout=120)
        codes.append(rank.returncode)
    assert codes == [0 if kill_after is None else -signal.SIGKILL] * world_size


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_n_epochs_a_kill_and_n_more_are_2n_epochs_to_the_last_bit(world_size: int, tmp_path: Path) -> None:
    """Guards that a checkpoint holds all state: fails if optimiser, sampler or schedule begin anew."""
    train(tmp_path / "whole", world_size=world_size)
    train(tmp_path / "halves", N, world_size, "first")
    assert len(state_of(tmp_path / "halves")[0]) < 2 * N
    train(tmp_path / "halves", None, world_size, "second")
    whole, halves = state_of(tmp_path / "whole"), state_of(tmp_path / "halves")
    assert [row["epoch"] for row in halves[0]] == list(range(1, 2 * N + 1))
    assert halves == whole


@pytest.mark.nightly
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_killed_it_goes_on_with_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    """What was learned stays to the last bit; the rest is the same to the rounding of sums in single precision."""
    train(tmp_path / "whole")
    train(tmp_path / "halves", N, before, "first")
    first = state_of(tmp_path / "halves")[0]
    train(tmp_path / "halves", None, after, "second")
    history = state_of(tmp_path / "halves")[0]
    assert history[: len(first)] == first
    whole = state_of(tmp_path / "whole")[0]
    assert [row["epoch"] for row in history] == [row["epoch"] for row in whole]
    for ours, theirs in zip(history, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)

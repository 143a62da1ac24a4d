"""Fault 30: the terminal goes away, or the manager is killed at its Nth durable call: nothing is lost, `resume` goes on."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from one_stage import drive, drive_to_end, labels_to_do, said
from shims import killed_at
from slurm_campaign import NUM_TASKS, OnSlurm
from tiny import kill, processes_of, submissions_of

from hpcft.campaign.decide import SETTLING_S
from hpcft.campaign.tidy import is_tidy
from hpcft.cluster.local import lock_is_held
from hpcft.storage.atomic import read_json

# A manager makes some 75 durable calls below the campaign from its lease to its last step; later numbers kill nobody.
MOST_CALLS = 90
MOMENTS = {
    "the last result is there, but not the product": "product.json",
    "the stage is half packed": "0000.result.json",
}


def die_and_go_on(campaign: OnSlurm, environment: dict[str, str]) -> int:
    """A manager that dies, then one that does not; the first one's exit status."""
    status = drive(campaign.folder, 0, "reference", environment).wait(timeout=300)
    assert status in (0, -signal.SIGKILL), said(campaign.folder)
    drive_to_end(campaign.folder, 0, "reference")
    drive_to_end(campaign.folder, 0, "reference")  # packs what a job that was just ending has left
    assert is_tidy(campaign.here)
    campaign.assert_undisturbed()
    return status


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_manager_killed_at_a_delicate_moment_is_followed_by_one_that_repeats_nothing(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards collecting and packing again: fails if either takes what a dead manager has left for the whole."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    environment = killed_at(1, campaign.root, MOMENTS[moment])
    assert die_and_go_on(campaign, environment) == -signal.SIGKILL


@pytest.mark.nightly
def test_tasks_that_run_although_their_submission_is_not_recorded_are_found_by_their_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards adoption on this machine: fails if a submission without job ids is taken for one that never arrived."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    dying = killed_at(1, campaign.root, "0001-submitted.json")
    assert drive(campaign.folder, 0, "reference", dying).wait(timeout=300) == -signal.SIGKILL
    tasks = [campaign.here.task(number) for number in range(NUM_TASKS)]
    while not all(task.lock.exists() and (lock_is_held(task.lock) or task.result.exists()) for task in tasks):
        time.sleep(0.01)
    stopped = processes_of(campaign.root)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)  # they hold their locks for as long as it takes
    manager = drive(campaign.folder, 0, "reference")
    try:
        submitted = read_json(campaign.here.intent(1))["at"]
        while manager.poll() is None and not (
            time.time() > submitted + 1.5 * SETTLING_S and said(campaign.folder).count("idle:") > 3
        ):
            time.sleep(0.1)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert manager.wait(timeout=120) == 0, said(campaign.folder)
    finally:
        kill([manager.pid, *stopped])
        manager.wait()
    assert submissions_of(campaign.root, "round-000/reference") == [
        "round-000/reference/attempts/0001-intent.json"
    ]
    campaign.assert_undisturbed()


@pytest.mark.nightly
@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
def test_a_manager_killed_at_any_durable_call_is_followed_by_one_that_repeats_nothing(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the order of all durable writes of a manager: every gap between two of them is a place to die."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    status = die_and_go_on(campaign, killed_at(call, campaign.root))
    assert status == -signal.SIGKILL or call > MOST_CALLS // 2


def in_terminal(*arguments: object, cwd: Path) -> tuple[int, int]:
    """Start hpcft as the first process of a terminal of its own; its pid, and our end of the terminal."""
    argv = [sys.executable, "-m", "hpcft", *map(str, arguments)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.chdir(cwd)
        os.execve(argv[0], argv, {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"})
    return pid, terminal


def wait_until(condition: Callable[[], bool], pid: int, terminal: int | None = None) -> None:
    """Return once it holds, reading what the terminal shows; fail if the process ends before."""
    deadline = time.monotonic() + 300
    shown = b""
    while not condition():
        if terminal is not None:
            os.set_blocking(terminal, False)
            with contextlib.suppress(OSError):
                shown += os.read(terminal, 65536)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if (ended and not condition()) or time.monotonic() > deadline:
            pytest.fail(f"hpcft ended ({status}) or hangs: {shown.decode(errors='replace')}")
        time.sleep(0.05)


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_manager_whose_terminal_goes_away_goes_on_and_writes_to_its_log(
    to_the_end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the answer to SIGHUP: fails if it ends the manager, for nobody else writes a stage's product."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    pid, terminal = in_terminal("resume", campaign.root, cwd=tmp_path)
    log = campaign.folder.log
    try:
        wait_until(campaign.here.intent(1).exists, pid, terminal)
        os.close(terminal)  # the kernel tells the terminal's first process by SIGHUP
        wait_until(campaign.here.product.exists, pid)
        assert "the terminal is gone" in log.read_text()
        campaign.assert_undisturbed()  # now: later stages pay for labels of their own
        if to_the_end:
            wait_until(campaign.folder.stage(1, "evaluate").product.exists, pid)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
            assert (campaign.folder.report / "bias.png").exists()
        else:
            assert psutil.Process(pid).is_running()
    finally:
        kill(processes_of(campaign.root))

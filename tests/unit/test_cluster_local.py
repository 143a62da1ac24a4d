from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hpcft.cluster.local import cancel_below, job_is_alive, lock_is_held

WAIT = "print('ready', flush=True); input()"
LOCK = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); " + WAIT
FAMILY = """
import signal, subprocess, sys
stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdin=sys.stdin, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""


@contextmanager
def process(program: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has said its first line, and that line."""
    argv, pipe = [sys.executable, "-c", program, *map(str, arguments)], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as started:
        assert started.stdout is not None
        try:
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def test_a_job_is_alive_while_its_controller_runs(tmp_path: Path) -> None:
    with process(WAIT, "-m", tmp_path) as (controller, _):
        assert job_is_alive(str(controller.pid), tmp_path)
        os.kill(controller.pid, 9)
        os.waitid(os.P_PID, controller.pid, os.WEXITED | os.WNOWAIT)
        assert not job_is_alive(str(controller.pid), tmp_path), "a zombie"
        controller.wait()
        assert not job_is_alive(str(controller.pid), tmp_path)


def test_another_process_with_the_number_of_a_job_is_not_taken_for_it(tmp_path: Path) -> None:
    with process(WAIT, tmp_path / "0001-jobs") as (other, _):
        for folder in (tmp_path, tmp_path / "0001", tmp_path / "0001-jobs" / "x"):
            assert not job_is_alive(str(other.pid), folder)
        assert cancel_below(tmp_path) == 0  # it is no job of submitit's
        assert other.poll() is None
        assert job_is_alive(str(other.pid), tmp_path / "0001-jobs")


def test_a_process_that_shows_no_arguments_yet_is_taken_for_the_job(tmp_path: Path) -> None:
    """The kernel shows none while a program is being started: a look at that moment must not take it for lost."""
    with subprocess.Popen(
        [""], executable=sys.executable, stdin=subprocess.PIPE
    ) as nameless:  # for as long as we look
        assert not any(psutil.Process(nameless.pid).cmdline())
        assert job_is_alive(str(nameless.pid), tmp_path)
        nameless.kill()
        os.waitid(os.P_PID, nameless.pid, os.WEXITED | os.WNOWAIT)
        assert not job_is_alive(str(nameless.pid), tmp_path), "a zombie"


@pytest.mark.parametrize("job_id", ["", "812_3", "not a number", str(2**22 + 1)])
def test_what_is_no_number_of_a_process_is_no_live_job(job_id: str, tmp_path: Path) -> None:
    assert not job_is_alive(job_id, tmp_path)


def test_a_lock_is_held_as_long_as_the_process_that_took_it_lives(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with process(LOCK, lock) as (holder, _):
        assert lock_is_held(lock)
        assert lock_is_held(lock)
        holder.kill()
        holder.wait()
        assert not lock_is_held(lock)
    assert not lock_is_held(tmp_path / "no such folder" / "lock")


def test_looking_at_a_lock_leaves_it_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not lock_is_held(lock)
    with process(LOCK, lock) as (_, said):
        assert said == "ready"


def test_cancelling_ends_a_job_with_everything_that_it_started(tmp_path: Path) -> None:
    other = process(WAIT, "submitit.local._local", tmp_path / "other")
    with (
        process(FAMILY, "submitit.local._local", tmp_path / "mine") as (controller, child),
        other as (untouched, _),
    ):
        assert cancel_below(tmp_path / "mine") == 1
        assert untouched.poll() is None
        assert not psutil.pid_exists(controller.pid)
        deadline = time.monotonic() + 60
        while psutil.pid_exists(int(child)) and psutil.Process(int(child)).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a child that ignores SIGTERM still runs"
            time.sleep(0.01)

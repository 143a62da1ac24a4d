"""One manager at a time drives a campaign. Leases are numbered files; only the next number can be taken, and only once."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpcft.errors import LeaseHeld
from hpcft.storage.atomic import create_json_once, read_json, reopening, write_json


def _newest(folder: Path) -> tuple[int, dict[str, Any] | None]:
    while numbers := [int(path.stem) for path in _files_of(folder) if path.stem.isdigit()]:
        try:
            return max(numbers), dict(read_json(folder / f"{max(numbers):06d}.json"))
        except FileNotFoundError:  # a newer one has just taken its place
            time.sleep(0.01)
    return 0, None


def _files_of(folder: Path) -> list[Path]:
    return reopening(lambda: list(folder.glob("[0-9]*.json")))


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lease: host, pid, since when; None when nobody does, or its process has died on this host."""
    number, lease = _newest(folder)
    return None if lease is None or _is_over(folder, number, lease) else lease


def _is_over(folder: Path, number: int, lease: dict[str, Any]) -> bool:
    return (folder / f"{number:06d}.released").exists() or _is_dead(lease)


def _is_dead(lease: dict[str, Any]) -> bool:
    """Certain only for this host; a process elsewhere counts as alive until the user says otherwise."""
    if lease["host"] != socket.gethostname():
        return False
    return bool(
        lease["boot"] != _boot_id() or lease["process_started"] != _process_started(int(lease["pid"]))
    )


def _process_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it has ended.

    Not the time of day: that moves when the clock is set, and a live manager would count as dead.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *numbers = stat.rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else int(numbers[18])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextlib.contextmanager
def lease(
    folder: Path, *, take_over: bool = False, job_is_over: Callable[[str], bool] = lambda job_id: False
) -> Iterator[None]:
    """Hold the campaign's lease; raises LeaseHeld, naming host and process, while another manager does.

    `take_over` takes it from a process on another host that the user knows to be dead. A holder that was a job, such as
    the controller of a detached campaign, is dead when `job_is_over` says so of its job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number, current = _newest(folder)
    if (
        current is not None
        and not take_over
        and not _is_over(folder, number, current)
        and not _was_a_job_that_is_over(current, job_is_over)
    ):
        raise LeaseHeld(_message(current))
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot_id(),
        "process_started": _process_started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": _restarts(),
        "at": time.time(),
    }
    taken = create_json_once(folder / f"{number + 1:06d}.json", mine)
    newest, winner = _newest(folder)
    if not taken or newest != number + 1:
        # Taken, but not the newest: this number had come and gone since we looked.
        if taken:
            (folder / f"{number + 1:06d}.json").unlink()
        raise LeaseHeld(_message(winner or mine))
    if current is not None:
        for old in reopening(lambda: list(folder.glob(f"{number:06d}.*"))):
            old.unlink(missing_ok=True)
    try:
        yield
    finally:
        write_json(folder / f"{number + 1:06d}.released", {"at": time.time()})


def _was_a_job_that_is_over(lease: dict[str, Any], job_is_over: Callable[[str], bool]) -> bool:
    job = lease.get("job")
    if job is None or (lease["host"] == socket.gethostname() and lease["boot"] == _boot_id()):
        return False  # no job, or a process of this host, which has been looked at already
    if job == os.environ.get("SLURM_JOB_ID"):
        # Slurm runs a requeued job again under its number, elsewhere, once the first execution is lost.
        return int(lease.get("restarts") or 0) < _restarts()
    return job_is_over(job)


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def is_mine(folder: Path) -> bool:
    """Whether this process still holds the lease: asked before every submission."""
    _, current = _newest(folder)
    return current is not None and current["pid"] == os.getpid() and current["host"] == socket.gethostname()


def _message(lease: dict[str, Any]) -> str:
    job = f" (job {lease['job']})" if lease.get("job") else ""
    return (
        f"process {lease['pid']} on {lease['host']}{job} drives this campaign already. Let it, or stop it first; if that host is "
        "gone for good, say `hpcft resume --take-over`."
    )

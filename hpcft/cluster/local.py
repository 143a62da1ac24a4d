"""Local jobs as seen by the process table and by the locks that their tasks hold."""

from __future__ import annotations

import fcntl
import signal
from pathlib import Path

import psutil


def job_is_alive(job_id: str, folder: Path) -> bool:
    """Whether the controller process of a local submitit job still runs; `folder` tells it from a reused pid."""
    process = _controller(job_id, folder)
    return process is not None


def lock_is_held(path: Path) -> bool:
    """Whether a live process holds a task's lock, even one whose controller has been killed."""
    try:
        with path.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def cancel_job(job_id: str, folder: Path) -> None:
    """End a local job and everything it has started."""
    process = _controller(job_id, folder)
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    for member in family:
        _signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=1)
    for member in alive:
        _signal(member, signal.SIGKILL)


def _controller(job_id: str, folder: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(job_id))
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process if str(folder) in process.cmdline() else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return None


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return

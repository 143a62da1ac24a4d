"""Local jobs as seen by the process table and by the locks that their tasks hold."""

from __future__ import annotations

import fcntl
import os
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


def cancel_below(root: Path) -> int:
    """End every local job whose files are below `root`, and all that it has started; returns how many jobs."""
    mine = [process for process in psutil.process_iter() if _is_job_below(process, root)]
    num_jobs = sum(1 for process in mine if "submitit.local._local" in _arguments(process))
    family = {process.pid: process for job in mine for process in [job, *_children(job)]}
    for member in family.values():
        _signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(list(family.values()), timeout=1)
    for member in alive:
        _signal(member, signal.SIGKILL)
    return num_jobs


def _is_job_below(process: psutil.Process, root: Path) -> bool:
    """A submitit process (controller or rank) of a submission folder below `root`."""
    arguments = _arguments(process)
    return any(a.startswith("submitit.") for a in arguments) and any(
        Path(a).is_relative_to(root) for a in arguments if a.startswith("/")
    )


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _controller(job_id: str, folder: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(job_id))
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        arguments = process.cmdline()
        # While a process of ours is between two programs (exec) the kernel shows no arguments: it has not ended.
        is_starting = not any(arguments) and process.uids().real == os.getuid()
        return process if is_starting or str(folder) in arguments else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return None


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return

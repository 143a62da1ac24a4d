"""One manager at a time drives a campaign. Leases are numbered files; only the next number can be taken, and only once."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from hpcft.errors import LeaseHeld
from hpcft.storage.atomic import create_json_once, read_json, write_json


def _newest(folder: Path) -> tuple[int, dict[str, Any] | None]:
    numbers = sorted(int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdigit())
    if not numbers:
        return 0, None
    return numbers[-1], dict(read_json(folder / f"{numbers[-1]:06d}.json"))


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lease: host, pid, since when; None when nobody does, or its process has died on this host."""
    number, lease = _newest(folder)
    if lease is None or (folder / f"{number:06d}.released").exists():
        return None
    return None if _is_dead(lease) else lease


def _is_dead(lease: dict[str, Any]) -> bool:
    """Certain only for this host; a process elsewhere counts as alive until the user says otherwise."""
    if lease["host"] != socket.gethostname():
        return False
    if lease["boot"] != _boot_id():
        return True
    try:
        process = psutil.Process(int(lease["pid"]))
        alive = process.status() != psutil.STATUS_ZOMBIE
        return not (alive and abs(process.create_time() - float(lease["process_started"])) < 1.0)
    except psutil.NoSuchProcess:
        return True


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextlib.contextmanager
def lease(folder: Path, *, take_over: bool = False) -> Iterator[None]:
    """Hold the campaign's lease; raises LeaseHeld, naming host and process, while another manager does.

    `take_over` takes it from a process on another host that the user knows to be dead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number, current = _newest(folder)
    held_by = holder(folder)
    if held_by is not None and not take_over:
        raise LeaseHeld(_message(held_by))
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot_id(),
        "process_started": psutil.Process().create_time(),
        "at": time.time(),
    }
    if not create_json_once(folder / f"{number + 1:06d}.json", mine):
        _, winner = _newest(folder)
        raise LeaseHeld(_message(winner or mine))
    if current is not None:
        for old in folder.glob(f"{number:06d}.*"):
            old.unlink(missing_ok=True)
    try:
        yield
    finally:
        write_json(folder / f"{number + 1:06d}.released", {"at": time.time()})


def is_mine(folder: Path) -> bool:
    """Whether this process still holds the lease: asked before every submission."""
    _, current = _newest(folder)
    return current is not None and current["pid"] == os.getpid() and current["host"] == socket.gethostname()


def _message(lease: dict[str, Any]) -> str:
    return (
        f"process {lease['pid']} on {lease['host']} drives this campaign already. Let it, or stop it first; if that host is "
        "gone for good, say `hpcft resume --take-over`."
    )

"""What can be proven of a damaged trajectory, out of child processes that may hang or die on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpcft.storage.salvage_child import Part
from hpcft.storage.seal import DamagedFile

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hpcft.storage.salvage_child import main; "
    "main(int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))"
)


@dataclass
class Salvaged:
    """What there is besides the proven frames, which stand as segments in the folder that `salvage` was given."""

    parts: list[Part] | None = None
    num_frames: dict[int, int] = field(default_factory=dict)
    """How many a replica had, where that can be read."""
    num_kept: dict[int, int] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    """None if it is not proven; so is the checkpoint."""
    checkpoint: dict[str, Any] | None = None
    lost: dict[Part, str] = field(default_factory=dict)
    """Why a part ends early or is missing."""
    begun: list[Part] = field(default_factory=list)
    is_finished: bool = False

    @property
    def replicas(self) -> list[int]:
        return [part for part in self.parts or () if isinstance(part, int)]

    def hear(self, word: str, value: Any, damaged: Path) -> None:
        """Take down one message of the child; see salvage_child."""
        now = self.begun[-1] if self.begun else None
        if word == "opened":
            self.parts = value
        elif word == "begin":
            self.begun.append(value)
            if isinstance(value, int):
                self.num_kept[value] = 0
        elif word == "lost":
            assert now is not None
            self.lost[now] = value
        elif word == "checkpoint":
            self.checkpoint = value
        elif word == "provenance":
            self.provenance = value
        elif word == "end":
            self.is_finished = True
        elif word == "unreadable":
            raise DamagedFile(f"{damaged}: nothing can be given back: {value}.")
        elif word == "failed":
            raise value
        else:
            assert isinstance(now, int)
            counts = {"frames": self.num_frames, "kept": self.num_kept}[word]
            counts[now] = counts.get(now, 0) + value


def salvage(damaged: Path, folder: Path, silence_s: float) -> Salvaged:
    """Commit the longest provable prefix of each replica to the empty `folder`; `damaged` is only read.

    A child that says nothing for `silence_s`, or dies, costs the part that it was at. Raises DamagedFile if nothing
    can be read at all, OSError on a full disk.
    """
    found = Salvaged()
    while not found.is_finished:
        num_begun = len(found.begun)
        how = _listen_to_child(damaged, folder, found, silence_s)
        if len(found.begun) == num_begun and not found.is_finished:
            raise DamagedFile(f"{damaged}: nothing can be given back: HDF5 {how} when it opened the file.")
        if not found.is_finished:
            found.lost[found.begun[-1]] = f"HDF5 {how}"
    return found


def _listen_to_child(damaged: Path, folder: Path, found: Salvaged, silence_s: float) -> str:
    """How the child ended."""
    with _child(damaged, folder, found.begun) as (process, connection):
        try:
            while connection.poll(silence_s):
                word, value = connection.recv()
                found.hear(word, value, damaged)
        except EOFError:
            return f"died (exit status {process.wait()})"
    return f"did not come back within {silence_s:g} s"


@contextmanager
def _child(
    damaged: Path, folder: Path, done: list[Part]
) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    ours, theirs = Pipe(duplex=False)
    words = [json.dumps(sys.path), str(theirs.fileno()), str(damaged), str(folder), json.dumps(done)]
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, *words], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()

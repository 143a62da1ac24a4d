"""What the jobs of a task have printed, and what the task has written down, whether its stage is packed or not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.storage.campaign_folder import StageFolder


@dataclass(frozen=True)
class AttemptLog:
    """One attempt at one task."""

    attempt: int
    job_id: str | None
    node: str | None
    error: Mapping[str, Any] | None
    ending: Mapping[str, Any] | None
    printed: Mapping[str, str]
    """Text by file name, both streams of every rank; empty ones are left out."""


def logs_of(stage: StageFolder, task: int) -> list[AttemptLog]:
    """Every attempt at a task, oldest first; UserError if there has been none."""
    files = _Files(stage)
    found = []
    for name in sorted(files.names("attempts/")):
        if not name.endswith("-intent.json"):
            continue
        intent = files.json(name)
        if intent is not None and task in intent["tasks"]:
            found.append(_attempt(files, task, int(intent["attempt"])))
    if not found:
        raise UserError(f"no job has been submitted for task {task} of {stage.path}")
    return found


def _attempt(files: _Files, task: int, attempt: int) -> AttemptLog:
    submitted = files.json(f"attempts/{attempt:04d}-submitted.json") or {"job_ids": {}}
    job_id = submitted["job_ids"].get(str(task))
    outcome = f"outcomes/{task:04d}"
    runs = [files.json(n) for n in sorted(files.names(f"{outcome}.run-"))]
    nodes = [str(run["node"]) for run in runs if run and run["attempt"] == attempt]
    endings = [files.json(n) for n in sorted(files.names("attempts/ended-"))]
    mine = [e["tasks"][str(task)] for e in endings if e and str(task) in e["tasks"]]
    printed = {}
    if job_id is not None:
        for name in sorted(files.names(f"attempts/{attempt:04d}-jobs/{job_id}_")):
            if name.endswith(("_log.out", "_log.err")) and (text := files.text(name)):
                printed[Path(name).name] = text
    return AttemptLog(
        attempt,
        job_id,
        ", then ".join(nodes) or None,
        files.json(f"{outcome}.error-{attempt:04d}.json"),
        next((e for e in mine if e["attempt"] == attempt), None),
        printed,
    )


class _Files:
    """The files of a stage's history by their path in the stage, lying open or packed."""

    def __init__(self, stage: StageFolder) -> None:
        self._root = stage.path
        self._archive = zipfile.ZipFile(stage.history) if stage.history.exists() else None
        self._names = [*self._open_names(), *(self._archive.namelist() if self._archive else ())]

    def _open_names(self) -> Iterator[str]:
        for folder in ("attempts", "outcomes"):
            for path in (self._root / folder).rglob("*"):
                if path.is_file():
                    yield str(path.relative_to(self._root))

    def names(self, prefix: str) -> set[str]:
        return {name for name in self._names if name.startswith(prefix)}

    def text(self, name: str) -> str | None:
        path = self._root / name
        if path.is_file():
            return path.read_text(errors="replace")
        if self._archive is not None and name in self._archive.namelist():
            return self._archive.read(name).decode(errors="replace")
        return None

    def json(self, name: str) -> dict[str, Any] | None:
        text = self.text(name)
        return None if text is None else dict(json.loads(text))

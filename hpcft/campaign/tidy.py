"""A finished stage is packed: its product, one line for each task, one archive of how it came about, the data. And unpacked."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hpcft.storage.atomic import publish, read_json, reopening, temporary_beside, write_json, write_text
from hpcft.storage.campaign_folder import StageFolder

# All of it can be had again from what stays: labels are in the shards, the trained weights in the model.
_IN_TASKS = ("lock", "journal-*.jsonl", "checkpoint-*.pt", "segment-*.h5*", "rendezvous-*.json", ".tmp-*")
# submitit's inputs and return values; what they say is in the records.
_NOT_KEPT = (".pkl",)
_LONGEST_LOG = 2**20


def tidy(stage: StageFolder) -> None:
    """Pack a stage whose product is written: safe to repeat, and to interrupt anywhere."""
    if not is_tidy(stage):
        if not stage.results.exists():
            write_text(stage.results, "".join(_result_lines(stage)))
        if not stage.history.exists():
            _pack(stage, [*_files_below(stage.outcomes), *_files_below(stage.attempts)])
        _tidy_tasks(stage)
        _remove_tree(stage.outcomes)
        _remove_tree(stage.attempts)


def untidy(stage: StageFolder) -> None:
    """Attempts and outcomes of a packed stage as they were; its journals and checkpoints are gone.

    As long as it has a product it counts as finished, and may be packed again by whoever comes along.
    """
    if not stage.results.exists():
        return
    results = stage.read_results()
    for folder in (stage.outcomes, stage.attempts):
        folder.mkdir(exist_ok=True)
    if stage.history.exists():
        with zipfile.ZipFile(stage.history) as archive:
            archive.extractall(stage.path)
        os.sync()  # ten thousand small files, before the archive goes
    for task, result in results.items():
        write_json(stage.task(task).result, result)
    stage.results.unlink()
    stage.history.unlink(missing_ok=True)


def _tidy_tasks(stage: StageFolder) -> None:
    aside = {stage.task(index).path for index in stage.read_set_aside()}
    for task in sorted((stage.path / "tasks").glob("*")):
        # What a task that was set aside has computed is in these alone.
        for pattern in ("lock", ".tmp-*") if task in aside else _IN_TASKS:
            for path in task.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(task.iterdir()):
            task.rmdir()


def is_tidy(stage: StageFolder) -> bool:
    return not stage.outcomes.exists() and not stage.attempts.exists()


def _result_lines(stage: StageFolder) -> Iterator[str]:
    outcomes = stage.list_outcomes()
    for task in sorted(outcomes.done | outcomes.set_aside):
        where = stage.task(task)
        content = (
            {"result": read_json(where.result)}
            if task in outcomes.done
            else {"set_aside": read_json(where.aside)["why"]}
        )
        yield json.dumps({"task": task, **content}, sort_keys=True, ensure_ascii=False) + "\n"


def _pack(stage: StageFolder, files: list[Path]) -> None:
    """Intents, job ids, endings, errors and logs, of which only the end where one is very long."""
    temporary = temporary_beside(stage.history)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for path in files:
                content = _end_of(path)
                if content and path.suffix not in _NOT_KEPT and ".result." not in path.name:
                    archive.writestr(str(path.relative_to(stage.path)), content)
        publish(temporary, stage.history)
    finally:
        temporary.unlink(missing_ok=True)


def _end_of(path: Path) -> bytes:
    def read() -> bytes:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _LONGEST_LOG))
            return stream.read()

    return reopening(read)


def _files_below(folder: Path) -> list[Path]:
    # submitit leaves a link to the batch script under its temporary name
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _remove_tree(folder: Path) -> None:
    """All of it, or as much as can go: a job that still ends itself may write meanwhile, and NFS keeps open files.

    What stays is removed when the stage is packed again.
    """
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)

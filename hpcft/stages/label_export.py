"""The labels of a file for people and other programs: labels.extxyz, or relaxed.extxyz and frames.extxyz; failed.extxyz."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ase import Atoms

from hpcft.labelling.journal import Record
from hpcft.labelling.label import Label, Relaxation, with_label
from hpcft.labelling.shard import FAILURES_FILE, SHARD_FILE, read_frames, read_shard
from hpcft.stages.context import StageContext
from hpcft.stages.quarantine import find_suspects
from hpcft.stages.sharing import work_of
from hpcft.storage.atomic import publish, read_json, temporary_beside, write_json
from hpcft.storage.extxyz import extxyz_frame
from hpcft.storage.structures import count_structures, read_structures, read_texts, write_extxyz

LABELS, RELAXED, FRAMES, FAILED = "labels.extxyz", "relaxed.extxyz", "frames.extxyz", "failed.extxyz"
_LONGEST_MESSAGE = 500
_Place = tuple[int, int, int | None]
"""Task, item and step of a label."""
_Placed = tuple[tuple[int, int], Atoms]
"""A structure behind what it is sorted by: its number in the input, and a step."""


def export(context: StageContext, found: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Write what is there so far, in the order of the input, and what of it has failed for what cause; may be repeated.

    `found` are the suspects, where all labels have just been held against each other.
    """
    root, structures = context.folder.root, context.folder.inputs / "structures.h5"
    texts = read_texts(structures)
    suspects = _suspects(context, found)
    num_done = _write_in_order(root / LABELS, _done(context, "frames", texts, suspects, read_shard))
    num_done += _write_in_order(root / RELAXED, _done(context, "relaxations", texts, suspects, read_shard))
    _write_in_order(root / FRAMES, _done(context, "relaxations", texts, suspects, read_frames))
    failures = dict(sorted(_failures(context).items()))
    _write_failed(root / FAILED, structures, failures)
    causes = Counter(cause for cause, _ in failures.values())
    counts = {
        "structures": count_structures(structures),
        "done": num_done,
        "failed": causes,
        "suspects": len(suspects),
    }
    write_json(context.folder.exported, counts)


def _done(
    context: StageContext,
    kind: str,
    texts: list[dict[str, str]],
    suspects: Mapping[_Place, str],
    read: Callable[[Path], list[Record]],
) -> Iterator[_Placed]:
    """What is done of one kind of work, shard by shard; labels that look wrong say why."""
    for task, payload in enumerate(context.plan()):
        folder = context.task_folder(task)
        if not payload[kind] or not (folder / SHARD_FILE).exists():
            continue
        work = work_of(payload)
        for record in read(folder):
            number, step = work[record.index][1], record.step or 0
            atoms = _relaxed(record.result) if isinstance(record.result, Relaxation) else _labelled(record)
            steps = {} if record.step is None else {"step": record.step}
            atoms.info = {**texts[number], **atoms.info, "index": number, **steps}
            if reason := suspects.get((task, record.index, record.step)):
                atoms.info["suspect"] = reason
            yield (number, step), atoms


def _suspects(context: StageContext, found: Sequence[Mapping[str, Any]] | None) -> dict[_Place, str]:
    """What is wrong with labels that look so, unless label.quarantine releases them."""
    if not context.settings.label.quarantine:
        return {}
    suspects = find_suspects(context) if found is None else found
    return {(s["task"], s["item"], s["step"]): str(s["reason"]) for s in suspects}


def _labelled(record: Record) -> Atoms:
    assert record.atoms is not None and isinstance(record.result, Label)
    return with_label(record.atoms, record.result, extra=True)


def _relaxed(result: Relaxation) -> Atoms:
    atoms = result.relaxed.copy()
    atoms.info = {"REF_energy": result.energy_relaxed, "start_energy": result.energy_start}
    atoms.info |= {"num_steps": result.num_steps, "max_force": result.max_force}
    if (result.start.cell.array != result.relaxed.cell.array).any():
        atoms.info["start_cell"] = result.start.cell.array.ravel()
    atoms.arrays["start_positions"] = result.start.positions
    return atoms


def _failures(context: StageContext) -> dict[int, tuple[str, str]]:
    """Cause and message by the structure's number; those of a task that was set aside failed for that."""
    found: dict[int, tuple[str, str]] = {}
    aside = context.here.read_set_aside()
    for task, payload in enumerate(context.plan()):
        folder, work = context.task_folder(task), work_of(payload)
        if task in aside:
            done = {r.index for r in read_shard(folder)} if (folder / SHARD_FILE).exists() else set()
            rest = [number for index, (_, number) in enumerate(work) if index not in done]
            found |= dict.fromkeys(rest, ("set-aside", aside[task]))
        with contextlib.suppress(FileNotFoundError):
            for failure in read_json(folder / FAILURES_FILE):
                found[work[failure["index"]][1]] = (failure["cause"], failure["message"])
    return found


def _write_failed(path: Path, structures: Path, failures: dict[int, tuple[str, str]]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    atoms_list = read_structures(structures, list(failures))
    for atoms, (number, (cause, message)) in zip(atoms_list, failures.items(), strict=True):
        line = " ".join(message.split())[:_LONGEST_MESSAGE]
        atoms.info |= {"index": number, "cause": cause, "message": line.replace('"', "'")}
    write_extxyz(path, atoms_list)


def _write_in_order(path: Path, placed: Iterator[_Placed]) -> int:
    """Write structures that come in any order, more of them than memory holds; returns how many, no file for none."""
    places: dict[tuple[int, int], tuple[int, int]] = {}
    with tempfile.TemporaryFile(dir=path.parent) as unsorted:
        for place, atoms in placed:
            text = extxyz_frame(atoms, f"structure {place[0]}").encode()
            places[place] = (unsorted.tell(), len(text))
            unsorted.write(text)
        if places:
            _publish_sorted(path, unsorted, places)
        else:
            path.unlink(missing_ok=True)
    return len(places)


def _publish_sorted(path: Path, unsorted: IO[bytes], places: dict[tuple[int, int], tuple[int, int]]) -> None:
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as stream:
            for _, (start, length) in sorted(places.items()):
                unsorted.seek(start)
                stream.write(unsorted.read(length))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

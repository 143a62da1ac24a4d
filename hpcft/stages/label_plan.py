"""Sharding of reference calculations by what they will take, learnt from the labels that the folder has. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcft.labelling.cost import Floats, Ints, Seen, cost_model, count_kpoints, deal_out
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import LABELS_FILE, RELAXATIONS_FILE
from hpcft.stages.context import StageContext
from hpcft.stages.label_tasks import reference_of
from hpcft.stages.sharing import share_of
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.seal import check_seal
from hpcft.storage.structures import Outline, evenly_spread, read_outline

# Ten thousand tasks of earlier rounds tell no more than these, and take long to open.
_MOST_FILES = 64
_ORDER = ("relaxations", "frames")
"""Dearest first, so that no worker is left with a long calculation when the others are done."""


def planned(
    context: StageContext,
    frames: Sequence[Path],
    relaxations: Sequence[Path],
    first_equals: Ints | None = None,
) -> list[dict[str, Any]]:
    """Payloads for label.shards tasks that should end together; frames and relaxations are numbered through all files.

    `first_equals`, see `shards`. DamagedFile if a file is not what was written: this is the one place where that is looked at,
    since of ten thousand tasks each reads only its own structures.
    """
    reference = reference_of(context)
    model = cost_model(reference, seen_so_far(context.folder, reference))
    return shards(
        _costs(_sound_outlines(frames), reference, model.single_points),
        _costs(_sound_outlines(relaxations), reference, model.relaxations),
        context.settings.label.shards,
        first_equals,
    )


def _sound_outlines(paths: Sequence[Path]) -> list[Outline]:
    for path in paths:
        check_seal(path)
    return [read_outline(path) for path in paths]


def shards(
    frames_s: Floats, relaxations_s: Floats, count: int, first_equals: Ints | None = None
) -> list[dict[str, Any]]:
    """Payloads by what each item takes; at most `count`, and at least one, so that the stage has a result.

    `first_equals` gives for each item, relaxations first, the number of the first that is equal to it: equal ones go to one
    task, which computes one of them.
    """
    num_relaxations = len(relaxations_s)
    costs_s = np.concatenate([relaxations_s, frames_s])
    firsts = np.arange(len(costs_s)) if first_equals is None else first_equals
    unique = np.unique(firsts)
    equals: dict[int, list[int]] = {}
    for item in np.flatnonzero(firsts != np.arange(len(costs_s))).tolist():
        equals.setdefault(int(firsts[item]), []).append(item)
    dealt = deal_out(costs_s[unique], max(1, min(count, len(unique))))
    tasks = [
        [item for number in numbers for item in (int(unique[number]), *equals.get(int(unique[number]), ()))]
        for numbers in dealt
    ]
    return [
        {
            "relaxations": share_of([item for item in items if item < num_relaxations]),
            "frames": share_of([item - num_relaxations for item in items if item >= num_relaxations]),
            "order": list(_ORDER),
        }
        for items in tasks
    ]


def seen_so_far(folder: CampaignFolder, reference: Reference) -> Seen:
    """What the calculations of all stages before have taken, as far as each came to its end at the first try."""
    steps, rows = [], []
    for outline in _shards_below(folder, LABELS_FILE, ("wall_s", "found", "rung")):
        rows.append(_rows(outline, reference, np.ones(len(outline.num_atoms_s))))
    for outline in _shards_below(folder, RELAXATIONS_FILE, ("wall_s", "found", "rung", "num_steps")):
        # The start is calculated too.
        rows.append(_rows(outline, reference, outline.info["num_steps"] + 1.0))
        steps.append(outline.info["num_steps"] + 1.0)
    atoms, kpoints, step_s = np.concatenate([np.zeros((3, 0)), *rows], axis=1)
    return Seen(atoms, kpoints, step_s, np.concatenate([np.zeros(0), *steps]))


def _costs(outlines: Sequence[Outline], reference: Reference, cost: Any) -> Floats:
    found = [cost(o.num_atoms_s, count_kpoints(reference, o.cell_s33, o.pbc_s3)) for o in outlines]
    return np.concatenate([np.zeros(0), *found])


def _shards_below(folder: CampaignFolder, name: str, info: Sequence[str]) -> Iterator[Outline]:
    paths = sorted(folder.root.glob(f"round-*/*/tasks/*/{name}"))
    for number in evenly_spread(len(paths), _MOST_FILES) if paths else ():
        outline = read_outline(paths[number], info)
        if outline.info.keys() == set(info):
            yield outline


def _rows(outline: Outline, reference: Reference, num_steps: Floats) -> Floats:
    """Atoms, k-points and seconds of a step, of what was calculated here: [3, S]."""
    kpoints = count_kpoints(reference, outline.cell_s33, outline.pbc_s3)
    columns = np.stack([outline.num_atoms_s, kpoints, outline.info["wall_s"] / num_steps])
    return np.asarray(
        columns[:, ~outline.info["found"].astype(bool) & (outline.info["rung"] == 0)], dtype=float
    )

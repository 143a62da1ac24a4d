"""Labels of a campaign that look wrong: found when a label stage is collected, and left out of what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcft.labelling.label_table import LabelTable
from hpcft.labelling.sanity import suspects
from hpcft.labelling.shard import FRAMES_FILE, LABELS_FILE, SHARD_FILE
from hpcft.stages.context import StageContext
from hpcft.storage.atomic import read_json
from hpcft.storage.structures import read_columns

STAGES = ("label", "reference")


def find_suspects(context: StageContext) -> list[dict[str, Any]]:
    """Suspect labels of this stage, in this round and those before it: round, task, item, step, key, reason.

    `step` is that of a frame on the way of a relaxation, else null. They are judged beside all labels of the campaign so far,
    so a label of an early round may become suspect in a later one.
    """
    places: list[tuple[str, int, int, int, int | None]] = []
    tables: list[LabelTable] = []
    for stage in STAGES:
        for round_ in range(context.round + 1):
            for task, path in _files(context, stage, round_):
                tables.append(LabelTable.read(path))
                for item, step in _items_and_steps(path):
                    places.append((stage, round_, task, item, step))
    labels = LabelTable.joined(tables)
    found = []
    for row, reason in suspects(labels).items():
        stage, round_, task, item, step = places[row]
        if stage == context.stage:
            place = {"round": round_, "task": task, "item": item, "step": step}
            found.append({**place, "key": labels.keys[row], "reason": reason})
    return found


def quarantined(context: StageContext, stage: str, round_: int) -> set[tuple[int, int, int | None]]:
    """Task, item and step of each label of a stage that is left out; none where the user has released them."""
    if not context.settings.label.quarantine:
        return set()
    for judged_in in range(context.round, round_ - 1, -1):
        product = context.folder.stage(judged_in, stage).product
        if product.exists():
            found = read_json(product).get("suspects", ())  # not in products of before there was a quarantine
            return {
                (entry["task"], entry["item"], entry["step"]) for entry in found if entry["round"] == round_
            }
    return set()


def _files(context: StageContext, stage: str, round_: int) -> list[tuple[int, Path]]:
    """Files of published labels, each with its task; of other stages and rounds only what is finished, as it cannot change."""
    where = context.folder.stage(round_, stage)
    if (stage, round_) != (context.stage, context.round) and not where.product.exists():
        return []
    found = []
    for shard in sorted(where.path.glob(f"tasks/*/{SHARD_FILE}")):
        listed = read_json(shard)
        files = {LABELS_FILE: listed["labels"], FRAMES_FILE: listed.get("frames")}
        found += [(int(shard.parent.name), shard.parent / name) for name, keys in files.items() if keys]
    return found


def _items_and_steps(path: Path) -> list[tuple[int, int | None]]:
    if path.name != FRAMES_FILE:
        [items] = read_columns(path, ("info/index",), verify=False)
        return [(item, None) for item in items.tolist()]
    items, steps = read_columns(path, ("info/index", "info/step"), verify=False)
    return list(zip(items.tolist(), steps.tolist(), strict=True))

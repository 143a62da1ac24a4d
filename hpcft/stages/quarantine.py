"""Labels of a campaign that look wrong: found when a label stage is collected, and left out of what follows."""

from __future__ import annotations

from typing import Any

from hpcft.labelling.sanity import LabelTable, suspects
from hpcft.labelling.shard import LABELS_FILE, SHARD_FILE
from hpcft.stages.context import StageContext
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import TaskFolder
from hpcft.storage.structures import read_columns

STAGES = ("label", "reference")


def find_suspects(context: StageContext) -> list[dict[str, Any]]:
    """Suspect labels of this stage, in this round and those before it: round, task, item, key, reason.

    They are judged beside all labels of the campaign so far, so a label of an early round may become suspect in a later one.
    """
    places: list[tuple[str, int, int, int]] = []
    tables: list[LabelTable] = []
    for stage in STAGES:
        for round_ in range(context.round + 1):
            for task in _shards(context, stage, round_):
                path = task.path / LABELS_FILE
                tables.append(LabelTable.read(path))
                [items] = read_columns(path, ("info/index",))
                places += [(stage, round_, task.index, int(item)) for item in items]
    labels = LabelTable.joined(tables)
    found = []
    for row, reason in suspects(labels).items():
        stage, round_, task_index, item = places[row]
        if stage == context.stage:
            place = {"round": round_, "task": task_index, "item": item}
            found.append({**place, "key": labels.keys[row], "reason": reason})
    return found


def quarantined(context: StageContext, stage: str, round_: int) -> set[tuple[int, int]]:
    """Task and item of each label of a stage that is left out; none where the user has released them."""
    if not context.campaign.label.quarantine:
        return set()
    for judged_in in range(context.round, round_ - 1, -1):
        product = context.folder.stage(judged_in, stage).product
        if product.exists():
            found = read_json(product).get("suspects", ())  # not in products of before there was a quarantine
            return {(entry["task"], entry["item"]) for entry in found if entry["round"] == round_}
    return set()


def _shards(context: StageContext, stage: str, round_: int) -> list[TaskFolder]:
    """Tasks that have published labels; of other stages and rounds only what is finished counts, or it could change."""
    where = context.folder.stage(round_, stage)
    if (stage, round_) != (context.stage, context.round) and not where.product.exists():
        return []
    paths = sorted(path.parent for path in where.path.glob(f"tasks/*/{SHARD_FILE}"))
    return [where.task(int(path.name)) for path in paths if read_json(path / SHARD_FILE)["labels"]]

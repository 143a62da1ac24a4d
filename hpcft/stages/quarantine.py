"""Labels of a campaign that look wrong: found when a label stage is collected, and left out of what follows."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcft.errors import UserError
from hpcft.labelling.label_table import LabelTable
from hpcft.labelling.sanity import suspects
from hpcft.labelling.shard import SHARD_FILE, read_table
from hpcft.stages.context import StageContext
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import StageFolder

STAGES = ("label", "reference")


def find_suspects(context: StageContext, *, keep_tables: bool = False) -> list[dict[str, Any]]:
    """Suspect labels of this stage, in this round and those before it: round, task, item, step, key, reason.

    `step` is that of a frame on the way of a relaxation, else null. They are judged beside all labels of the campaign so far,
    so a label of an early round may become suspect in a later one. With `keep_tables`, for the one who collects the stage,
    later rounds need not read these labels again.
    """
    places = [(stage, round_) for stage in STAGES for round_ in range(context.round + 1)]
    tables = [_labels_of(context, *place, keep_table=keep_tables) for place in places]
    labels, firsts = LabelTable.joined(tables), np.cumsum([0, *map(len, tables)])
    found = []
    for row, reason in suspects(labels).items():
        stage, round_ = places[int(np.searchsorted(firsts, row, "right")) - 1]
        if stage == context.stage:
            task, item, step = (int(of[row]) for of in (labels.shards_s, labels.items_s, labels.steps_s))
            place = {"round": round_, "task": task, "item": item, "step": None if step < 0 else step}
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


def _labels_of(context: StageContext, stage: str, round_: int, *, keep_table: bool) -> LabelTable:
    """Published labels of a stage; of others than this one only if it is finished, as it cannot change any more."""
    where = context.folder.stage(round_, stage)
    if (stage, round_) != (context.stage, context.round):
        if not where.product.exists():
            return LabelTable.joined([])
        if (kept := _kept(where)) is not None:
            return kept
    shards = sorted(where.path.glob(f"tasks/*/{SHARD_FILE}"))
    table = LabelTable.joined([read_table(path.parent).of_shard(int(path.parent.name)) for path in shards])
    if keep_table:
        table.write(where.label_table)
    return table


def _kept(where: StageFolder) -> LabelTable | None:
    """The table of a finished stage; None where it is missing, damaged, or not of the labels that the stage counts."""
    try:
        table = LabelTable.read_file(where.label_table)
    except UserError:
        return None
    count = int((table.steps_s < 0).sum())
    return table if count == read_json(where.product).get("frames_done") else None

"""Label: reference energies, forces and stresses of the selected frames; in round 1 the relaxations to learn from too."""

from __future__ import annotations

from typing import Any

from hpcft.config.campaign import Campaign
from hpcft.labelling.item import Item, StoredItems
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label_tasks import collect_shards, count_relaxations, run_shard, shards
from hpcft.stages.sharing import numbers_of
from hpcft.storage.structures import count_structures


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    frames = count_structures(context.folder.stage(context.round, "select").task(0).path / "selected.h5")
    wanted = context.round == 1 and context.campaign.train.relaxation is not None
    relaxations = count_relaxations(context, "train") if wanted else 0
    return shards(frames, relaxations, context.campaign.label.shards)


def run(task: TaskContext) -> dict[str, Any]:
    selected = task.context.folder.stage(task.context.round, "select").task(0).path / "selected.h5"
    frames = StoredItems(selected, numbers_of(task.payload["frames"]), Item.single_point)
    return run_shard(task, frames, "train")


def collect(context: StageContext) -> dict[str, Any]:
    return collect_shards(context)

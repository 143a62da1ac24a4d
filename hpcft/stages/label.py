"""Label: reference energies, forces and stresses of the selected frames; in round 1 the relaxations to learn from too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcft.config.campaign import Campaign
from hpcft.labelling.item import Item, StoredItems
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label_plan import planned
from hpcft.stages.label_tasks import collect_shards, relaxation_items, run_shard
from hpcft.stages.sharing import numbers_of


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    wanted = context.round == 1 and context.campaign.train.relaxation is not None
    starts = context.folder.inputs / "relaxations-train.h5"
    return planned(context, [_selected(context)], [starts] if wanted and starts.exists() else [])


def run(task: TaskContext) -> dict[str, Any]:
    frames = StoredItems(_selected(task.context), numbers_of(task.payload["frames"]), Item.single_point)
    starts = task.context.folder.inputs / "relaxations-train.h5"
    return run_shard(task, frames, relaxation_items(task, starts, task.context.campaign.relaxations))


def collect(context: StageContext) -> dict[str, Any]:
    return collect_shards(context)


def _selected(context: StageContext) -> Path:
    return context.folder.stage(context.round, "select").task(0).path / "selected.h5"

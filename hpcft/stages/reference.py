"""Reference: labels of the probe's frames, to judge the model by; in round 0 the test relaxations, once for all rounds."""

from __future__ import annotations

from typing import Any

from hpcft.config.campaign import Campaign
from hpcft.labelling.item import Item
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label_plan import planned
from hpcft.stages.label_tasks import collect_shards, relaxation_items, run_shard
from hpcft.stages.sharing import numbers_of, probe_frames


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    frames = [task.path / "frames.h5" for task in context.tasks_of("probe")]
    starts = context.folder.inputs / "relaxations-test.h5"
    wanted = context.round == 0 and starts.exists()
    return planned(context, frames, [starts] if wanted else [])


def run(task: TaskContext) -> dict[str, Any]:
    frames = probe_frames(task.context, numbers_of(task.payload["frames"]))
    items = [Item.single_point(frame) for frame in frames]
    starts = task.context.folder.inputs / "relaxations-test.h5"
    return run_shard(task, items, relaxation_items(task, starts, task.context.campaign.relaxations))


def collect(context: StageContext) -> dict[str, Any]:
    return collect_shards(context)

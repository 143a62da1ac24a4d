"""Reference: labels of the probe's frames, to judge the model by; in round 0 the test relaxations, once for all rounds."""

from __future__ import annotations

from typing import Any

from hpcft.config.campaign import Campaign
from hpcft.labelling.item import Item
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label_tasks import collect_shards, count_relaxations, run_shard, shards
from hpcft.stages.sharing import count_probe_frames, numbers_of, probe_frames


def ranks(campaign: Campaign) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    frames = count_probe_frames(context)
    relaxations = count_relaxations(context, "test") if context.round == 0 else 0
    return shards(frames, relaxations, context.campaign.label.shards)


def run(task: TaskContext) -> dict[str, Any]:
    frames = probe_frames(task.context, numbers_of(task.payload["frames"]))
    return run_shard(task, [Item.single_point(frame) for frame in frames], "test")


def collect(context: StageContext) -> dict[str, Any]:
    return collect_shards(context)

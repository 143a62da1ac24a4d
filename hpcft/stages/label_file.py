"""The one stage of `hpcft label`: reference labels, or relaxations, of the structures of a file."""

from __future__ import annotations

from typing import Any

from hpcft.config.label_run import LabelRun
from hpcft.errors import CampaignStopped
from hpcft.labelling.item import Item, StoredItems
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label_export import export
from hpcft.stages.label_plan import planned
from hpcft.stages.label_tasks import collect_shards, relaxation_items, run_shard
from hpcft.stages.sharing import numbers_of
from hpcft.storage.structures import read_first_equals


def ranks(run: LabelRun) -> int:
    return 1


def plan(context: StageContext) -> list[dict[str, Any]]:
    structures = context.folder.inputs / "structures.h5"
    relaxes = _settings(context).relaxation is not None
    frames, relaxations = ([], [structures]) if relaxes else ([structures], [])
    return planned(context, frames, relaxations, read_first_equals(structures))


def run(task: TaskContext) -> dict[str, Any]:
    structures = task.context.folder.inputs / "structures.h5"
    frames = StoredItems(structures, numbers_of(task.payload["frames"]), Item.single_point)
    return run_shard(task, frames, relaxation_items(task, structures, _settings(task.context).relaxation))


def collect(context: StageContext) -> dict[str, Any]:
    """What is done is exported also where too much has failed for the run to count as finished."""
    try:
        product = collect_shards(context)
    except CampaignStopped:
        export(context)
        raise
    export(context, product["suspects"])
    return product


def _settings(context: StageContext) -> LabelRun:
    assert isinstance(context.settings, LabelRun)
    return context.settings

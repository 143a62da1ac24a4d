"""Where a campaign stands, from its records alone: no torch, no Slurm, no lock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpcft.campaign.lease import holder
from hpcft.campaign.records import read_records
from hpcft.report.results import read_results
from hpcft.storage.campaign_folder import CampaignFolder


def describe(folder: CampaignFolder) -> dict[str, Any]:
    """JSON-able: state (finished, running, idle), round, stage, tasks, manager, problems, results of each round."""
    identity = folder.read_identity()
    records = read_records(folder)
    manager = holder(folder.leases)
    stage = records.current
    state = "finished" if stage is None else "running" if manager else "idle"
    summary = f"{identity['name']}: {state}"
    tasks: dict[str, int] | None = None
    problems: list[str] = []
    if stage is not None:
        total = stage.num_tasks or 0
        tasks = {"total": total, "done": len(stage.done), "missing": len(stage.missing)}
        summary += f", round {stage.round} of {records.rounds}, stage {stage.name}"
        summary += (
            f", {len(stage.done)} of {total} tasks done"
            if stage.num_tasks is not None
            else ", not planned yet"
        )
        for task in stage.missing:
            for error in stage.errors.get(task, ())[-1:]:
                problems.append(f"task {task}, attempt {error['attempt']}: {error['message']}")
    if state == "idle":
        summary += f"; no manager is at work here: hpcft resume {folder.root}"
    return {
        "name": identity["name"],
        "folder": str(folder.root),
        "state": state,
        "summary": summary,
        "round": None if stage is None else stage.round,
        "rounds": records.rounds,
        "stage": None if stage is None else stage.name,
        "tasks": tasks,
        "manager": manager,
        "problems": problems,
        "results": [_without_nan(vars(result)) for result in read_results(folder)],
    }


def _without_nan(value: Any) -> Any:
    """None in the place of each NaN, such as the ends of an interval that one replica cannot give: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

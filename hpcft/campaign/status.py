"""Where a campaign stands, from its records: no torch, no lock; Slurm is asked briefly, and is not needed."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hpcft.campaign.controllers import detached_state, lost_controller
from hpcft.campaign.lease import holder
from hpcft.campaign.policy import describe as describe_ending
from hpcft.campaign.records import Records, StageRecord, read_records
from hpcft.cluster import slurm
from hpcft.errors import SchedulerUnavailable, UserError
from hpcft.report.results import read_results
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder, kind_of

# A status that waits for a scheduler that is down is no use; what was seen last is shown with its age.
_PATIENCE_S = 0.5
_MOST_PROBLEMS = 12


def describe(folder: CampaignFolder, run: slurm.Run | None = None) -> dict[str, Any]:
    """JSON-able: state (finished, running, detached, idle), round, stage, tasks, queue, manager, problems, labels, results."""
    identity = folder.read_identity()
    records = read_records(folder)
    stage = records.current
    ask = run or functools.partial(slurm.run_command, timeout_s=_PATIENCE_S)
    queue = None if stage is None else _queue(folder, identity, stage, ask)
    controller = None if stage is None else detached_state(folder)
    manager = holder(folder.leases)
    state = "finished" if stage is None else "running" if manager else "detached" if controller else "idle"
    problems = [] if stage is None else [*_stop(folder, stage), *_problems(folder, stage, queue)]
    if controller is not None and manager is None:
        silent = queue is not None and not queue["answers"]  # asking again would double the wait
        state, trouble = (
            ("detached", []) if silent and not controller["over"] else _watched(folder, controller, ask)
        )
        problems[:0] = trouble
    return {
        "name": identity["name"],
        "folder": str(folder.root),
        "state": state,
        "summary": _summary(folder, identity, records, state, queue),
        "round": None if stage is None else stage.round,
        "rounds": records.rounds,
        "stage": None if stage is None else stage.name,
        "tasks": None if stage is None else _tasks(stage),
        "queue": queue,
        "manager": manager,
        "controller": controller,
        "problems": problems,
        "labels": read_json(folder.exported) if folder.exported.exists() else None,
        "results": [_without_nan(vars(result)) for result in read_results(folder)],
    }


def _tasks(stage: StageRecord) -> dict[str, int]:
    return {
        "total": stage.num_tasks or 0,
        "done": len(stage.done),
        "missing": len(stage.missing),
        "set_aside": len(stage.set_aside),
    }


def _watched(folder: CampaignFolder, controller: Mapping[str, Any], ask: slurm.Run) -> tuple[str, list[str]]:
    """The state of a detached campaign, and what is wrong with it: nobody else watches over its controller."""
    if controller["over"]:
        return "idle", [str(controller["over"])]
    try:
        lost = lost_controller(folder, ask)
    except SchedulerUnavailable:
        return "detached", []
    return ("idle", [lost]) if lost else ("detached", [])


def _queue(
    folder: CampaignFolder, identity: Mapping[str, Any], stage: StageRecord, ask: slurm.Run
) -> dict[str, Any] | None:
    """Jobs of the stage that run or wait, by Slurm's own word or by the last one that was noted; None before the first.

    On the local executor: what runs on this machine.
    """
    if not folder.site.exists():
        return None
    if read_json(folder.site).get("executor") != "slurm":
        return {
            "answers": True,
            "at": time.time(),
            "running": _num_running_here(folder, stage),
            "pending": {},
        }
    try:
        jobs = slurm.queue(f"hpcft-{identity['id']}-r{stage.round}-{stage.name}-", ask)
    except SchedulerUnavailable:
        if not folder.observed.exists():
            return {"answers": False}
        seen = read_json(folder.observed)
        is_this = (seen["round"], seen["stage"]) == (stage.round, stage.name)
        known = {key: seen[key] for key in ("running", "pending", "at")} if is_this else {}
        return {"answers": False, **known}
    pending = Counter(job.reason for job in jobs if not job.is_over and not job.is_running)
    return {
        "answers": True,
        "at": time.time(),
        "running": sum(job.is_running for job in jobs),
        "pending": dict(pending),
    }


def _num_running_here(folder: CampaignFolder, stage: StageRecord) -> int:
    from hpcft.cluster.local import job_is_alive

    where = folder.stage(stage.round, stage.name)
    latest = {task: stage.latest_attempt(task) for task in stage.missing}
    jobs = [(a.job_ids[task], where.logs(a.number)) for task, a in latest.items() if a and a.job_ids]
    return sum(job_is_alive(job_id, logs) for job_id, logs in jobs)


def _summary(
    folder: CampaignFolder,
    identity: Mapping[str, Any],
    records: Records,
    state: str,
    queue: Mapping[str, Any] | None,
) -> str:
    stage = records.current
    summary = f"{identity['name']}: {state}"
    if stage is None:
        return summary
    if kind_of(identity) == "campaign":
        summary += f", round {stage.round} of {records.rounds}, stage {stage.name}"
    if stage.num_tasks is None:
        summary += ", not planned yet"
    else:
        summary += f", {len(stage.done)} of {stage.num_tasks} tasks done"
        summary += f", {len(stage.set_aside)} set aside" * bool(stage.set_aside)
    if queue is not None:
        summary += _in_queue(queue)
    if state == "idle":
        summary += f"; no manager is at work here: hpcft resume {folder.root}"
    return summary


def _in_queue(queue: Mapping[str, Any]) -> str:
    text = ""
    if "running" in queue:
        parts = [f"{queue['running']} running"] * bool(queue["running"])
        parts += [f"{count} pending ({reason})" for reason, count in sorted(queue["pending"].items())]
        text = "".join(f", {part}" for part in parts)
    if queue["answers"]:
        return text
    age = f", as of {_age(time.time() - queue['at'])} ago" if "at" in queue else ""
    return f"{text}{age} (Slurm does not answer)"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _stop(folder: CampaignFolder, stage: StageRecord) -> list[str]:
    """Why the last manager could not go on with this stage."""
    if not folder.stopped.exists():
        return []
    stopped = read_json(folder.stopped)
    is_this = (stopped["round"], stopped["stage"]) == (stage.round, stage.name)
    return [f"stopped: {stopped['why']}"] if is_this else []


def _problems(folder: CampaignFolder, stage: StageRecord, queue: Mapping[str, Any] | None) -> list[str]:
    """What has gone wrong with tasks that are not done, newest word of each; and jobs that will never start."""
    lines = []
    for task in stage.missing:
        errors = stage.errors.get(task, ())
        endings = stage.endings.get(task, ())
        if errors and (not endings or endings[-1].attempt <= errors[-1]["attempt"]):
            lines.append(f"task {task}, attempt {errors[-1]['attempt']}: {errors[-1]['message']}")
        elif endings:
            lines.append(f"task {task}, attempt {endings[-1].attempt}: {describe_ending(endings[-1])}")
        elif (executions := stage.runs.get(task, 1)) > 1:
            lines.append(f"task {task}: {_restarted(folder, stage, task, executions)}")
    lines += [f"task {task}: set aside: {why}" for task, why in _set_aside(folder, stage).items()]
    if len(lines) > _MOST_PROBLEMS:
        lines = [*lines[:_MOST_PROBLEMS], f"and {len(lines) - _MOST_PROBLEMS} more tasks"]
    for reason in set((queue or {}).get("pending", {})) & slurm.HOPELESS_REASONS:
        lines.append(
            f"jobs wait for {reason}, which will not pass by itself; see hpcft check --site SITE, and what the site's "
            "limits are"
        )
    return lines


def _restarted(folder: CampaignFolder, stage: StageRecord, task: int, executions: int) -> str:
    """A requeued job has lost a node, or was preempted: which node it was may matter."""
    where = folder.stage(stage.round, stage.name).task(task)
    nodes = []
    for number in range(1, executions + 1):
        try:
            nodes.append(str(read_json(where.run(number))["node"]))
        except (FileNotFoundError, KeyError, UserError):
            continue
    times = f"{executions - 1} time{'s' * (executions > 2)}"
    return f"started again {times}; it ran on {', then '.join(nodes)}"


def _set_aside(folder: CampaignFolder, stage: StageRecord) -> dict[int, str]:
    return folder.stage(stage.round, stage.name).read_set_aside() if stage.set_aside else {}


def _without_nan(value: Any) -> Any:
    """None in the place of each NaN, such as the ends of an interval that one replica cannot give: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

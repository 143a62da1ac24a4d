"""An array element in a process of its own, as on a cluster, for a stage whose task needs nothing but its payload."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcft.config.campaign import Campaign
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder

CONFIG: dict[str, Any] = {
    "name": "small",
    "rounds": 1,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10},
    "select": {"frames": 1},
    "train": {"epochs": 1},
    "probe": {"steps": 10, "frames": 1},
}

# A stage that is as real as any to the worker, and whose task needs nothing but its payload.
STAGE = """
import json, sys, types
import hpcft.campaign.worker as worker
import hpcft.stages.registry as registry
from hpcft.errors import CampaignStopped, LabelError, MissingInput, UserError
from hpcft.training.rank import Rank

def run(task):
    print("run", task.attempt, dict(task.payload), *([task.rank] if sys.argv[5:] else []), flush=True)
    if task.payload.get("wait"):
        sys.stdin.read()
    if "raise" in task.payload:
        raise eval(task.payload["raise"])
    return {"answer": task.payload["answer"]}

sys.modules["stage_of_this_test"] = types.SimpleNamespace(run=run)
registry._MODULES["evaluate"] = "stage_of_this_test"
worker._LOCK_WAIT_S = float(sys.argv[1])
if worker._LOCK_WAIT_S:  # else an older execution never looks whether it is the newest
    worker.WATCH_S = 0.05
if sys.argv[5:]:
    rank = Rank(rank=int(sys.argv[5]), world_size=int(sys.argv[6]))
    worker.rank_of_this_process = lambda attempt: rank
    print(worker.run_tasks(sys.argv[2], 0, "evaluate", json.loads(sys.argv[3]), int(sys.argv[4])))
else:
    print(worker.run_task(sys.argv[2], 0, "evaluate", int(sys.argv[3]), int(sys.argv[4]), Rank()))
loaded = sorted({"torch", "ase", "numpy", "h5py", "submitit"} & sys.modules.keys())
print("loaded", *loaded)
"""


def planned_campaign(root: Path) -> CampaignFolder:
    """A campaign whose stage `evaluate` of round 0 is planned: three tasks, one attempt at all of them."""
    folder = CampaignFolder(root)
    stage = folder.stage(0, "evaluate")
    stage.attempts.mkdir(parents=True)
    stage.outcomes.mkdir()
    config = Campaign.model_validate(CONFIG).model_dump(mode="json")
    write_json(folder.identity, {"name": "small", "rounds": 1, "config": config})
    write_json(folder.site, {"name": "here", "executor": "local", "device": "cpu"})
    plan(folder, *({"answer": number} for number in (40, 41, 42)))
    intend(folder, 1, 0, 1, 2)
    return folder


def plan(folder: CampaignFolder, *payloads: dict[str, Any]) -> None:
    write_json(folder.stage(0, "evaluate").plan, {"tasks": payloads})


def intend(folder: CampaignFolder, number: int, *tasks: int, tasks_per_job: int = 1) -> None:
    content = {"attempt": number, "tasks": tasks, "job_name": f"job-{number}", "at": 0.0}
    write_json(folder.stage(0, "evaluate").intent(number), {**content, "tasks_per_job": tasks_per_job})


def element(folder: CampaignFolder, *words: object, lock_wait_s: float = 0.0) -> list[str]:
    """Task and attempt; or tasks, attempt, rank and number of ranks."""
    return [sys.executable, "-c", STAGE, str(lock_wait_s), str(folder.root), *map(str, words)]


def run(folder: CampaignFolder, *words: object) -> tuple[list[str], str]:
    """What the element printed, and the last line of its error output."""
    argv = element(folder, *words)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout.splitlines(), (done.stderr.splitlines() or [""])[-1]


@contextmanager
def running(
    folder: CampaignFolder, index: int, attempt: int, *, executor: str = "", lock_wait_s: float = 0.0
) -> Iterator[subprocess.Popen[str]]:
    """An element in the midst of its task, killed at the end."""
    argv, pipe = element(folder, index, attempt, lock_wait_s=lock_wait_s), subprocess.PIPE
    environment = {**os.environ, "SUBMITIT_EXECUTOR": executor}
    with subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("run ")
        try:
            yield process
        finally:
            process.kill()


def files(folder: CampaignFolder, index: int) -> dict[str, bytes]:
    """What a task has left: in its own folder, and of itself among the outcomes."""
    stage = folder.stage(0, "evaluate")
    mine = [*stage.task(index).path.glob("*"), *stage.outcomes.glob(f"{index:04d}.*")]
    return {path.name: path.read_bytes() for path in mine}

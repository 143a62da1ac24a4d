from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hpcft.campaign.lease import lease
from hpcft.campaign.status import describe
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder, stages_of

METRICS = {
    "energy_bias_meV_per_atom": {"value": -12.5, "low": -20.0, "high": -5.0},
    "delta_q": {"value": 1.5, "low": float("nan"), "high": float("nan")},
}
PRODUCTS: dict[str, Any] = {
    "label": {"items": 10, "done": 9, "failed": 1, "relaxations": 2, "frames_done": 7},
    "reference": {"items": 4, "done": 4, "failed": 0, "relaxations": 0, "frames_done": 4},
    "probe": {"frames": 4, "stopped": {"3": "exploded"}},
    "evaluate": {"metrics": METRICS},
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def finish(folder: CampaignFolder, *rounds: int) -> None:
    for round_ in rounds:
        for name in stages_of(round_):
            write(folder.stage(round_, name).plan, {"tasks": [{}]})
            write(folder.stage(round_, name).product, {**PRODUCTS.get(name, {}), "tasks": 1})


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    """A campaign of one round, of which nothing is done yet."""
    folder = CampaignFolder(tmp_path / "small")
    write(folder.identity, {"name": "small", "rounds": 1})
    return folder


def as_strict_json(state: dict[str, Any]) -> Any:
    """What any JSON parser reads; NaN and Infinity are not JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(json.dumps(state), parse_constant=refuse)


def test_a_new_campaign_is_idle_and_says_how_to_go_on(folder: CampaignFolder) -> None:
    assert describe(folder) == {
        "name": "small",
        "folder": str(folder.root),
        "state": "idle",
        "summary": "small: idle, round 0 of 1, stage probe, not planned yet; no manager is at work here: "
        f"hpcft resume {folder.root}",
        "round": 0,
        "rounds": 1,
        "stage": "probe",
        "tasks": {"total": 0, "done": 0, "missing": 0, "set_aside": 0},
        "queue": None,
        "controller": None,
        "manager": None,
        "problems": [],
        "labels": None,
        "results": [],
    }


def test_a_campaign_with_a_manager_is_running(folder: CampaignFolder) -> None:
    stage = folder.stage(0, "probe")
    write(stage.plan, {"tasks": [{}, {}, {}]})
    write(stage.task(1).result, {})
    with lease(folder.leases):
        state = describe(folder)
    assert state["summary"] == "small: running, round 0 of 1, stage probe, 1 of 3 tasks done"
    assert state["tasks"] == {"total": 3, "done": 1, "missing": 2, "set_aside": 0}
    assert state["manager"].keys() >= {"host", "pid", "at"}
    assert describe(folder)["state"] == "idle"


def test_tasks_that_run_here_without_a_manager_are_counted(folder: CampaignFolder) -> None:
    stage = folder.stage(0, "probe")
    write(folder.site, {"executor": "local"})
    write(stage.plan, {"tasks": [{}, {}, {}]})
    intent = {"attempt": 1, "tasks": [0, 1, 2], "tasks_per_job": 1, "job_name": "x", "at": 0.0, "needs": {}}
    write(stage.intent(1), intent)
    write(stage.task(0).result, {})
    argv = ["sh", "-c", "read line", str(stage.logs(1))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as task:
        ids = {"0": str(task.pid), "1": str(task.pid), "2": "999999999"}
        write(stage.submitted(1), {"job_ids": ids, "at": 0.0})
        state = describe(folder)
        task.kill()
    assert (
        "idle, round 0 of 1, stage probe, 1 of 3 tasks done, 1 running; no manager is at work here"
        in state["summary"]
    )
    assert "running" not in describe(folder)["summary"]


def test_the_last_error_of_each_task_that_is_missing_is_a_problem(folder: CampaignFolder) -> None:
    stage = folder.stage(0, "probe")
    write(stage.plan, {"tasks": [{}, {}, {}]})
    for task, number, message in ((0, 1, "gone"), (1, 1, "first"), (1, 3, "second"), (2, 2, "was mended")):
        write(stage.task(task).error(number), {"attempt": number, "message": message, "final": False})
    write(stage.task(2).result, {})
    assert describe(folder)["problems"] == ["task 0, attempt 1: gone", "task 1, attempt 3: second"]


def test_a_finished_campaign_says_so_even_while_its_manager_writes_the_report(folder: CampaignFolder) -> None:
    finish(folder, 0, 1)
    with lease(folder.leases):
        state = describe(folder)
    assert (state["state"], state["summary"]) == ("finished", "small: finished")
    assert (state["round"], state["stage"], state["tasks"]) == (None, None, None)


def test_results_are_those_of_the_rounds_that_were_evaluated_and_counts_add_up(
    folder: CampaignFolder,
) -> None:
    finish(folder, 0)
    assert [result["round"] for result in describe(folder)["results"]] == [0]
    finish(folder, 1)
    first, second = as_strict_json(describe(folder))["results"]
    assert (first["training_labels"], first["judging_labels"], first["failed_labels"]) == (0, 4, 0)
    assert (second["training_labels"], second["judging_labels"], second["failed_labels"]) == (7, 8, 1)
    assert (second["exploded"], second["replicas_frames"]) == (1, 4)


def test_an_interval_without_ends_is_null_in_json(folder: CampaignFolder) -> None:
    finish(folder, 0)
    [result] = as_strict_json(describe(folder))["results"]
    assert result["metrics"] == {**METRICS, "delta_q": {"value": 1.5, "low": None, "high": None}}

"""What an array element does, in a process of its own as on a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcft.campaign.worker import is_current
from hpcft.cluster.local import lock_is_held
from hpcft.config.campaign import Campaign
from hpcft.storage.atomic import read_json, write_json
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
import sys, types
import hpcft.campaign.worker as worker
import hpcft.stages.registry as registry
from hpcft.errors import CampaignStopped, LabelError, UserError

def run(task):
    print("run", task.attempt, dict(task.payload), flush=True)
    if task.payload.get("wait"):
        sys.stdin.read()
    if "raise" in task.payload:
        raise eval(task.payload["raise"])
    return {"answer": task.payload["answer"]}

sys.modules["stage_of_this_test"] = types.SimpleNamespace(run=run)
registry._MODULES["evaluate"] = "stage_of_this_test"
worker._LOCK_WAIT_S = float(sys.argv[1])
print(worker.run_task(sys.argv[2], 0, "evaluate", int(sys.argv[3]), int(sys.argv[4])))
loaded = sorted({"torch", "ase", "numpy", "h5py", "submitit"} & sys.modules.keys())
print("loaded", *loaded)
"""


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    """A campaign whose stage `evaluate` of round 0 is planned: three tasks, one attempt at all of them."""
    folder = CampaignFolder(tmp_path / "small")
    stage = folder.stage(0, "evaluate")
    stage.intent(1).parent.mkdir(parents=True)
    config = Campaign.model_validate(CONFIG).model_dump(mode="json")
    write_json(folder.identity, {"name": "small", "rounds": 1, "config": config})
    write_json(folder.site, {"device": "cpu"})
    plan(folder, *({"answer": number} for number in (40, 41, 42)))
    intend(folder, 1, 0, 1, 2)
    return folder


def plan(folder: CampaignFolder, *payloads: dict[str, Any]) -> None:
    write_json(folder.stage(0, "evaluate").plan, {"tasks": payloads})


def intend(folder: CampaignFolder, number: int, *tasks: int) -> None:
    content = {"attempt": number, "tasks": tasks, "job_name": f"job-{number}", "at": 0.0}
    write_json(folder.stage(0, "evaluate").intent(number), content)


def element(folder: CampaignFolder, index: int, attempt: int, *, lock_wait_s: float = 0.0) -> list[str]:
    return [sys.executable, "-c", STAGE, str(lock_wait_s), str(folder.root), str(index), str(attempt)]


def run(folder: CampaignFolder, index: int, attempt: int) -> tuple[list[str], str]:
    """What the element printed, and the last line of its error output."""
    argv = element(folder, index, attempt)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout.splitlines(), (done.stderr.splitlines() or [""])[-1]


@contextmanager
def running(folder: CampaignFolder, index: int, attempt: int) -> Iterator[subprocess.Popen[str]]:
    """An element in the midst of its task, killed at the end."""
    argv, pipe = element(folder, index, attempt), subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("run ")
        try:
            yield process
        finally:
            process.kill()


def files(folder: CampaignFolder, index: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.stage(0, "evaluate").task(index).path.glob("*")}


def test_a_task_runs_once_and_leaves_its_result(folder: CampaignFolder) -> None:
    printed, _ = run(folder, 2, 1)
    assert printed[:2] == ["run 1 {'answer': 42}", "done"]
    result = read_json(folder.stage(0, "evaluate").task(2).result)
    assert result["answer"] == 42
    assert result["about"].keys() == {"attempt", "wall_s", "host", "hpcft_version"}
    assert result["about"]["attempt"] == 1
    before = files(folder, 2)
    assert before.keys() == {"result.json", "lock"}

    intend(folder, 2, 2)
    assert run(folder, 2, 2)[0][0] == "done already"
    assert files(folder, 2) == before


def test_an_attempt_that_a_newer_one_supersedes_does_nothing_and_loads_nothing(
    folder: CampaignFolder,
) -> None:
    intend(folder, 2, 1, 2)
    assert run(folder, 1, 1)[0] == ["superseded", "loaded"]
    assert files(folder, 1) == {"lock": b""}
    assert run(folder, 0, 1)[0][1] == "done"
    assert run(folder, 1, 2)[0][:2] == ["run 2 {'answer': 41}", "done"]


def test_an_attempt_that_nobody_intended_does_nothing(folder: CampaignFolder) -> None:
    assert run(folder, 0, 2)[0][0] == "superseded"
    assert run(folder, 3, 1)[0][0] == "superseded"
    assert files(folder, 0) == {"lock": b""}


def test_what_a_killed_manager_left_of_an_intent_supersedes_nothing(folder: CampaignFolder) -> None:
    stage = folder.stage(0, "evaluate")
    for name, text in {".tmp-9999-0002-intent.json": '{"atte', ".tmp-zzzz-0003-intent.json": ""}.items():
        (stage.path / "attempts" / name).write_text(text)
    assert is_current(stage, 0, 1)
    assert not is_current(stage, 0, 2)
    assert not is_current(stage, 3, 3)


def test_only_the_newest_intent_that_names_the_task_counts(folder: CampaignFolder) -> None:
    stage = folder.stage(0, "evaluate")
    for number in range(2, 12):
        intend(folder, number, number % 2)
    assert [attempt for attempt in range(1, 13) if is_current(stage, 0, attempt)] == [10]
    assert [attempt for attempt in range(1, 13) if is_current(stage, 1, attempt)] == [11]
    assert [attempt for attempt in range(1, 13) if is_current(stage, 2, attempt)] == [1]


def test_a_task_that_another_process_runs_is_left_to_it_until_that_one_is_killed(
    folder: CampaignFolder,
) -> None:
    plan(folder, {"answer": 40, "wait": True})
    lock = folder.stage(0, "evaluate").task(0).lock
    with running(folder, 0, 1) as first:
        assert lock_is_held(lock)
        assert run(folder, 0, 1)[0][0] == "superseded"
        first.kill()
        first.wait()
    assert not lock_is_held(lock)
    plan(folder, {"answer": 40})
    assert run(folder, 0, 1)[0][1] == "done"


def test_a_second_execution_waits_for_the_first_to_end(folder: CampaignFolder) -> None:
    plan(folder, {"answer": 40, "wait": True})
    with running(folder, 0, 1) as first:
        argv = element(folder, 0, 1, lock_wait_s=300.0)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            looks = 0
            while looks < 3 and second.poll() is None:
                time.sleep(0.05)
                looks += has_open(second.pid, folder.stage(0, "evaluate").task(0).lock)
            plan(folder, {"answer": 40})
            first.kill()
            assert second.stdout.readline() == "run 1 {'answer': 40}\n"


def has_open(pid: int, path: Path) -> bool:
    try:
        return any(link.readlink() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # a file that was closed while we looked
        return False


@pytest.mark.parametrize(
    ("raised", "message", "final"),
    [
        ("UserError('no such file')", "no such file", True),
        ("CampaignStopped('no labels')", "CampaignStopped: no labels", True),
        ("LabelError('scf', 'not converged')", "LabelError: not converged", False),
        ("OSError(28, 'No space left on device')", "OSError: [Errno 28] No space left on device", False),
        ("SystemExit('stopped')", "SystemExit: stopped", False),
    ],
)
def test_an_error_is_recorded_and_says_whether_the_same_input_would_fail_again(
    raised: str, message: str, final: bool, folder: CampaignFolder
) -> None:
    plan(folder, {"raise": raised})
    _, complaint = run(folder, 0, 1)
    assert message.split(": ")[-1] in complaint
    error = read_json(folder.stage(0, "evaluate").task(0).error(1))
    assert (error["attempt"], error["message"], error["final"]) == (1, message, final)
    assert "in run" in error["traceback"]
    assert not folder.stage(0, "evaluate").task(0).result.exists()


def test_a_damaged_plan_is_an_error_that_names_it(folder: CampaignFolder) -> None:
    where = folder.stage(0, "evaluate")
    where.plan.write_text('{"tasks": [')
    run(folder, 0, 1)
    error = json.loads(where.task(0).error(1).read_text())
    assert error["message"].startswith(f"{where.plan} is not valid JSON")
    assert error["final"]


def test_leftovers_of_a_killed_attempt_are_removed_before_the_next_one(folder: CampaignFolder) -> None:
    task = folder.stage(0, "evaluate").task(0)
    task.path.mkdir(parents=True)
    (task.path / ".tmp-0123456789abcdef-result.json").write_text("half")
    assert run(folder, 0, 1)[0][1] == "done"
    assert files(folder, 0).keys() == {"result.json", "lock"}

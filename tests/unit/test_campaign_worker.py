"""What an array element does, in a process of its own as on a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from one_element import files, intend, plan, planned_campaign, run

from hpcft.campaign.worker import _is_packed, is_current
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    return planned_campaign(tmp_path / "small")


def test_a_task_runs_once_and_leaves_its_result(folder: CampaignFolder) -> None:
    printed, _ = run(folder, 2, 1)
    assert printed[:2] == ["run 1 {'answer': 42}", "done"]
    result = read_json(folder.stage(0, "evaluate").task(2).result)
    assert result["answer"] == 42
    assert result["about"].keys() == {
        "attempt",
        "execution",
        "wall_s",
        "peak_memory_MiB",
        "host",
        "hpcft_version",
        "at",
    }
    assert result["about"]["attempt"] == 1
    before = files(folder, 2)
    assert before.keys() == {"0002.result.json", "0002.run-0001.json", "lock"}

    intend(folder, 2, 2)
    assert run(folder, 2, 2)[0][0] == "done already"
    assert files(folder, 2) == before


def test_an_attempt_that_a_newer_one_supersedes_does_nothing_and_loads_nothing(
    folder: CampaignFolder,
) -> None:
    intend(folder, 2, 1, 2)
    assert run(folder, 1, 1)[0] == ["superseded", "loaded"]
    assert files(folder, 1) == {}
    assert run(folder, 0, 1)[0][1] == "done"
    assert run(folder, 1, 2)[0][:2] == ["run 2 {'answer': 41}", "done"]


def test_an_attempt_that_nobody_intended_does_nothing(folder: CampaignFolder) -> None:
    assert run(folder, 0, 2)[0][0] == "superseded"
    assert run(folder, 3, 1)[0][0] == "superseded"
    assert files(folder, 0) == {}


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


@pytest.mark.parametrize(
    ("raised", "message", "final"),
    [
        ("UserError('no such file')", "no such file", True),
        ("MissingInput('no such potential')", "no such potential", False),
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
    assert error["cause"] == "error"
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
    assert files(folder, 0).keys() == {"0000.result.json", "0000.run-0001.json", "lock"}


def test_a_single_task_is_run_by_all_ranks_of_its_job(folder: CampaignFolder) -> None:
    intend(folder, 2, 1)
    for rank in (1, 0):
        printed = run(folder, "[1]", 2, rank, 2)[0]
        assert printed[0].startswith("run 2 {'answer': 41} Rank(")
        assert f"rank={rank}, world_size=2" in printed[0]
        assert printed[1] == "done"
        assert folder.stage(0, "evaluate").task(1).result.exists() == (rank == 0), "the first rank writes it"


def test_each_rank_of_a_shared_job_runs_a_task_of_its_own_and_is_the_only_rank_of_it(
    folder: CampaignFolder,
) -> None:
    intend(folder, 2, 0, 1, 2, tasks_per_job=2)
    for rank, tasks in ((0, "[0, 1]"), (1, "[0, 1]"), (0, "[2]")):
        printed = run(folder, tasks, 2, rank, 2)[0]
        assert "rank=0, world_size=1" in printed[0]
        assert printed[1] == "done"
    results = folder.stage(0, "evaluate").read_results()
    assert {task: result["answer"] for task, result in results.items()} == {0: 40, 1: 41, 2: 42}


def test_a_rank_of_a_shared_job_for_which_no_task_is_left_does_nothing(folder: CampaignFolder) -> None:
    intend(folder, 2, 0, 1, 2, tasks_per_job=2)
    assert run(folder, "[2]", 2, 1, 2)[0][0].startswith("nothing to do")
    assert files(folder, 2) == {}


def test_a_failure_in_a_shared_job_is_that_of_its_task_alone(folder: CampaignFolder) -> None:
    plan(folder, {"answer": 40}, {"raise": "ValueError('singular')"}, {"answer": 42})
    intend(folder, 2, 0, 1, tasks_per_job=2)
    for rank in (1, 0):
        run(folder, "[0, 1]", 2, rank, 2)
    outcomes = folder.stage(0, "evaluate").list_outcomes()
    assert (outcomes.done, outcomes.errors) == ({0}, {1: (2,)})


def test_whether_a_job_is_shared_is_read_from_its_intent_alone(folder: CampaignFolder) -> None:
    """The last job of a stage may have one task, as a job of several ranks has."""
    root = str(folder.root)
    intend(folder, 2, 0)
    intend(folder, 3, 0, tasks_per_job=4)
    assert [_is_packed(root, 0, "evaluate", number) for number in (1, 2, 3)] == [False, False, True]

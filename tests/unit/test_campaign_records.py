from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcft.campaign.manager import record_resume, write_marker
from hpcft.campaign.records import Attempt, Ending, Records, Rejection, StageRecord, intents_of, read_records
from hpcft.errors import UserError
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.campaign_folder import STAGES, STAGES_OF_ROUND_0, CampaignFolder

HALF_WRITTEN = '{"attempt": 2, "tas'


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def new_campaign(root: Path, rounds: int = 1) -> CampaignFolder:
    folder = CampaignFolder(root)
    write(folder.identity, {"name": "small", "rounds": rounds})
    return folder


def intend(folder: CampaignFolder, round_: int, stage: str, number: int, tasks: list[int], at: float) -> None:
    content = {"attempt": number, "tasks": tasks, "job_name": f"job-{number}", "at": at}
    write(folder.stage(round_, stage).intent(number), content)


def write_ending(folder: CampaignFolder, number: int, tasks: dict[str, Any], at: float) -> None:
    path = folder.stage(1, "explore").attempts / f"ended-{number:06d}.json"
    write(path, {"at": at, "tasks": tasks})


def current(folder: CampaignFolder) -> StageRecord:
    stage = read_records(folder).current
    assert stage is not None
    return stage


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    """Round 0 is measured; explore of round 1 has three tasks: one done, one failed twice, one with an unknown fate."""
    folder = new_campaign(tmp_path / "small")
    for name in STAGES_OF_ROUND_0:
        stage = folder.stage(0, name)
        write(stage.plan, {"tasks": [{}]})
        write(stage.product, {"from": name, "tasks": 1})
    stage = folder.stage(1, "explore")
    write(stage.plan, {"tasks": [{"replicas": [0]}, {"replicas": [1]}, {"replicas": [2]}]})
    intend(folder, 1, "explore", 1, [0, 1, 2], 100.0)
    write(stage.submitted(1), {"job_ids": {"0": "12_0", "1": "12_1", "2": "12_2"}, "at": 101.0})
    intend(folder, 1, "explore", 2, [1], 200.0)
    write(stage.submitted(2), {"job_ids": {"1": "13"}, "at": 201.0})
    intend(folder, 1, "explore", 3, [2], 300.0)
    write(stage.task(0).result, {"frames": 12})
    for number in (1, 2):
        write(stage.task(1).error(number), {"attempt": number, "message": f"no. {number}", "final": False})
    write_ending(folder, 1, {"1": {"attempt": 1, "cause": "error", "node": "n1"}}, at=150.0)
    write(folder.resumes / "0000.json", {"at": 250.0, "round": 1, "stage": "explore", "attempt": 2})
    return folder


def test_everything_up_to_the_stage_in_progress_is_read_back(folder: CampaignFolder) -> None:
    records = read_records(folder)
    before = tuple(
        StageRecord(0, name, 1, (), frozenset({0}), {}, {"from": name, "tasks": 1})
        for name in STAGES_OF_ROUND_0
    )
    explore = StageRecord(
        1,
        "explore",
        3,
        (
            Attempt(1, (0, 1, 2), "job-1", 100.0, {0: "12_0", 1: "12_1", 2: "12_2"}),
            Attempt(2, (1,), "job-2", 200.0, {1: "13"}),
            Attempt(3, (2,), "job-3", 300.0, None),
        ),
        frozenset({0}),
        {
            1: (
                {"attempt": 1, "message": "no. 1", "final": False},
                {"attempt": 2, "message": "no. 2", "final": False},
            )
        },
        None,
        resumed_after=2,
        endings={1: (Ending(1, "error", 150.0, "n1"),)},
    )
    assert records == Records((*before, explore), rounds=1)
    assert records.current == explore
    assert explore.missing == (1, 2)


def test_a_new_campaign_has_nothing_but_its_first_stage(tmp_path: Path) -> None:
    records = read_records(new_campaign(tmp_path))
    assert records == Records((StageRecord(0, "probe"),), rounds=1)
    assert records.current == StageRecord(0, "probe")


def test_the_stages_come_in_their_order_until_the_last_round_is_evaluated(tmp_path: Path) -> None:
    folder = new_campaign(tmp_path, rounds=2)
    expected = [(0, name) for name in STAGES_OF_ROUND_0] + [(r, name) for r in (1, 2) for name in STAGES]
    seen = []
    while (stage := read_records(folder).current) is not None:
        seen.append((stage.round, stage.name))
        where = folder.stage(stage.round, stage.name)
        write(where.plan, {"tasks": [{}]})
        write(where.product, {"tasks": 1})
    assert seen == expected
    assert len(read_records(folder).stages) == len(expected)


def test_only_a_result_record_makes_a_task_done(folder: CampaignFolder) -> None:
    stage = folder.stage(1, "explore")
    task = stage.task(2)
    task.path.mkdir(parents=True)
    (task.path / "trajectory.h5").write_text("complete, for all that anybody knows")
    temporary = task.result.with_name(f".tmp-0123456789abcdef-{task.result.name}")
    temporary.write_text("{}")
    write(task.run(1), {"attempt": 3})
    task.lock.touch()
    assert read_records(folder).stages[-1].done == {0}
    write(task.result, {})
    assert read_records(folder).stages[-1].done == {0, 2}


def test_what_a_killed_writer_left_behind_is_no_record(folder: CampaignFolder) -> None:
    whole = read_records(folder)
    stage = folder.stage(1, "explore")
    complete = stage.intent(2).read_text()
    for path, text in {
        stage.intent(4): HALF_WRITTEN,
        stage.intent(2): complete,
        stage.submitted(3): HALF_WRITTEN,
        stage.plan: "",
        stage.product: "{}",
        stage.rejected(3): HALF_WRITTEN,
        stage.attempts / "ended-000002.json": HALF_WRITTEN,
        stage.task(2).error(3): HALF_WRITTEN,
        stage.task(2).result: "",
        stage.task(2).aside: "",
        folder.resumes / "0001.json": HALF_WRITTEN,
        folder.identity: "",
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.with_name(f".tmp-0123456789abcdef-{path.name}").write_text(text)
    assert read_records(folder) == whole
    assert [path.name for path in intents_of(stage)] == [f"{n:04d}-intent.json" for n in (1, 2, 3)]


RECORDS: dict[str, Callable[[CampaignFolder], Path]] = {
    "identity": lambda folder: folder.identity,
    "product": lambda folder: folder.stage(0, "probe").product,
    "plan": lambda folder: folder.stage(1, "explore").plan,
    "intent": lambda folder: folder.stage(1, "explore").intent(2),
    "submitted": lambda folder: folder.stage(1, "explore").submitted(1),
    "ending": lambda folder: folder.stage(1, "explore").attempts / "ended-000001.json",
    "error": lambda folder: folder.stage(1, "explore").task(1).error(1),
    "resume": lambda folder: folder.resumes / "0000.json",
}


@pytest.mark.parametrize("which", RECORDS)
@pytest.mark.parametrize("content", ["", "\0\0\0\0", HALF_WRITTEN, "{} {}"])
def test_a_damaged_record_is_named(which: str, content: str, folder: CampaignFolder) -> None:
    path = RECORDS[which](folder)
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_records(folder)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).count("damaged or edited by hand") == 1


@pytest.mark.parametrize("which", RECORDS)
@pytest.mark.parametrize("content", [{}, [], 3, None, {"tasks": None, "attempt": "x", "job_ids": []}])
def test_a_record_without_its_entries_is_named(which: str, content: Any, folder: CampaignFolder) -> None:
    path = RECORDS[which](folder)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not what hpcft wrote there") as caught:
        read_records(folder)
    assert str(caught.value).startswith(f"{path} ")


def test_a_plan_that_goes_while_it_is_read_is_named(
    folder: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = folder.stage(1, "explore").plan
    read = read_json

    def read_too_late(path: Path) -> Any:
        if path == plan:
            plan.unlink()
        return read(path)

    monkeypatch.setattr("hpcft.campaign.records.read_json", read_too_late)
    with pytest.raises(UserError, match="is missing") as caught:
        read_records(folder)
    assert str(caught.value).startswith(f"{plan} ")


def test_a_finished_stage_needs_nothing_but_its_product(folder: CampaignFolder) -> None:
    whole = read_records(folder)
    for name in STAGES_OF_ROUND_0:
        folder.stage(0, name).plan.unlink()
    assert read_records(folder) == whole


def test_a_refused_submission_is_no_attempt_of_its_tasks(folder: CampaignFolder) -> None:
    intend(folder, 1, "explore", 4, [1, 2], 400.0)
    write(folder.stage(1, "explore").rejected(4), {"limit": True, "message": "too many jobs"})
    stage = current(folder)
    assert stage.attempts[-1].rejected == Rejection(True, "too many jobs")
    assert [stage.latest_attempt(task) for task in (1, 2)] == [stage.attempts[1], stage.attempts[2]]
    assert stage.attempts_at(2) == (stage.attempts[0], stage.attempts[2], stage.attempts[3])
    write(folder.stage(1, "explore").rejected(4), {"message": "too many jobs"})
    with pytest.raises(UserError, match="is not what hpcft wrote there"):
        read_records(folder)


def test_endings_of_a_task_come_in_the_order_in_which_they_were_written(folder: CampaignFolder) -> None:
    about = {"node": None, "detail": "exit code 0:9", "memory_GB": 4.0}
    both = {str(task): {"attempt": 2, "cause": "out-of-memory", **about} for task in (1, 2)}
    write_ending(folder, 2, both, at=160.0)
    write_ending(folder, 10, {"1": {"attempt": 3, "cause": "lost"}}, at=170.0)
    stage = current(folder)
    assert stage.endings == {
        1: (
            Ending(1, "error", 150.0, "n1"),
            Ending(2, "out-of-memory", 160.0, None, "exit code 0:9", 4.0),
            Ending(3, "lost", 170.0),
        ),
        2: (Ending(2, "out-of-memory", 160.0, None, "exit code 0:9", 4.0),),
    }
    assert stage.ending(1, 3) == Ending(3, "lost", 170.0)
    assert stage.ending(2, 3) is None


def test_a_task_that_was_set_aside_is_neither_done_nor_missing(folder: CampaignFolder) -> None:
    write(folder.stage(1, "explore").task(2).aside, {"why": "it was preempted"})
    stage = current(folder)
    assert (stage.set_aside, stage.missing, stage.done) == ({2}, (1,), {0})
    write(folder.stage(1, "explore").task(2).result, {})
    stage = current(folder)
    assert (stage.set_aside, stage.missing, stage.done) == (set(), (1,), {0, 2}), (
        "it came to its end after all"
    )


def test_the_newest_execution_of_each_task_is_known(folder: CampaignFolder) -> None:
    for task, number in ((0, 1), (2, 1), (2, 2), (2, 10)):
        write(folder.stage(1, "explore").task(task).run(number), {"attempt": 1})
    assert current(folder).runs == {0: 1, 2: 10}


@pytest.mark.parametrize(
    ("tasks_per_job", "num_jobs", "expected"),
    [
        (1, 5, {4: "7_0", 5: "7_1", 6: "7_2", 9: "7_3", 11: "7_4"}),
        (2, 3, {4: "7_0", 5: "7_0", 6: "7_1", 9: "7_1", 11: "7_2"}),
        (5, 1, dict.fromkeys((4, 5, 6, 9, 11), "7_0")),
        (8, 1, dict.fromkeys((4, 5, 6, 9, 11), "7_0")),
    ],
)
def test_tasks_share_jobs_in_their_order(
    tasks_per_job: int, num_jobs: int, expected: dict[int, str], folder: CampaignFolder
) -> None:
    attempt = Attempt(1, (4, 5, 6, 9, 11), "job-1", 0.0, None, tasks_per_job=tasks_per_job)
    assert attempt.num_jobs == num_jobs
    assert attempt.job_ids_of([f"7_{element}" for element in range(num_jobs)]) == expected


def test_a_folder_without_an_identity_is_no_campaign(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a campaign folder"):
        read_records(CampaignFolder(tmp_path))


def test_a_resume_counts_for_the_stage_that_it_found_and_whatever_the_clocks_say(
    folder: CampaignFolder,
) -> None:
    yesterday = 100.0 - 86400.0  # this host's clock is behind that of the one that submitted
    record_resume(folder, now=yesterday)
    stage = current(folder)
    assert stage.resumed_after == 3
    intend(folder, 1, "explore", 4, [1, 2], at=yesterday)
    assert [current(folder).counted_after(task) for task in (0, 1, 2)] == [3, 3, 3]

    for task in (1, 2):
        write(folder.stage(1, "explore").task(task).result, {})
    write(folder.stage(1, "explore").product, {"tasks": 3})
    write(folder.stage(1, "select").plan, {"tasks": [{}]})
    assert (current(folder).name, current(folder).resumed_after) == ("select", 0)


def test_single_tasks_may_be_given_new_attempts(folder: CampaignFolder) -> None:
    write_marker(folder, current(folder), 300.0, [2])
    intend(folder, 1, "explore", 4, [1, 2], at=400.0)
    write_marker(folder, current(folder), 500.0, [1])
    stage = current(folder)
    assert stage.resumed_after == 2
    assert [stage.counted_after(task) for task in (0, 1, 2)] == [2, 4, 3]


def test_each_resume_is_a_file_of_its_own_and_the_newest_counts(folder: CampaignFolder) -> None:
    first = (folder.resumes / "0000.json").read_bytes()
    record_resume(folder, now=260.0)
    intend(folder, 1, "explore", 4, [1], at=270.0)
    record_resume(folder, now=280.0)
    assert (folder.resumes / "0000.json").read_bytes() == first
    assert sorted(path.name for path in folder.resumes.iterdir()) == ["0000.json", "0001.json", "0002.json"]
    assert current(folder).resumed_after == 4


def test_the_latest_attempt_of_a_task_is_the_last_one_that_names_it(folder: CampaignFolder) -> None:
    stage = current(folder)
    assert [stage.latest_attempt(task) for task in (0, 1, 2)] == list(stage.attempts)
    assert stage.latest_attempt(3) is None

"""A finished stage is packed: what it says stays the same, however often and wherever that is interrupted."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hpcft.campaign.tidy import is_tidy, tidy, untidy
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import StageFolder

RESULTS = {0: {"frames": 3, "about": {"attempt": 1}}, 2: {"frames": 4, "name": "Å"}}
SET_ASIDE = {1: "it ran out of memory on n2"}
KEPT = ("trajectory.h5", "labels.h5", "shard.json", "model.pt", "failures.json")
NOT_KEPT = (
    "lock",
    "journal-1.jsonl",
    "checkpoint-0003.pt",
    "segment-0001.h5",
    "segment-0001.h5.json",
    "rendezvous-1-812-0.json",
    ".tmp-0123456789abcdef-labels.h5",
)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    """Three tasks: two have a result, the second only after an error, and one was set aside."""
    stage = StageFolder(tmp_path / "round-001" / "label")
    write(stage.plan, {"tasks": [{}, {}, {}]})
    write(stage.intent(1), {"attempt": 1, "tasks": [0, 1, 2]})
    write(stage.submitted(1), {"job_ids": {"0": "7_0"}})
    write(stage.attempts / "ended-000000.json", {"at": 1.0, "tasks": {}})
    for task in range(3):
        write(stage.task(task).run(1), {"attempt": 1})
        stage.task(task).path.mkdir(parents=True)
        stage.task(task).lock.touch()
    for name in (*KEPT, *NOT_KEPT):
        (stage.task(0).path / name).write_text(name)
    write(stage.task(2).error(1), {"attempt": 1, "message": "singular", "final": False})
    for task, result in RESULTS.items():
        write(stage.task(task).result, result)
    write(stage.task(1).aside, {"why": SET_ASIDE[1], "at": 5.0})
    logs = stage.logs(1)
    logs.mkdir()
    (logs / "7_0_0_log.out").write_text("hello")
    (logs / "7_0_submitted.pkl").write_bytes(b"code")
    (logs / "empty.err").touch()
    (logs / "submission.sh").symlink_to(logs / "gone.sh")
    write(stage.product, {"tasks": 3})
    return stage


def what_it_says(stage: StageFolder) -> tuple[Any, Any]:
    return stage.read_results(), stage.read_set_aside()


def test_results_and_tasks_that_were_set_aside_read_the_same_before_and_after(stage: StageFolder) -> None:
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    assert not is_tidy(stage)
    tidy(stage)
    assert is_tidy(stage)
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    lines = [json.loads(line) for line in stage.results.read_text().splitlines()]
    assert [line["task"] for line in lines] == [0, 1, 2]


def test_what_stays_of_a_stage_is_its_product_its_history_and_its_data(stage: StageFolder) -> None:
    tidy(stage)
    names = {str(path.relative_to(stage.path)) for path in stage.path.rglob("*") if path.is_file()}
    data = {f"tasks/0000/{name}" for name in KEPT}
    assert names == {"plan.json", "product.json", "results.jsonl", "history.zip", *data}
    assert [path.name for path in (stage.path / "tasks").iterdir()] == ["0000"]


def test_the_history_holds_records_errors_and_logs_and_nothing_that_runs(stage: StageFolder) -> None:
    tidy(stage)
    with zipfile.ZipFile(stage.history) as archive:
        assert set(archive.namelist()) == {
            "attempts/0001-intent.json",
            "attempts/0001-submitted.json",
            "attempts/ended-000000.json",
            "attempts/0001-jobs/7_0_0_log.out",
            "outcomes/0000.run-0001.json",
            "outcomes/0001.run-0001.json",
            "outcomes/0001.aside.json",
            "outcomes/0002.run-0001.json",
            "outcomes/0002.error-0001.json",
        }
        assert json.loads(archive.read("outcomes/0002.error-0001.json"))["message"] == "singular"


def test_of_a_very_long_log_the_end_is_kept(stage: StageFolder) -> None:
    (stage.logs(1) / "7_0_0_log.err").write_bytes(b"x" * (2**20 + 5) + b"the cause")
    tidy(stage)
    with zipfile.ZipFile(stage.history) as archive:
        kept = archive.read("attempts/0001-jobs/7_0_0_log.err")
    assert len(kept) == 2**20
    assert kept.endswith(b"the cause")


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_packing_twice_is_the_same_as_once(stage: StageFolder) -> None:
    tidy(stage)
    before = everything_below(stage.path)
    tidy(stage)
    assert everything_below(stage.path) == before


class Killed(BaseException):
    pass


STEPS = [
    "hpcft.campaign.tidy.write_text",
    "hpcft.campaign.tidy.publish",
    "pathlib.Path.unlink",
    "pathlib.Path.rmdir",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", range(0, 24, 3))
def test_a_manager_that_is_killed_while_it_packs_leaves_it_to_the_next(
    step: str, after: int, stage: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    module, _, name = step.rpartition(".")
    owner: Any = Path if module == "pathlib.Path" else __import__(module, fromlist=[name])
    original = getattr(owner, name)

    def killed_sometime(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed_sometime)
        try:
            tidy(stage)
        except Killed:
            assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    tidy(stage)
    assert is_tidy(stage)
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    with zipfile.ZipFile(stage.history) as archive:
        assert len(archive.namelist()) == 9
    assert not list(stage.path.glob(".tmp-*"))


def test_what_a_job_writes_that_ends_later_changes_nothing_and_goes_when_packed_again(
    stage: StageFolder,
) -> None:
    tidy(stage)
    write(stage.task(0).run(2), {"attempt": 1})
    write(stage.task(1).result, {"frames": 9})
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    tidy(stage)
    assert is_tidy(stage)
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)


def test_a_folder_into_which_a_job_still_writes_stops_nobody(
    stage: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that somebody has open under another name, in a folder that cannot go then."""
    unlink = Path.unlink

    def unlink_as_on_nfs(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.suffix == ".out":
            path.with_name(".nfs0001").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_as_on_nfs)
        tidy(stage)
    assert not is_tidy(stage)
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    tidy(stage)
    assert is_tidy(stage)


def records_of(stage: StageFolder) -> dict[str, str]:
    """By file: all records of attempts and outcomes."""
    found = [*stage.attempts.rglob("*.json"), *stage.outcomes.glob("*.json")]
    return {str(path.relative_to(stage.path)): path.read_text() for path in found}


def test_a_stage_is_unpacked_to_the_records_and_logs_that_it_had(stage: StageFolder) -> None:
    before = records_of(stage)
    tidy(stage)
    untidy(stage)
    assert records_of(stage) == before
    assert (stage.logs(1) / "7_0_0_log.out").read_text() == "hello"
    assert not stage.results.exists(), "what new attempts come to must not be hidden by it"
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    untidy(stage)
    assert records_of(stage) == before
    tidy(stage)
    assert is_tidy(stage)
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)


@pytest.mark.parametrize("again", ["unpacked", "packed"])
@pytest.mark.parametrize("killed_at", ["0002.result.json", "results.jsonl", "history.zip"])
def test_unpacking_that_was_killed_is_completed_or_undone(
    killed_at: str, again: str, stage: StageFolder
) -> None:
    """`killed_at` is the file that was next to be written, or to be deleted."""
    before = records_of(stage)
    tidy(stage)
    results, history = stage.results.read_text(), stage.history.read_bytes()
    untidy(stage)
    stage.history.write_bytes(history)
    if killed_at != "history.zip":
        stage.results.write_text(results)
    if killed_at == "0002.result.json":
        stage.task(2).result.unlink()
    if again == "unpacked":
        untidy(stage)
        assert records_of(stage) == before
    tidy(stage)
    assert what_it_says(stage) == (RESULTS, SET_ASIDE)
    assert is_tidy(stage)

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.campaign.logs import logs_of
from hpcft.campaign.tidy import tidy
from hpcft.errors import UserError
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    """Task 1 of two failed once on n1, was done on n2, and printed something each time."""
    stage = CampaignFolder(tmp_path).stage(1, "label")
    for path in (stage.logs(1), stage.logs(2), stage.outcomes):
        path.mkdir(parents=True)
    write_json(stage.plan, {"tasks": [{}, {}]})
    for number, tasks, jobs in ((1, [0, 1], {"0": "12_0", "1": "12_1"}), (2, [1], {"1": "13"})):
        write_json(stage.intent(number), {"attempt": number, "tasks": tasks})
        write_json(stage.submitted(number), {"job_ids": jobs})
        write_json(stage.task(1).run(number), {"attempt": number, "node": f"n{number}"})
    write_json(stage.task(1).error(1), {"attempt": 1, "message": "no", "traceback": "Traceback: no"})
    ended = {"at": 0.0, "tasks": {"1": {"attempt": 1, "cause": "error"}}}
    write_json(stage.attempts / "ended-000000.json", ended)
    (stage.logs(1) / "12_1_0_log.out").write_text("first try\n")
    (stage.logs(1) / "12_10_0_log.out").write_text("of another task\n")
    (stage.logs(1) / "12_1_0_log.err").write_text("")
    (stage.logs(2) / "13_0_log.out").write_text("second try\n")
    for task in (0, 1):
        write_json(stage.task(task).result, {"done": 1})
    return stage


@pytest.mark.parametrize("packed", [False, True])
def test_every_attempt_has_its_end_its_node_and_what_it_printed(stage: StageFolder, packed: bool) -> None:
    if packed:
        tidy(stage)
    first, second = logs_of(stage, 1)
    assert (first.attempt, first.job_id, first.node) == (1, "12_1", "n1")
    assert first.printed == {"12_1_0_log.out": "first try\n"}
    assert first.error is not None and first.error["traceback"] == "Traceback: no"
    assert first.ending == {"attempt": 1, "cause": "error"}
    assert (second.job_id, second.node, second.error, second.ending) == ("13", "n2", None, None)
    assert second.printed == {"13_0_log.out": "second try\n"}


def test_a_task_that_was_never_submitted_has_no_logs(stage: StageFolder) -> None:
    with pytest.raises(UserError, match="no job has been submitted for task 7"):
        logs_of(stage, 7)

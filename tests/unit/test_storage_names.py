"""Names that storage gives to files."""

from __future__ import annotations

from pathlib import Path

from hpcft.storage.atomic import TEMPORARY_PREFIX, temporary_beside
from hpcft.storage.campaign_folder import Outcomes, StageFolder
from hpcft.storage.segments import segment_path


def test_temporary_names_are_unique_hidden_and_in_the_same_folder() -> None:
    path = Path("/campaign/round-0/labels.h5")
    names = {temporary_beside(path) for _ in range(100)}
    assert len(names) == 100
    assert all(name.parent == path.parent and name.name.startswith(TEMPORARY_PREFIX) for name in names)


def test_a_temporary_name_never_exceeds_what_a_file_system_takes() -> None:
    assert len(temporary_beside(Path("x" * 250)).name) < 255


def test_segments_are_numbered_with_four_digits_and_more_when_they_must() -> None:
    assert segment_path(Path("task"), 7) == Path("task/segment-0007.h5")
    assert segment_path(Path("task"), 12345) == Path("task/segment-12345.h5")


def test_what_tasks_have_left_is_read_from_the_names_of_one_folder(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    assert stage.list_outcomes() == Outcomes()
    stage.outcomes.mkdir()
    for path in (
        stage.task(0).result,
        stage.task(0).error(1),
        stage.task(7).error(12),
        stage.task(7).error(2),
        stage.task(7).run(1),
        stage.task(7).run(12345),
        stage.task(12345).aside,
        stage.task(3).aside,
        stage.task(3).result,
        stage.outcomes / ".tmp-0123456789abcdef-0009.result.json",
        stage.outcomes / "notes.txt",
    ):
        path.touch()
    assert stage.list_outcomes() == Outcomes(
        done=frozenset({0, 3}),
        set_aside=frozenset({12345}),
        errors={0: (1,), 7: (2, 12)},
        runs={7: 12345},
    )


def test_every_task_s_files_begin_with_its_number() -> None:
    task = StageFolder(Path("label")).task(7)
    names = [path.name for path in (task.result, task.aside, task.error(2), task.run(3))]
    assert names == ["0007.result.json", "0007.aside.json", "0007.error-0002.json", "0007.run-0003.json"]
    assert {path.parent for path in (task.result, task.run(3))} == {Path("label/outcomes")}
    assert (task.index, task.path, task.lock) == (7, Path("label/tasks/0007"), Path("label/tasks/0007/lock"))

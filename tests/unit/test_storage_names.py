"""Names that storage gives to files."""

from __future__ import annotations

from pathlib import Path

from hpcft.storage.atomic import TEMPORARY_PREFIX, temporary_beside
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

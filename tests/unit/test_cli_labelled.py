"""What `hpcft label` says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.cli.labelled import show_labels
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder


@pytest.mark.parametrize(
    ("is_finished", "remedy"),
    [(False, "again: hpcft resume {run}\n"), (True, "again: hpcft retry {run} && hpcft resume {run}\n")],
)
def test_the_remedy_for_failures_is_one_that_works_where_the_run_stands(
    is_finished: bool, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With failures within the tolerated share the run is finished: resume would find nothing in progress."""
    folder = CampaignFolder(tmp_path / "run")
    stage = folder.stage(0, "label")
    stage.path.mkdir(parents=True)
    write_json(folder.identity, {"name": "run", "kind": "label", "rounds": 0})
    write_json(folder.exported, {"structures": 4, "done": 3, "failed": {"scf": 1}, "suspects": 0})
    if is_finished:
        write_json(stage.product, {"failed": 1})
    show_labels(folder)
    said = capsys.readouterr().out
    assert remedy.format(run=folder.root) in said
    assert f"hpcft retry {folder.root} --cause CAUSE --set" in said

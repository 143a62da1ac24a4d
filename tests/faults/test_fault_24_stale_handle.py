"""Fault 24: NFS calls a handle stale, for its file was replaced on the server: it is opened again by path, within bounds."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from one_stage import drive_to_end, labels_to_do
from shims import stale

# Writes twice, creates twice, reads and lists; an OSError ends it with its errno.
USE = """
import sys
from pathlib import Path
from hpcft.storage.atomic import create_json_once, read_json, write_json
from hpcft.storage.campaign_folder import StageFolder
stage = StageFolder(Path(sys.argv[1]))
try:
    for number in range(2):
        write_json(stage.plan, {"number": number})
        assert read_json(stage.plan) == {"number": number}
    print(*(create_json_once(stage.task(0).result, {"by": by}) for by in ("us", "another")))
    create_json_once(stage.intent(1), {})
    print(read_json(stage.task(0).result)["by"], set(stage.list_outcomes().done), [p.name for p in stage.intents()])
except OSError as error:
    print(error.errno)
"""
EXPECTED = "True False\nus {0} ['0001-intent.json']\n"
TRIES = 5


def use(folder: Path, environment: dict[str, str]) -> str:
    (folder / "outcomes").mkdir(parents=True)
    (folder / "attempts").mkdir()
    argv = [sys.executable, "-c", USE, str(folder)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("times", [1, TRIES - 1])
def test_files_are_written_once_read_and_listed_whichever_call_meets_a_stale_handle(
    times: int, tmp_path: Path
) -> None:
    """Guards `reopening` around each open, read, rename, link and listing of hpcft.storage: fails where one is left out."""
    trace = tmp_path / "trace"
    assert use(tmp_path / "sound", stale(tmp_path / "sound", trace=trace)) == EXPECTED
    calls = len(trace.read_text().splitlines())
    assert calls > 20
    for call in range(1, calls + 1, 1 if times == 1 else 7):
        folder = tmp_path / f"{call}"
        assert use(folder, stale(folder, call, times)) == EXPECTED, f"call {call} of {calls}"
        assert sorted(p.name for p in folder.rglob("*.json")) == [
            "0000.result.json",
            "0001-intent.json",
            "plan.json",
        ]
        assert not list(folder.rglob(".tmp-*")), f"call {call} of {calls}"


@pytest.mark.parametrize("only", ["plan.json", "outcomes", "attempts"])
def test_a_handle_that_stays_stale_is_an_error_after_a_few_tries(only: str, tmp_path: Path) -> None:
    """Guards the bound: a file system that is gone for good must not hang a manager."""
    trace, folder = tmp_path / "trace", tmp_path / "folder"
    told = use(folder, stale(folder, 1, 10**9, only=only, trace=trace))
    assert told.splitlines()[-1] == str(errno.ESTALE)
    assert len(trace.read_text().splitlines()) <= 2 * TRIES  # of one operation, which may be two calls


@pytest.mark.parametrize("every", [41, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(31, 41))])
def test_a_manager_drives_its_stage_through_stale_records(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the manager's turns: a stale record is no missing one, so nothing is submitted twice."""
    campaign = labels_to_do(tmp_path, monkeypatch)
    trace = tmp_path / "trace"
    only = ".json|/leases"
    drive_to_end(campaign.folder, 0, "reference", stale(campaign.root, every=every, only=only, trace=trace))
    assert len(trace.read_text().splitlines()) > every
    campaign.assert_undisturbed()

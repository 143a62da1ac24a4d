"""A whole campaign through sbatch on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import (
    assert_same_results,
    history_of,
    hpcft,
    hpcft_to_end,
    kill,
    submissions_of,
    write_campaign,
)

pytestmark = pytest.mark.slurm

SITE = Path(__file__).parents[2] / "site-configs" / "test-cluster.yaml"
ONE_ROUND = {"rounds": 1}


@pytest.fixture
def on_slurm(slurm_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in slurm_cluster.environment().items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


def jobs_of(root: Path) -> list[str]:
    """Ids of the campaign's jobs that Slurm has in its queue."""
    prefix = f"hpcft-{json.loads((root / 'campaign.json').read_text())['id']}-"
    queue = subprocess.run(
        ["squeue", "--me", "--noheader", "--array", "--format=%i %j"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split()[0] for line in queue.stdout.splitlines() if line.split()[1].startswith(prefix)]


def wait_for(path: Path, manager: subprocess.Popen[str]) -> None:
    while manager.poll() is None and not path.exists():
        time.sleep(0.2)


def wait_until_jobs_run(root: Path, manager: subprocess.Popen[str]) -> None:
    while manager.poll() is None and not ((root / "campaign.json").exists() and jobs_of(root)):
        time.sleep(0.2)


def attempts_at(root: Path, stage: str) -> int:
    """Recorded submissions of a stage. (A kill between intent and record leaves an intent, and no job that runs.)"""
    return sum(name.endswith("-submitted.json") for name in history_of(root, stage))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The campaign file, and the folder of its run on the local executor."""
    base = tmp_path_factory.mktemp("local")
    campaign = write_campaign(base / "inputs", ONE_ROUND)
    hpcft_to_end("run", campaign, "--dir", base / "campaign", cwd=base)
    return campaign, base / "campaign"


def test_the_same_campaign_gives_the_same_labels_and_the_same_model_bit_for_bit_on_slurm_and_locally(
    on_slurm: Any, local: tuple[Path, Path], tmp_path: Path
) -> None:
    campaign, expected = local
    root = tmp_path / "slurm"
    hpcft_to_end("run", campaign, "--dir", root, "--site", SITE, cwd=tmp_path)
    assert_same_results(expected, root)
    assert len(submissions_of(root)) == 10  # nothing was submitted twice


@pytest.mark.nightly
def test_a_killed_manager_s_jobs_are_adopted_cancelled_jobs_are_submitted_again_and_the_result_is_the_same(
    on_slurm: Any, local: tuple[Path, Path], tmp_path: Path
) -> None:
    campaign, expected = local
    root = tmp_path / "slurm"
    with (tmp_path / "log").open("w") as log:
        manager = hpcft("run", campaign, "--dir", root, "--site", SITE, cwd=tmp_path, output=log)
        wait_until_jobs_run(root, manager)
        kill([manager.pid])
        manager.wait()
        manager = hpcft("resume", root, cwd=tmp_path, output=log)
        wait_for(root / "round-001" / "explore" / "attempts" / "0001-submitted.json", manager)
        kill([manager.pid])
        manager.wait()
    assert attempts_at(root, "round-000/probe") == 1
    hpcft_to_end("cancel", root, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while jobs_of(root) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert jobs_of(root) == []
    hpcft_to_end("resume", root, cwd=tmp_path)
    assert_same_results(expected, root)
    assert json.loads(hpcft_to_end("status", root, "--json", cwd=tmp_path))["state"] == "finished"

"""slurmctld is gone for a while: what is known is shown with its age, nothing is decided, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_campaign import MakeCampaign, OnSlurm, is_waiting, wait_until
from tiny import hpcft, hpcft_to_end

from hpcft.storage.atomic import write_text

pytestmark = pytest.mark.slurm


@pytest.fixture
def mended(slurm_cluster: Any) -> Iterator[Any]:
    """The cluster, whose controller is up again in the end."""
    yield slurm_cluster
    slurm_cluster.up()


def records_of(root: Path) -> dict[Path, bytes]:
    """Every file below."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_jobs_that_were_held_when_the_controller_died_run_once_it_is_back_and_meanwhile_nothing_is_decided(
    campaign: OnSlurm, mended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if silence counts as an empty queue, if a submission that was recorded is not released later, or if `resume
    --once` or `status` take silence for an answer."""
    down = Path(__file__).parents[1] / "slurm" / "cluster" / "down"
    # The controller dies after sbatch and before the release.
    campaign.shim(
        monkeypatch,
        "scontrol",
        f'[ "$1" = release ] && [ ! -e "$base/died" ] && touch "$base/died" && {down} {mended.folder} slurmctld\n'
        'exec "$real" "$@"',
    )
    with campaign.managed() as manager:
        campaign.submit(manager)
        assert (campaign.base / "died").exists()
    before = records_of(campaign.here.path)
    state = json.loads(hpcft_to_end("status", campaign.root, "--json", cwd=campaign.base))
    assert (state["state"], state["queue"]["answers"]) == ("idle", False)
    assert "(Slurm does not answer)" in state["summary"]
    once = hpcft("resume", campaign.root, "--once", "--no-check", cwd=campaign.base)
    assert "nothing could be decided" in once.communicate()[0]
    assert once.returncode == 4
    assert records_of(campaign.here.path) == before
    mended.up()
    assert {state for _, state in campaign.jobs().values()} == {"PENDING"}
    campaign.finish_stage()
    assert len(campaign.arrays()) == 1
    campaign.assert_undisturbed()


def test_jobs_that_run_come_to_their_end_without_a_controller_and_count_once_it_is_back(
    campaign_on: MakeCampaign, mended: Any
) -> None:
    """Fails if a manager that cannot see its jobs takes them for lost, or `status` forgets what was seen last."""
    campaign = campaign_on(obedient=True)
    orders, outcomes = campaign.base / "orders", campaign.here.outcomes
    write_text(orders, "wait 0")
    with campaign.managed() as manager:
        campaign.submit(manager)
        wait_until(lambda: len(list(outcomes.glob("*.run-*"))) == 2, "both tasks run")
        manager.step()
        mended.down("slurmctld")
        turn = manager.step()
        assert is_waiting(turn)
        assert not turn.scheduler_answers
        state = json.loads(hpcft_to_end("status", campaign.root, "--json", cwd=campaign.base))
        assert state["queue"]["running"] == 2
        assert "2 running, as of " in state["summary"]
        write_text(orders, "go")  # at once: a task that reads half of it would obey nobody
        wait_until(lambda: len(list(outcomes.glob("*.result.json"))) == 2, "both tasks end")
        campaign.finish_stage(manager)  # for that nobody needs a controller
        mended.up()
    assert len(campaign.arrays()) == 1
    campaign.assert_undisturbed()

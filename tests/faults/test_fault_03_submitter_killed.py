"""The manager dies between a submission and its record: the next one adopts the jobs, or submits what never left."""

from __future__ import annotations

import json
import time

import pytest
from slurm_campaign import OnSlurm, command
from tiny import hpcft

from hpcft.campaign.decide import SETTLING_S, Adopt
from hpcft.storage.atomic import write_json

pytestmark = pytest.mark.slurm

KILL_MANAGER = "kill -9 $PPID\n"


def killed_manager(campaign: OnSlurm) -> None:
    """`hpcft resume` with a shim for sbatch that kills it."""
    write_json(campaign.folder.site, campaign.site.model_dump(mode="json"))
    with (campaign.base / "log").open("w") as log:
        manager = hpcft("resume", campaign.root, "--no-check", cwd=campaign.base, output=log)
        assert manager.wait() == -9, (campaign.base / "log").read_text()


def test_jobs_that_were_submitted_and_not_recorded_are_adopted_by_the_next_manager(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the intent is not on disk before sbatch, if the jobs are not held, or if they are not adopted."""
    campaign.shim(monkeypatch, "sbatch", f'"$real" "$@" > "$base/said"\n{KILL_MANAGER}')
    killed_manager(campaign)
    assert not campaign.here.submitted(1).exists()
    # Without their inputs, which submitit writes after sbatch, none of them may start.
    assert command("squeue", "--me", "-h", "-o", "%j %r") == f"{campaign.prefix}r0-reference-1 JobHeldUser"
    with campaign.managed() as manager:
        turns = campaign.finish_stage(manager)
    assert sum(isinstance(action, Adopt) for turn in turns for action in turn.actions) == 1
    assert len(campaign.calls("sbatch")) == len(campaign.arrays()) == 1
    [array] = campaign.arrays()
    assert array in (campaign.base / "said").read_text()
    campaign.assert_undisturbed()


def test_a_submission_of_which_only_the_intent_was_written_is_made_again_once(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an intent without a job counts as a submission for ever, or is made again before it has settled."""
    campaign.shim(monkeypatch, "sbatch", f'[ -e "$base/again" ] && exec "$real" "$@"\n{KILL_MANAGER}')
    killed_manager(campaign)
    at = float(json.loads(campaign.here.intent(1).read_text())["at"])
    (campaign.base / "again").touch()
    with campaign.managed() as manager:
        campaign.clock = lambda: at + SETTLING_S - 1
        manager.step()
        assert len(campaign.calls("sbatch")) == 1
        campaign.clock = lambda: max(time.time(), at + SETTLING_S)
        campaign.finish_stage(manager)
    assert len(campaign.calls("sbatch")) == 2
    assert list(campaign.arrays().values()) == [f"{campaign.prefix}r0-reference-2"]
    campaign.assert_undisturbed()


@pytest.mark.nightly
def test_of_two_submissions_of_one_attempt_none_runs_and_the_tasks_are_submitted_anew(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one of two is adopted at random, or if both are: they are held, and both are cancelled."""
    campaign.shim(
        monkeypatch,
        "sbatch",
        f'[ -e "$base/again" ] && exec "$real" "$@"\n"$real" "$@" > "$base/said"\n"$real" "$@" > "$base/said"\n'
        f"{KILL_MANAGER}",
    )
    killed_manager(campaign)
    (campaign.base / "again").touch()
    twins = list(campaign.arrays())
    assert len(twins) == 2
    campaign.clock = lambda: time.time() + SETTLING_S
    campaign.finish_stage()
    states = command("squeue", "-h", "--states=all", "-o", "%T", "-j", ",".join(twins)).split()
    assert set(states) == {"CANCELLED"}
    assert list(campaign.arrays().values()).count(f"{campaign.prefix}r0-reference-2") == 1
    campaign.assert_undisturbed()

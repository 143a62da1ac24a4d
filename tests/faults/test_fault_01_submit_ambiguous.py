"""sbatch fails, and nobody knows whether the jobs arrived: the queue is asked, and nothing is submitted blindly again."""

from __future__ import annotations

import time

import pytest
from slurm_campaign import OnSlurm, is_waiting, slurmctld_pid

from hpcft.campaign.decide import SETTLING_S, Adopt, Submit

pytestmark = pytest.mark.slurm

# The controller sleeps until sbatch has given up: the request lies in its socket, and is answered to nobody.
STOPPED = """
kill -STOP {pid}
"$real" "$@"; code=$?
kill -CONT {pid}
exit $code
"""
TIMED_OUT = (
    "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
)


def test_jobs_that_arrived_although_sbatch_timed_out_are_adopted_and_submitted_once(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if decide() submits an unconfirmed attempt again, or does not adopt what bears its name."""
    campaign.shim(monkeypatch, "sbatch", STOPPED.format(pid=slurmctld_pid()))
    with campaign.managed() as manager:
        manager.step()  # plans
        turn = manager.step()
        assert isinstance(turn.actions[0], Submit)
        assert "timed out" in turn.silence.lower()
        turns = campaign.finish_stage(manager)
    assert sum(isinstance(action, Adopt) for turn in turns for action in turn.actions) == 1
    assert (
        len(campaign.calls("sbatch")) == len(campaign.arrays()) == len(campaign.records("-intent.json")) == 1
    )
    campaign.assert_undisturbed()


def test_jobs_that_never_arrived_are_submitted_again_once_they_can_no_longer_show(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if decide() does not wait SETTLING_S for an unconfirmed submission to show, or waits for ever."""
    campaign.shim(monkeypatch, "sbatch", f'[ -e "$base/again" ] && exec "$real" "$@"\n{TIMED_OUT}')
    now = time.time()
    campaign.clock = lambda: now
    with campaign.managed() as manager:
        manager.step()
        assert manager.step().unconfirmed
        now += SETTLING_S - 1
        assert is_waiting(manager.step())
        assert len(campaign.calls("sbatch")) == 1
        (campaign.base / "again").touch()
        now += 1
        campaign.finish_stage(manager)
    assert len(campaign.calls("sbatch")) == 2
    assert list(campaign.arrays().values()) == [f"{campaign.prefix}r0-reference-2"]
    campaign.assert_undisturbed()

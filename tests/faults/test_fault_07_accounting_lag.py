"""sacct does not know yet how a job has ended: that is unknown, with a deadline."""

from __future__ import annotations

import time

import pytest
from slurm_campaign import OnSlurm, is_waiting, wait_until

pytestmark = pytest.mark.slurm


def test_an_end_is_unknown_while_accounting_lags_and_lost_once_the_deadline_has_passed(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an empty answer of sacct counts as an end or starts a new attempt at once, or is waited out for ever."""
    silent = campaign.base / "silent"
    campaign.shim(monkeypatch, "sacct", f'[ ! -e {silent} ] || exit 0\nexec "$real" "$@"')
    silent.touch()
    campaign.fail_element(0)
    campaign.fail_element("single")
    with campaign.managed() as manager:
        campaign.submit(manager)
        wait_until(lambda: not campaign.jobs(states="pending,running,completing"), "all jobs are over")
        turns = campaign.step_until(manager, lambda: len(campaign.calls("sacct")) > 2, "sacct is asked again")
        assert all(map(is_waiting, turns))
        silent.unlink()
        campaign.submit(manager, attempt=2)
        assert campaign.endings() == {(0, 1): "failed"}
        [ending] = campaign.records(r"/ended-\d+\.json$")
        assert ending["tasks"]["0"]["detail"] == "exit code 7:0"

        silent.touch()
        jobs = campaign.job_ids(attempt=2)
        wait_until(lambda: campaign.jobs()[jobs[0]][1] == "FAILED", "the second attempt has failed")
        campaign.fail_element("single", fails=False)
        manager.step()
        start = time.monotonic()
        manager.scheduler._clock = lambda: start + 30 * (time.monotonic() - start)
        campaign.finish_stage(manager)
    assert campaign.endings() == {(0, 1): "failed", (0, 2): "lost"}
    assert len(campaign.arrays()) == 3
    campaign.assert_undisturbed()

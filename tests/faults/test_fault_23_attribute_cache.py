"""Fault 23: results reach the manager's node late, for it keeps names and attributes of files: it waits, within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_stage import drive_to_end
from shims import late_by
from slurm_campaign import OnSlurm

from hpcft.campaign.decide import GONE_S, UNEXPLAINED_S
from hpcft.storage.atomic import write_json

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize("delay_s", [GONE_S + 3, pytest.param(UNEXPLAINED_S - 10, marks=pytest.mark.nightly)])
def test_a_result_that_shows_long_after_its_job_has_left_the_queue_still_counts(
    delay_s: float, campaign: OnSlurm, tmp_path: Path
) -> None:
    """Guards the time for which a job that completed is not called lost: fails if a task runs again, or its end is noted.

    Both jobs are over in a second or two; for the rest of the delay there is neither a job nor a result.
    """
    write_json(campaign.folder.site, campaign.site.model_dump(mode="json"))
    trace = tmp_path / "trace"
    drive_to_end(campaign.folder, 0, "reference", late_by(delay_s, campaign.root, trace))
    late = trace.read_text()
    for task in range(2):
        assert f"outcomes/{task:04d}.result.json" in late
    assert campaign.endings() == {}
    campaign.assert_undisturbed()


@pytest.mark.nightly
def test_a_result_that_never_comes_is_not_waited_for_forever(campaign: OnSlurm) -> None:
    """Guards the bound: a job that ends without a result is called what it is, and its task is tried again."""
    campaign.fail_element(0)
    with campaign.managed() as manager:
        campaign.step_until(manager, campaign.endings, "an ending is noted")
        campaign.fail_element(0, fails=False)
        campaign.finish_stage(manager)
    assert campaign.endings() == {(0, 1): "failed"}
    campaign.assert_undisturbed()

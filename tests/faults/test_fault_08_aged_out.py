"""Slurm has forgotten the jobs: the tasks' own records say what is done, and accounting how the rest has ended."""

from __future__ import annotations

from typing import Any

import pytest
from slurm_campaign import OnSlurm, reconfigured, wait_until

from hpcft.cluster.slurm import job_is_over

pytestmark = pytest.mark.slurm

# Forgotten jobs are not shown, whatever one asks for.
FORGETFUL = """
wanted=()
for word; do [ -e "$base/remembers" ] || [ "$word" != --states=all ] && wanted+=("$word"); done
exec "$real" "${wanted[@]}"
"""


def submit_and_look_away(campaign: OnSlurm) -> None:
    """One of the two tasks ends with its result, the other one fails without a word, and no manager sees it."""
    campaign.fail_element(1)
    with campaign.managed() as manager:
        campaign.submit(manager)
    wait_until(lambda: not campaign.jobs(states="pending,running,completing"), "both jobs are over")
    campaign.fail_element(1, fails=False)


def assert_only_the_failed_task_ran_again(campaign: OnSlurm) -> None:
    assert campaign.endings() == {(1, 1): "failed"}
    assert [intent["tasks"] for intent in campaign.records("-intent.json")] == [[0, 1], [1]]
    campaign.assert_undisturbed()


def test_jobs_that_are_shown_no_more_are_done_where_there_is_a_result_and_tried_again_where_there_is_none(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a job that squeue does not show counts as a task to do, or as a task that is done."""
    submit_and_look_away(campaign)
    campaign.shim(monkeypatch, "squeue", FORGETFUL)
    assert campaign.jobs() == {}
    campaign.finish_stage()
    assert_only_the_failed_task_ran_again(campaign)


@pytest.mark.nightly
def test_jobs_that_slurm_has_forgotten_are_done_where_there_is_a_result_and_tried_again_where_there_is_none(
    campaign: OnSlurm, slurm_cluster: Any
) -> None:
    """As above, with a real controller's memory; fails too if `Invalid job id` counts as a job that may still run."""
    with reconfigured(slurm_cluster, "MinJobAge=5"):
        submit_and_look_away(campaign)
        [array] = campaign.arrays()
        wait_until(lambda: not campaign.jobs(), "Slurm has forgotten the jobs")
        assert job_is_over(array)
        campaign.finish_stage()
    assert_only_the_failed_task_ran_again(campaign)

"""A limit on the jobs that one may submit: work is fed in as there is room, and a refusal is not an end."""

from __future__ import annotations

import time

import pytest
from slurm_campaign import MakeCampaign, OnSlurm, command, wait_until

pytestmark = pytest.mark.slurm

TINY = {"partition": "gpu", "qos": "tiny"}  # at most 4 jobs submitted, 2 running
COUNT_REFUSALS = '"$real" "$@"; code=$?; echo $code >> "$base/codes"; exit $code'


def other_jobs(campaign: OnSlurm, count: int) -> None:
    """Jobs of the same user that take places and never start; they go with the campaign's own."""
    wait_until(lambda: not command("squeue", "--me", "-h"), "the jobs of earlier tests are gone")
    name = f"--job-name={campaign.prefix}other"
    for _ in range(count):
        command("sbatch", "--hold", "--qos=tiny", "--partition=gpu", name, "--wrap=true")


def test_a_known_limit_is_never_run_into_and_other_jobs_count_towards_it(
    campaign_on: MakeCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the QOS's limit is not read, if other jobs of the user are not counted, or if the rest never follows."""
    campaign = campaign_on(tasks=4, slurm=TINY)
    other_jobs(campaign, 1)
    campaign.shim(monkeypatch, "sbatch", COUNT_REFUSALS)
    campaign.finish_stage()
    assert set((campaign.base / "codes").read_text().split()) == {"0"}
    assert len(campaign.records("0001-intent.json")[0]["tasks"]) == 3  # 4 - 1 other
    assert campaign.records("-rejected.json") == []
    campaign.assert_undisturbed()


def test_a_limit_that_nobody_tells_is_found_by_asking_for_less_and_later(
    campaign_on: MakeCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if Slurm's `too many` stops the campaign, costs a task an attempt, or is asked again without a pause."""
    campaign = campaign_on(tasks=4, slurm=TINY)
    other_jobs(campaign, 2)
    campaign.shim(monkeypatch, "sacctmgr", "exit 1")
    campaign.shim(monkeypatch, "sbatch", COUNT_REFUSALS)
    start = time.time()
    campaign.clock = lambda: start + 10 * (time.time() - start)  # pauses pass ten times as fast
    campaign.finish_stage()
    rejections = campaign.records("-rejected.json")
    assert rejections and all(rejection["limit"] for rejection in rejections)
    assert len(campaign.calls("sbatch")) == len(campaign.records("-intent.json"))
    assert len(campaign.records("-submitted.json")) + len(rejections) == len(campaign.calls("sbatch"))
    assert campaign.endings() == {}
    campaign.assert_undisturbed()

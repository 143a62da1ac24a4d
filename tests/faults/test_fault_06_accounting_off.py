"""A site without accounting: squeue and the tasks' own records suffice, and nobody asks sacct to say more."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from slurm_campaign import OnSlurm, command, reconfigured, wait_until

pytestmark = pytest.mark.slurm


def test_a_stage_with_a_cancelled_and_a_failed_job_ends_as_if_undisturbed_without_accounting(
    campaign: OnSlurm, slurm_cluster: Any
) -> None:
    """Fails if sacct's failure counts as silence of Slurm, or an end that only sacct could explain is waited for for ever."""
    none = ("AccountingStorageType=accounting_storage/none", "AccountingStorageTRES=cpu")
    with reconfigured(slurm_cluster, *none), campaign.managed() as manager:
        assert subprocess.run(["sacct"], capture_output=True, check=False).returncode == 1
        # Nobody knows how the job that fails has ended: waiting for it passes thirty times as fast.
        manager.scheduler._clock = lambda: 30 * time.monotonic()
        campaign.gate.touch()
        campaign.fail_element(0)
        campaign.submit(manager)
        wait_until(lambda: len(campaign.jobs(states="running")) == 2, "both jobs run")
        command("scancel", campaign.job_ids()[1])
        campaign.gate.unlink()
        campaign.step_until(manager, lambda: len(campaign.endings()) == 2, "both ends are written down")
        campaign.fail_element(0, fails=False)
        campaign.finish_stage(manager)
        assert campaign.endings() == {(0, 1): "lost", (1, 1): "cancelled"}
        campaign.assert_undisturbed()

"""A site without accounting: squeue and the tasks' own records suffice, and nobody asks sacct to say more."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from slurm_campaign import OnSlurm, command, reconfigured

pytestmark = pytest.mark.slurm


def test_a_stage_with_a_cancelled_and_a_failed_job_ends_as_if_undisturbed_without_accounting(
    campaign: OnSlurm, slurm_cluster: Any
) -> None:
    """Fails if sacct's failure counts as silence of Slurm, or an end that only sacct could explain is waited for for ever."""
    none = ("AccountingStorageType=accounting_storage/none", "AccountingStorageEnforce=none")
    with reconfigured(slurm_cluster, *none), campaign.managed() as manager:
        assert subprocess.run(["sacct"], capture_output=True, check=False).returncode == 1
        # Nobody knows how the job that fails has ended: waiting for it passes thirty times as fast.
        manager.scheduler._clock = lambda: 30 * time.monotonic()
        campaign.fail_element(0)
        release, manager.scheduler.release = manager.scheduler.release, lambda job_ids: None  # type: ignore[method-assign]
        campaign.submit(manager)
        [array] = campaign.arrays()
        command("scancel", f"{array}_1")
        manager.scheduler.release = release  # type: ignore[method-assign]
        campaign.step_until(manager, lambda: len(campaign.endings()) == 2, "both ends are written down")
        campaign.fail_element(0, fails=False)
        campaign.finish_stage(manager)
        assert campaign.endings() == {(0, 1): "lost", (1, 1): "cancelled"}
        campaign.assert_undisturbed()

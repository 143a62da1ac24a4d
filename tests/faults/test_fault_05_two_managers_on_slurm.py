"""Two managers of which one is a controller job, and leases of jobs: Slurm says which of them are over."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from slurm_campaign import OnSlurm, command, wait_until

from hpcft.campaign.controllers import newest_controller
from hpcft.campaign.detached import submit_controller
from hpcft.campaign.lease import holder, is_mine, lease
from hpcft.cli.drive import drive_and_leave
from hpcft.cluster.slurm import job_is_over
from hpcft.errors import LeaseHeld

pytestmark = pytest.mark.slurm


def write_lease_of_job(leases: Path, job: str) -> None:
    """As a controller on another host would have left it."""
    leases.mkdir()
    content = {
        "host": "n1.example",
        "pid": 1,
        "boot": "",
        "process_started": 0,
        "job": job,
        "at": time.time(),
    }
    (leases / "000001.json").write_text(json.dumps(content))


def job(command_line: str) -> str:
    return command("sbatch", "--parsable", "--output=/dev/null", "--partition=gpu", f"--wrap={command_line}")


@pytest.mark.usefixtures("campaign")
def test_the_lease_of_a_job_is_refused_while_that_job_runs_and_taken_once_it_is_over(tmp_path: Path) -> None:
    """Fails if only processes of this host can be told from dead ones, or if a live controller's lease is taken."""
    running, unknown = job("sleep 600"), "999999"
    wait_until(lambda: command("squeue", "-h", "-o", "%T", "-j", running) == "RUNNING", "the job runs")
    try:
        write_lease_of_job(tmp_path / "running", running)
        with (
            pytest.raises(LeaseHeld, match=rf"process 1 on n1.example \(job {running}\)"),
            lease(tmp_path / "running", job_is_over=job_is_over),
        ):
            pass
    finally:
        command("scancel", running)
    wait_until(lambda: job_is_over(running), "the job is over")
    write_lease_of_job(tmp_path / "unknown", unknown)
    for leases in (tmp_path / "running", tmp_path / "unknown"):
        with lease(leases, job_is_over=job_is_over):
            assert is_mine(leases)


def test_a_manager_refuses_and_names_the_controller_job_that_is_at_work(
    campaign: OnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a controller takes no lease, or its lease counts as dead because it is a job's."""
    campaign.gate.touch()
    hang = campaign.base / "hang"
    hang.touch()
    campaign.shim(
        monkeypatch,
        "squeue",
        f'[ -z "$SLURM_JOB_ID" ] || while [ -e {hang} ]; do sleep 0.1; done\nexec "$real" "$@"',
    )
    job_id = drive_and_leave(campaign.folder, campaign.site, False)
    assert job_id is not None
    command("scontrol", "update", f"jobid={job_id}", "dependency=")  # it need not wait for the tasks
    leases = campaign.folder.leases
    wait_until(lambda: (holder(leases) or {}).get("job") == job_id, "the controller is at work")
    with pytest.raises(LeaseHeld, match=rf"process \d+ on {socket.gethostname()} \(job {job_id}\)"):
        drive_and_leave(campaign.folder, campaign.site, False, resumed=True)
    hang.unlink()
    wait_until(lambda: job_is_over(job_id), "the controller has done its part")
    second = newest_controller(campaign.folder)
    assert second is not None
    assert (second.number, second.over) == (2, None)
    assert len(campaign.arrays()) == 1


def test_a_controller_that_starts_beside_a_manager_waits_for_its_end_and_goes_on(campaign: OnSlurm) -> None:
    """Fails if a controller drives beside a manager, or gives up while there is one and leaves the campaign to nobody."""
    campaign.gate.touch()
    with campaign.managed() as manager:
        campaign.submit(manager)
        job_id = submit_controller(manager, [])
        wait_until(lambda: campaign.jobs("controller-")[job_id][1] == "RUNNING", "the controller runs")
        manager.step()
        assert (holder(campaign.folder.leases) or {})["pid"] == os.getpid()
        assert newest_controller(campaign.folder).number == 1  # type: ignore[union-attr]
    wait_until(lambda: job_is_over(job_id), "the controller has done its part")
    second = newest_controller(campaign.folder)
    assert second is not None
    assert (second.number, second.over) == (2, None)
    assert len(campaign.arrays()) == 1

"""A campaign that is left to Slurm: controllers follow each other, a lost one is noticed, and one can go back and forth."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_campaign import MakeCampaign, OnSlurm, command, wait_until
from tiny import assert_same_results, hpcft, hpcft_to_end, processes_of, write_campaign

from hpcft.campaign.controllers import newest_controller
from hpcft.campaign.status import describe
from hpcft.campaign.tidy import is_tidy
from hpcft.cli.drive import drive_and_leave
from hpcft.storage.atomic import write_json

pytestmark = pytest.mark.slurm

TINY = {"partition": "gpu", "qos": "tiny"}  # at most 4 jobs submitted, 2 running


def controller_of(campaign: OnSlurm) -> Any:
    controller = newest_controller(campaign.folder)
    assert controller is not None
    return controller


def controllers_in_queue(campaign: OnSlurm) -> dict[str, str]:
    """Name of each controller that waits or runs, by its job."""
    jobs = campaign.jobs("controller-", states="pending,running")
    return {job: name for job, (name, _) in jobs.items()}


def outside_of_jobs(root: Path) -> list[int]:
    """The campaign's processes that no job has started, such as a manager on the login node."""
    found = []
    for pid in processes_of(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            of_job = any("slurmstepd" in parent.name() for parent in process.parents())
            # One that is dying may have lost its parents; its environment still tells.
            if not of_job and "SLURM_JOB_ID" not in process.environ() and process.is_running():
                found.append(pid)
    return found


def leave(campaign: OnSlurm, *, resumed: bool = False) -> str:
    """`hpcft submit`; the controller's job."""
    job = drive_and_leave(campaign.folder, campaign.site, False, resumed=resumed)
    assert job is not None
    return job


def lose_controller(campaign: OnSlurm) -> None:
    """Cancel it behind hpcft's back, a while after it was submitted."""
    command("scancel", str(controller_of(campaign).job_id))
    intent = campaign.folder.controllers / f"{controller_of(campaign).number:04d}-intent.json"
    intent.write_text(json.dumps({**json.loads(intent.read_text()), "at": 0.0}))


def test_controllers_alone_take_a_stage_to_its_end_within_a_limit_on_submitted_jobs(
    campaign_on: MakeCampaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if controllers do not find or leave each other, submit from inside a job in vain, or want more places than
    there are."""
    campaign = campaign_on(tasks=4, slurm=TINY)
    campaign.shim(monkeypatch, "sbatch", '"$real" "$@"; code=$?; echo $code >> "$base/codes"; exit $code')
    write_json(campaign.folder.site, campaign.site.model_dump(mode="json"))
    said = hpcft_to_end("submit", campaign.root, cwd=tmp_path)
    assert f"controller job {controller_of(campaign).job_id} goes on" in said
    assert outside_of_jobs(campaign.root) == []
    wait_until(campaign.here.product.exists, "the controllers have finished the stage")
    wait_until(campaign.folder.stage(0, "evaluate").submitted(1).exists, "they go on to the next one")
    wait_until(lambda: is_tidy(campaign.here), "and have packed this one")
    assert set((campaign.base / "codes").read_text().split()) == {"0"}
    assert len(campaign.records("-intent.json")) == 2
    assert campaign.records("-rejected.json") == []
    campaign.assert_undisturbed()


def test_a_lost_controller_is_noticed_by_status_and_mended_by_submit_and_by_resume(campaign: OnSlurm) -> None:
    """Fails if `status` trusts the record of a controller, or if mending submits tasks again or leaves two controllers."""
    campaign.gate.touch()
    leave(campaign)
    assert describe(campaign.folder)["state"] == "detached"
    lose_controller(campaign)
    state = describe(campaign.folder)
    assert state["state"] == "idle"
    assert "is lost (CANCELLED)" in state["problems"][0]

    second = leave(campaign, resumed=True)
    assert describe(campaign.folder)["state"] == "detached"
    assert controllers_in_queue(campaign) == {second: f"{campaign.prefix}controller-2"}
    lose_controller(campaign)
    with campaign.managed(resumed=True) as manager:
        campaign.gate.unlink()
        campaign.finish_stage(manager)
    assert describe(campaign.folder)["problems"] == []
    assert len(campaign.arrays()) == 1
    campaign.assert_undisturbed()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGHUP])
def test_from_the_foreground_to_a_controller_and_back_no_job_is_lost_and_none_is_submitted_twice(
    campaign: OnSlurm, end: signal.Signals
) -> None:
    """Fails if Ctrl-C or a lost terminal takes jobs along, SIGHUP leaves no controller, or `resume` leaves two drivers."""
    campaign.gate.touch()
    write_json(campaign.folder.site, campaign.site.model_dump(mode="json"))
    with (campaign.base / "log").open("w") as log:
        manager = hpcft("resume", campaign.root, "--no-check", cwd=campaign.base, output=log)
        wait_until(lambda: len(campaign.jobs(states="running")) == 2, "both jobs run")
        manager.send_signal(end)
        code = manager.wait()
    if end == signal.SIGINT:
        assert code == 130
        assert "the jobs on Slurm go on" in (campaign.base / "log").read_text()
        leave(campaign, resumed=True)
    else:
        assert code == 0
        assert f"controller job {controller_of(campaign).job_id} goes on" in campaign.folder.log.read_text()
    assert list(controllers_in_queue(campaign)) == [controller_of(campaign).job_id]
    with campaign.managed(resumed=True) as foreground:
        assert controllers_in_queue(campaign) == {}
        assert "in the foreground has taken its place" in controller_of(campaign).over
        campaign.gate.unlink()
        campaign.finish_stage(foreground)
    assert len(campaign.arrays()) == 1
    campaign.assert_undisturbed()


@pytest.mark.nightly
def test_a_detached_campaign_comes_to_its_end_with_no_process_here_and_the_bits_of_a_local_run(
    campaign_on: MakeCampaign, tmp_path: Path
) -> None:
    """Fails if any stage needs a manager outside of Slurm, or runs otherwise when a controller has submitted it."""
    site = Path(__file__).parents[2] / "site-configs" / "test-cluster.yaml"
    file = write_campaign(tmp_path / "inputs", {"rounds": 1})
    hpcft_to_end("run", file, "--dir", tmp_path / "local", cwd=tmp_path)
    root = tmp_path / "detached"
    hpcft_to_end("submit", file, "--dir", root, "--site", site, cwd=tmp_path)

    def finished() -> bool:
        assert outside_of_jobs(root) == []
        return (root / "round-001" / "evaluate" / "product.json").exists()

    wait_until(finished, "the campaign is finished", deadline_s=1800)
    assert json.loads(hpcft_to_end("status", root, "--json", cwd=tmp_path))["state"] == "finished"
    assert_same_results(tmp_path / "local", root)

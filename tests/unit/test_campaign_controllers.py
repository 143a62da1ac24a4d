"""Controller jobs of a detached campaign: one at a time, and none lost without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import RUNNING, Clock, FakeSlurm, install, lines, new_manager, probe, small_campaign

from hpcft.campaign import controllers, detached
from hpcft.campaign.controllers import detached_state, dismiss_controller, lost_controller, newest_controller
from hpcft.campaign.detached import drive_detached, require_slurm, run_controller
from hpcft.campaign.lease import lease
from hpcft.campaign.manager import Manager
from hpcft.config.site import default_site
from hpcft.errors import CampaignStopped, LeaseHeld, SchedulerUnavailable, UserError
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder

NAME = "hpcft-0123abcd-controller-{}"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CampaignFolder]:
    with small_campaign(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
def slurm(tmp_path: Path, folder: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, probe(folder).attempts, monkeypatch)


@pytest.fixture
def manager(folder: CampaignFolder, slurm: FakeSlurm) -> Manager:
    slurm.shows(*lines(RUNNING, RUNNING))
    return new_manager(folder, Clock())


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long after the submission."""
    monkeypatch.setattr(controllers, "_SETTLING_S", 0.0)


def script_of(folder: CampaignFolder, number: int) -> str:
    [script] = (folder.controllers / f"{number:04d}-jobs").glob("*_submission.sh")
    return script.read_text()


def test_a_detached_campaign_leaves_its_jobs_and_a_controller_that_waits_for_all_of_them(
    folder: CampaignFolder, manager: Manager
) -> None:
    assert drive_detached(manager) == "813"
    script = script_of(folder, 1)
    assert "#SBATCH --dependency=afterany:812\n" in script
    assert "#SBATCH --hold" not in script
    assert f"#SBATCH --job-name={NAME.format(1)}\n" in script
    assert "srun" not in script  # steps may not submit jobs on some sites
    state = detached_state(folder)
    assert state is not None
    assert (state["number"], state["job_id"], state["over"]) == (1, "813", None)


def test_a_refused_controller_stops_the_campaign_with_slurms_words(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    manager.step(), manager.step()
    slurm.fails("sbatch: error: Batch job submission failed: Invalid qos specification")
    with pytest.raises(CampaignStopped, match="Invalid qos specification"):
        drive_detached(manager)
    controller = newest_controller(folder)
    assert controller is not None
    assert controller.over == "Slurm refused it"


def test_a_lost_controller_is_noticed_and_a_silent_slurm_loses_nobody(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, settled: None
) -> None:
    drive_detached(manager)
    slurm.shows(f"813|{NAME.format(1)}|PENDING|Dependency")
    assert lost_controller(folder) is None
    slurm.shows(f"813|{NAME.format(1)}|CANCELLED|None")
    assert "controller job 813 of this detached campaign is lost (CANCELLED)" in str(lost_controller(folder))
    slurm.shows(f"813|{NAME.format(1)}|PENDING|DependencyNeverSatisfied")
    assert "DependencyNeverSatisfied" in str(lost_controller(folder))
    slurm.shows(f"814|{NAME.format(11)}|RUNNING|None")  # its name begins with ours
    assert "(gone)" in str(lost_controller(folder))
    slurm.is_down(True)
    with pytest.raises(SchedulerUnavailable):
        lost_controller(folder)


def test_a_dismissed_controller_is_cancelled_and_does_nothing_should_it_start_after_all(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    drive_detached(manager)
    slurm.log()
    slurm.shows(f"813|{NAME.format(1)}|PENDING|Dependency")
    dismiss_controller(folder)
    assert slurm.commands() == ["scancel 813"]
    assert detached_state(folder) is None
    assert run_controller(str(folder.root), 1) == "superseded"


def test_of_two_controllers_only_the_newest_goes_on(folder: CampaignFolder, manager: Manager) -> None:
    drive_detached(manager)
    drive_detached(manager)
    assert run_controller(str(folder.root), 1) == "superseded"


def test_old_controllers_leave_their_words_and_no_files(folder: CampaignFolder, manager: Manager) -> None:
    drive_detached(manager)
    (folder.controllers / "0001-jobs" / "813_0_log.out").write_text("what the first one said\n")
    drive_detached(manager)
    drive_detached(manager)
    assert {path.name[:4] for path in folder.controllers.iterdir()} == {"0002", "0003"}
    assert "what the first one said" in folder.log.read_text()


def test_a_controller_that_finds_another_manager_at_work_looks_again_later(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should that manager have been about to leave, nobody would go on."""
    monkeypatch.setattr(detached, "_LEAST_S", 0.0)
    monkeypatch.setattr(detached, "_RESERVE_S", 1e9)
    monkeypatch.setattr(detached, "_LEASE_POLL_S", 0.0)
    drive_detached(manager)
    assert run_controller(str(folder.root), 1) == "controller job 814 follows"
    assert "#SBATCH --begin=now+600\n" in script_of(folder, 2)


def test_a_higher_number_whose_submission_never_happened_is_no_successor(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier execution of the same job was killed before its sbatch, and the job was requeued."""
    monkeypatch.setattr(detached, "_LEAST_S", 0.0)
    monkeypatch.setattr(detached, "_RESERVE_S", 1e9)
    monkeypatch.setattr(detached, "_LEASE_POLL_S", 0.0)
    drive_detached(manager)
    write_json(folder.controllers / "0002-intent.json", {"job_name": NAME.format(2), "at": 0.0})
    slurm.shows(f"814|{NAME.format(2)}|PENDING|Dependency||")
    assert run_controller(str(folder.root), 1) == "superseded"
    slurm.shows()
    assert run_controller(str(folder.root), 1) == "controller job 814 follows"


def test_a_campaign_on_this_machine_cannot_be_left_to_slurm() -> None:
    with pytest.raises(UserError, match="use hpcft run"):
        require_slurm(default_site())


def test_a_lease_held_by_a_job_that_is_over_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    taken = lease(tmp_path)
    taken.__enter__()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setattr("socket.gethostname", lambda: "n2")
    with pytest.raises(LeaseHeld, match=r"on n1 \(job 77\)"), lease(tmp_path, job_is_over=lambda job: False):
        pass
    with lease(tmp_path, job_is_over=lambda job: job == "77"):
        pass


def test_tasks_that_wait_for_room_are_followed_up_when_the_oldest_array_is_over(
    folder: CampaignFolder, slurm: FakeSlurm
) -> None:
    manager = new_manager(folder, Clock(), max_array_size=1, max_submitted=2)
    manager.leaves_controller = True
    manager.step(), manager.step()
    slurm.shows(*[line.replace("812_0", "812") for line in lines(RUNNING)])
    assert drive_detached(manager) == "813"
    assert "#SBATCH --dependency=afterany:812\n" in script_of(folder, 1)


@pytest.mark.parametrize("can_write", [True, False])
def test_the_last_controller_leaves_the_figure_and_does_not_fail_where_it_cannot(
    can_write: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_campaign(tmp_path / "done") as folder:  # nobody holds its lease afterwards
        install(tmp_path, probe(folder).attempts, monkeypatch).shows(*lines(RUNNING, RUNNING))
        drive_detached(new_manager(folder, Clock()))
    counts = {"failed": 0, "relaxations": 0, "frames_done": 0, "frames": 0, "stopped": {}}
    for round_, stage in folder.places():
        where = folder.stage(round_, stage)
        where.path.mkdir(parents=True, exist_ok=True)
        write_json(where.plan, {"tasks": [{}]})
        write_json(where.product, {"tasks": 1, "metrics": {}, **counts})
    if not can_write:
        folder.report.write_text("a file in its place")
    assert run_controller(str(folder.root), 1) == "the campaign is finished"
    assert (folder.report / "bias.png").exists() == can_write
    assert ("no figure was written: " in capsys.readouterr().out) != can_write

"""The manager's turns, with programs on PATH that stand for Slurm and remember what they were asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ase.build import bulk

from hpcft.campaign.decide import SETTLING_S, CancelStrays, Collect, Finish, Limits, Submit, Wait
from hpcft.campaign.lease import lease
from hpcft.campaign.manager import Manager, Turn, record_resume
from hpcft.campaign.records import Attempt, StageRecord, read_records
from hpcft.campaign.settings import campaign_of, site_of
from hpcft.config.campaign import Campaign
from hpcft.config.site import Site
from hpcft.errors import CampaignStopped, LeaseHeld, SchedulerUnavailable, UserError
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import RETRY_FAILURES, CampaignFolder, StageFolder, stages_of
from hpcft.storage.structures import write_structures

CONFIG = {
    "name": "small",
    "rounds": 1,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10},
    "select": {"frames": 1},
    "train": {"epochs": 1},
    "probe": {"steps": 10, "frames": 1, "tasks": 2},
    "max_attempts": 2,
}
SITE = {
    "name": "cluster",
    "executor": "slurm",
    "slurm": {"partition": "cpu", "max_array_size": 10},
    "poll_s": 7.0,
}
NAME = "hpcft-0123abcd-r0-probe-{}"

# Each program notes its arguments and the records that stand at that moment; `fail` and `queue` are files of the test.
PROGRAM = """#!/bin/sh
cd "{slurm}"
echo "$(basename "$0") $* [$(ls {attempts} 2>/dev/null | grep json | tr '\\n' ' ')]" >> log
{then}
"""
SBATCH = 'n=$(cat next); echo $((n+1)) > next; test -e fail && { cat fail >&2; exit 1; }; echo "Submitted batch job $n"'
SQUEUE = "test -e down && { echo 'Unable to contact slurm controller' >&2; exit 1; }; cat queue"


@dataclass
class Slurm:
    """What the programs on PATH read and write."""

    folder: Path

    def log(self) -> list[str]:
        """The commands since the last look, each with the records that stood then."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("squeue")]

    def shows(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def fails(self, words: str | None) -> None:
        (self.folder / "fail").unlink(missing_ok=True)
        if words is not None:
            (self.folder / "fail").write_text(words)

    def is_down(self, down: bool) -> None:
        (self.folder / "down").unlink(missing_ok=True)
        if down:
            (self.folder / "down").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CampaignFolder]:
    """A new campaign with four replicas, whose lease this process holds."""
    folder = CampaignFolder(tmp_path / "small")
    folder.inputs.mkdir(parents=True)
    config = Campaign.model_validate(CONFIG).model_dump(mode="json")
    write_json(folder.identity, {"id": "0123abcd", "name": "small", "rounds": 1, "config": config})
    write_structures(folder.inputs / "structures.h5", [bulk("Cu")] * 4)
    with lease(folder.leases):
        yield folder


@pytest.fixture
def slurm(folder: CampaignFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm, programs = Slurm(tmp_path / "slurm"), tmp_path / "bin"
    for path in (slurm.folder, programs):
        path.mkdir()
    attempts = probe(folder).path / "attempts"
    for name, then in {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": "", "scancel": "", "srun": ""}.items():
        (programs / name).write_text(PROGRAM.format(slurm=slurm.folder, attempts=attempts, then=then))
        (programs / name).chmod(0o755)
    (slurm.folder / "next").write_text("812")
    slurm.shows()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return slurm


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(folder: CampaignFolder, slurm: Slurm, clock: Clock) -> Manager:
    return new_manager(folder, clock)


def new_manager(folder: CampaignFolder, clock: Clock) -> Manager:
    def sleep(seconds: float) -> None:
        clock.now += seconds

    return Manager(folder, Site.model_validate(SITE), clock=clock, sleep=sleep)


def probe(folder: CampaignFolder) -> StageFolder:
    return folder.stage(0, "probe")


def finish(folder: CampaignFolder, *tasks: int) -> None:
    for task in tasks:
        probe(folder).task(task).path.mkdir(parents=True, exist_ok=True)
        write_json(probe(folder).task(task).result, {"to_label": 3, "stopped": {str(task): "exploded"}})


def turns(manager: Manager, count: int) -> list[Turn]:
    return [manager.step() for _ in range(count)]


def attempts(folder: CampaignFolder) -> tuple[Attempt, ...]:
    stage = read_records(folder).current
    assert stage is not None
    return stage.attempts


def test_a_stage_is_planned_submitted_and_collected_and_all_of_it_reads_back(
    folder: CampaignFolder, manager: Manager, slurm: Slurm
) -> None:
    manager.step()
    stage = read_records(folder).current
    assert stage is not None
    assert (stage.round, stage.name, stage.num_tasks) == (0, "probe", 2)
    assert json.loads(probe(folder).plan.read_text()) == {
        "tasks": [{"replicas": [0, 1], "relaxations": []}, {"replicas": [2, 3], "relaxations": []}]
    }
    assert slurm.log() == []

    assert manager.step().actions == (Submit(0, "probe", (0, 1), 1),)
    ids = {0: "812_0", 1: "812_1"}
    assert attempts(folder) == (Attempt(1, (0, 1), NAME.format(1), 1000.0, ids),)

    slurm.shows(f"812_0|{NAME.format(1)}|RUNNING|None", f"812_1|{NAME.format(1)}|RUNNING|None")
    assert manager.step().actions == (Wait("2 running"),)
    finish(folder, 0, 1)
    assert manager.step().actions == (Collect(0, "probe"),)
    records = read_records(folder)
    assert records.stages[0].product == {"frames": 6, "stopped": {"0": "exploded", "1": "exploded"}}
    assert records.current is not None
    assert records.current.name == "reference"


def test_the_intent_stands_before_the_submission_and_the_ids_before_the_release(
    manager: Manager, slurm: Slurm
) -> None:
    turns(manager, 2)
    submission, release = slurm.log()
    assert submission.startswith("sbatch ")
    assert submission.endswith(" [0001-intent.json ]")
    assert release == "scontrol release 812 [0001-intent.json 0001-submitted.json ]"


def test_a_task_that_died_is_submitted_again_in_a_folder_of_its_own(
    folder: CampaignFolder, manager: Manager, slurm: Slurm
) -> None:
    turns(manager, 2)
    finish(folder, 0)
    assert manager.step().actions == (Submit(0, "probe", (1,), 2),)
    assert attempts(folder)[1] == Attempt(2, (1,), NAME.format(2), 1000.0, {1: "813"})
    assert probe(folder).logs(1).is_dir()
    assert probe(folder).logs(2).is_dir()


def test_a_submission_without_an_answer_is_looked_for_and_never_repeated_blindly(
    folder: CampaignFolder, manager: Manager, slurm: Slurm, clock: Clock
) -> None:
    slurm.fails("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    manager.step()
    with pytest.raises(SchedulerUnavailable, match="Socket timed out"):
        manager.step()
    assert [attempt.job_ids for attempt in attempts(folder)] == [None]
    slurm.log()

    slurm.fails(None)
    manager = new_manager(folder, clock)
    assert manager.step().actions == (Wait("2 running"),)
    clock.now += SETTLING_S - 0.1
    assert manager.step().actions == (Wait("2 running"),)
    assert slurm.log() == []

    clock.now += 60
    held = [f"812_{task}|{NAME.format(1)}|PENDING|JobHeldUser" for task in (0, 1)]
    slurm.shows(*held)
    assert manager.step().actions == (CancelStrays(("812_0", "812_1")),)
    assert slurm.log() == ["scancel 812 [0001-intent.json ]"]
    slurm.shows()
    assert manager.step().actions == (Submit(0, "probe", (0, 1), 2),)


def test_a_manager_that_was_killed_before_the_release_leaves_it_to_the_next(
    folder: CampaignFolder, manager: Manager, slurm: Slurm, clock: Clock
) -> None:
    turns(manager, 2)
    slurm.log()
    slurm.shows(*(f"812_{task}|{NAME.format(1)}|PENDING|JobHeldUser" for task in (0, 1)))
    assert new_manager(folder, clock).step().actions == (Wait("2 running"),)
    assert [line.split(" [")[0] for line in slurm.log()] == ["scontrol release 812"]


def test_a_job_that_waits_without_being_held_is_left_alone(manager: Manager, slurm: Slurm) -> None:
    turns(manager, 2)
    slurm.log()
    slurm.shows(*(f"812_{task}|{NAME.format(1)}|PENDING|Priority" for task in (0, 1)))
    assert manager.step().actions == (Wait("2 running"),)
    assert slurm.log() == []


def test_nothing_is_done_while_slurm_does_not_answer(
    folder: CampaignFolder, manager: Manager, slurm: Slurm
) -> None:
    turns(manager, 2)
    slurm.log()
    slurm.is_down(True)
    turn = manager.step()
    assert turn.actions == (Wait("the scheduler does not answer"),)
    assert not turn.observation.known
    assert slurm.log() == []
    finish(folder, 0, 1)
    assert manager.step().actions == (Collect(0, "probe"),)


def test_the_time_of_a_turn_is_that_before_slurm_was_asked(
    folder: CampaignFolder, manager: Manager, slurm: Slurm, clock: Clock
) -> None:
    """An answer that takes a minute must not make a submission of a moment ago look settled."""
    manager.step()
    write_intent(folder, at=clock.now)
    observe = manager.scheduler.observe

    def observe_slowly(records: object) -> object:
        clock.now += 60.0
        return observe(records)  # type: ignore[arg-type]

    manager.scheduler.observe = observe_slowly  # type: ignore[method-assign, assignment]
    assert manager.step().actions == (Wait("2 running"),)
    assert isinstance(manager.step().actions[0], Submit)


def write_intent(folder: CampaignFolder, at: float) -> None:
    where = probe(folder).intent(1)
    where.parent.mkdir(parents=True)
    write_json(where, {"attempt": 1, "tasks": [0, 1], "job_name": NAME.format(1), "at": at})


def test_jobs_of_an_earlier_stage_that_still_end_are_nobodys_business(
    folder: CampaignFolder, manager: Manager, slurm: Slurm
) -> None:
    turns(manager, 2)
    finish(folder, 0, 1)
    manager.step()
    slurm.log()
    slurm.shows(
        f"812_0|{NAME.format(1)}|COMPLETING|None", "900|hpcft-0123abcd-r0-probe-9|PENDING|JobHeldUser"
    )
    stage = folder.stage(0, "reference")
    stage.path.mkdir(parents=True)
    write_json(stage.plan, {"tasks": [{}]})
    assert manager.step().actions == (Submit(0, "reference", (0,), 1),)
    assert not [line for line in slurm.log() if line.startswith("scancel")]


def test_it_sleeps_between_looks_and_stops_when_a_task_has_had_its_attempts(
    folder: CampaignFolder, manager: Manager, clock: Clock, slurm: Slurm
) -> None:
    seen: list[Turn] = []

    def note(turn: Turn) -> None:
        seen.append(turn)
        assert len(seen) < 20

    with pytest.raises(CampaignStopped, match="tasks 0, 1 failed after 2 attempts"):
        manager.run(note)
    assert [type(turn.actions[0]).__name__ for turn in seen] == ["Plan", "Submit", "Submit"]
    assert clock.now == 1000.0

    record_resume(folder, clock.now)
    slurm.is_down(True)
    seen.clear()

    def on_turn(turn: Turn) -> None:
        note(turn)
        slurm.is_down(len(seen) < 3)

    with pytest.raises(CampaignStopped, match="after 4 attempts"):
        manager.run(on_turn)
    assert [type(turn.actions[0]).__name__ for turn in seen] == ["Wait", "Wait", "Wait", "Submit", "Submit"]
    assert clock.now == 1021.0


def test_it_does_not_ask_slurm_without_a_pause_while_a_cancelled_job_lingers(
    folder: CampaignFolder, manager: Manager, slurm: Slurm, clock: Clock
) -> None:
    manager.step()
    write_intent(folder, at=0.0)
    slurm.shows(f"812_0|{NAME.format(1)}|COMPLETING|None")
    cancels = []

    def on_turn(turn: Turn) -> None:
        cancels.extend(line for line in slurm.log() if line.startswith("scancel"))
        assert len(cancels) < 20
        if clock.now > 1020.0:
            slurm.shows()

    with pytest.raises(CampaignStopped):
        manager.run(on_turn)
    assert clock.now == 1028.0
    assert len(cancels) == 4


def test_a_finished_campaign_needs_no_slurm(folder: CampaignFolder, manager: Manager, slurm: Slurm) -> None:
    for round_ in (0, 1):
        for name in stages_of(round_):
            where = folder.stage(round_, name)
            where.path.mkdir(parents=True)
            write_json(where.plan, {"tasks": [{}]})
            write_json(where.product, {})
    slurm.is_down(True)
    assert manager.step().actions == (Finish(),)
    manager.run()
    assert not (slurm.folder / "log").exists()


def test_a_manager_whose_lease_was_taken_submits_nothing_more(
    folder: CampaignFolder, manager: Manager, slurm: Slurm
) -> None:
    manager.step()
    newest = max(folder.leases.glob("*.json"))
    number = int(newest.stem) + 1
    other = {**json.loads(newest.read_text()), "host": "login2.example"}
    write_json(folder.leases / f"{number:06d}.json", other)
    before = sorted(folder.root.rglob("*"))
    with pytest.raises(LeaseHeld, match="taken over"):
        manager.step()
    assert slurm.log() == []
    assert sorted(folder.root.rglob("*")) == before


def test_two_managers_that_both_believe_in_their_lease_submit_an_attempt_once(
    folder: CampaignFolder, manager: Manager, slurm: Slurm, clock: Clock
) -> None:
    manager.step()
    action = Submit(0, "probe", (0, 1), 1)
    manager._perform(action)
    slurm.log()
    with pytest.raises(LeaseHeld, match=r"attempt 1 of .* was submitted by another manager"):
        new_manager(folder, clock)._perform(action)
    assert slurm.log() == []


def test_cancelling_names_every_job_of_the_campaign_and_of_no_other(manager: Manager, slurm: Slurm) -> None:
    slurm.shows(
        f"812_0|{NAME.format(1)}|RUNNING|None",
        f"812_1|{NAME.format(1)}|PENDING|Priority",
        "900|hpcft-0123abcd-r1-train-4|PENDING|JobHeldUser",
        "901|hpcft-99999999-r0-probe-1|RUNNING|None",
        "902|bash|RUNNING|None",
    )
    assert manager.scheduler.cancel_all() == 3
    assert [line.split(" [")[0] for line in slurm.log()] == ["scancel 812 900"]
    slurm.shows()
    assert manager.scheduler.cancel_all() == 0
    assert slurm.log() == []


def test_a_stage_that_is_larger_than_the_largest_array_becomes_several(
    folder: CampaignFolder, slurm: Slurm, clock: Clock
) -> None:
    site = Site.model_validate({**SITE, "stages": {"probe": {"max_array_size": 1}}})
    manager = Manager(folder, site, clock=clock)
    manager.step()
    assert manager.step().actions == (Submit(0, "probe", (0,), 1),)
    slurm.shows(f"812|{NAME.format(1)}|RUNNING|None")
    assert manager.step().actions == (Submit(0, "probe", (1,), 2),)


@pytest.mark.parametrize(("ranks", "cpus_per_rank"), [(1, 1), (2, 1), (1, 2), (3, 1000)])
def test_tasks_on_this_machine_share_its_cores(
    ranks: int, cpus_per_rank: int, folder: CampaignFolder
) -> None:
    identity = folder.read_identity()
    identity["config"]["train"] |= {"ranks": ranks, "batch_size": ranks}
    identity["config"]["train"]["resources"]["cpus_per_rank"] = cpus_per_rank
    write_json(folder.identity, identity)
    cores = len(os.sched_getaffinity(0))
    manager = Manager(folder, Site(name="here", executor="local"))
    limits = manager._limits(StageRecord(1, "train"))
    assert limits == Limits(max_attempts=2, max_running=max(1, cores // (ranks * cpus_per_rank)))
    assert manager._limits(StageRecord(1, "select")).max_running == cores
    told = Manager(folder, Site(name="here", executor="local", max_running_tasks=5))
    assert told._limits(StageRecord(1, "train")).max_running == 5


def test_resume_tries_failed_labels_again_only_where_nothing_else_is_missing(
    folder: CampaignFolder, manager: Manager
) -> None:
    manager.step()
    first, second = probe(folder).task(0), probe(folder).task(1)
    for task, result in ((first, {"failed": 2}), (second, {"failed": 0})):
        task.path.mkdir(parents=True)
        write_json(task.result, result)
    second.result.rename(second.path / "not yet")
    record_resume(folder, 1.0)
    assert first.result.exists()

    (second.path / "not yet").rename(second.result)
    record_resume(folder, 2.0)
    assert not first.result.exists()
    assert second.result.exists()
    assert (first.path / RETRY_FAILURES).exists()
    assert not (second.path / RETRY_FAILURES).exists()
    [kept] = first.path.glob("result-before-*.json")
    assert json.loads(kept.read_text()) == {"failed": 2}
    assert manager.step().actions == (Submit(0, "probe", (0,), 1),)


def test_settings_of_another_version_are_refused_with_the_key(folder: CampaignFolder) -> None:
    identity = folder.read_identity()
    write_json(
        folder.identity, {**identity, "hpcft_version": "0.0.9", "config": {**identity["config"], "speed": 1}}
    )
    with pytest.raises(UserError, match=r"written by hpcft 0\.0\.9, does not fit .*: speed: Extra inputs"):
        campaign_of(folder)
    assert site_of(folder) == Site(name="local", executor="local")
    write_json(folder.site, {"name": "here"})
    with pytest.raises(UserError, match=r"site\.json does not fit .*: executor: Field required"):
        site_of(folder)

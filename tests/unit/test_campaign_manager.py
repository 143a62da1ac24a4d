"""The manager's turns on a Slurm that consists of programs on PATH: from the plan of a stage to its product."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from ase.build import bulk
from fake_slurm import (
    NAME,
    RUNNING,
    Clock,
    FakeSlurm,
    attempts,
    current,
    finish,
    install,
    lines,
    new_manager,
    probe,
    small_campaign,
    turns,
)

from hpcft.campaign.decide import (
    Collect,
    Finish,
    Observation,
    Plan,
    RecordEndings,
    SetAside,
    Stop,
    Submit,
    Wait,
)
from hpcft.campaign.manager import Manager, Turn, record_resume
from hpcft.campaign.policy import Limits
from hpcft.campaign.records import Attempt, Ending, StageRecord, read_records
from hpcft.campaign.settings import settings_of, site_of
from hpcft.config.site import Site
from hpcft.errors import CampaignStopped, LeaseHeld, SchedulerUnavailable, UserError
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import RETRY_FAILURES, CampaignFolder, stages_of
from hpcft.storage.structures import write_structures


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CampaignFolder]:
    with small_campaign(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
def slurm(folder: CampaignFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, probe(folder).attempts, monkeypatch)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(folder: CampaignFolder, slurm: FakeSlurm, clock: Clock) -> Manager:
    return new_manager(folder, clock)


def test_a_stage_is_planned_submitted_and_collected_and_all_of_it_reads_back(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    manager.step()
    stage = current(folder)
    assert (stage.round, stage.name, stage.num_tasks) == (0, "probe", 2)
    assert json.loads(probe(folder).plan.read_text()) == {
        "tasks": [{"replicas": [0, 1], "relaxations": []}, {"replicas": [2, 3], "relaxations": []}]
    }
    assert slurm.log() == []

    assert manager.step().actions == (Submit(0, "probe", (0, 1), 1),)
    ids = {0: "812_0", 1: "812_1"}
    assert attempts(folder) == (Attempt(1, (0, 1), NAME.format(1), 1000.0, ids),)

    slurm.shows(*lines(RUNNING, RUNNING))
    assert manager.step().actions == (Wait("2 running"),)
    finish(folder, 0, 1)
    assert manager.step().actions == (Collect(0, "probe"),)
    records = read_records(folder)
    stopped = {"0": "exploded", "1": "exploded"}
    assert records.stages[0].product == {"frames": 6, "stopped": stopped, "replay": None, "tasks": 2}
    assert records.current is not None
    assert records.current.name == "reference"


def test_a_finished_stage_is_packed_and_its_results_still_read_the_same(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    turns(manager, 2)
    finish(folder, 0, 1)
    before = probe(folder).read_results()
    for task in (0, 1):
        write_structures(probe(folder).task(task).path / "frames.h5", [bulk("Cu")])
    manager.step()
    assert probe(folder).outcomes.exists()  # the next stage comes first: packing many tasks takes a while
    manager.tidy_finished(read_records(folder))
    assert {path.name for path in probe(folder).path.iterdir()} >= {"results.jsonl", "history.zip"}
    assert not probe(folder).outcomes.exists()
    assert not probe(folder).attempts.exists()
    assert probe(folder).read_results() == before


def test_a_stage_that_a_killed_manager_left_unpacked_is_packed_by_the_next(
    folder: CampaignFolder, manager: Manager, clock: Clock
) -> None:
    turns(manager, 2)
    finish(folder, 0, 1)
    write_json(probe(folder).product, {"frames": 6, "stopped": {}, "tasks": 2})
    for task in (0, 1):
        write_structures(probe(folder).task(task).path / "frames.h5", [bulk("Cu")])
    successor = new_manager(folder, clock)
    assert successor.step().actions == (Plan(0, "reference"),)
    successor.tidy_finished(read_records(folder))
    assert not probe(folder).outcomes.exists()
    assert sorted(probe(folder).read_results()) == [0, 1]


def test_a_task_that_died_is_submitted_again_in_a_folder_of_its_own(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    turns(manager, 2)
    finish(folder, 0)
    slurm.shows(f"812_1|{NAME.format(1)}|PREEMPTED|None|n4")
    assert manager.step().actions == (Wait("0 running, 1 unclear"),)
    clock.now += 60.0
    ending = Ending(1, "preempted", node="n4")
    assert manager.step().actions == (RecordEndings(0, "probe", {1: ending}),)
    assert current(folder).endings == {1: (Ending(1, "preempted", 1060.0, "n4"),)}
    assert manager.step().actions == (Submit(0, "probe", (1,), 2),)
    assert attempts(folder)[1] == Attempt(2, (1,), NAME.format(2), 1060.0, {1: "813"})
    assert probe(folder).logs(1).is_dir()
    assert probe(folder).logs(2).is_dir()


def test_endings_of_several_turns_stand_in_files_of_their_own(
    folder: CampaignFolder, manager: Manager, clock: Clock
) -> None:
    manager.step()
    for number in (1, 2, 3):
        manager._perform(RecordEndings(0, "probe", {0: Ending(number, "lost", detail="x")}))
    names = [path.name for path in probe(folder).endings()]
    assert names == [f"ended-{number:06d}.json" for number in range(3)]
    assert [ending.attempt for ending in current(folder).endings[0]] == [1, 2, 3]


def test_a_task_that_is_set_aside_is_over(folder: CampaignFolder, manager: Manager) -> None:
    manager.step()
    manager._perform(SetAside(0, "probe", {1: "it ran out of memory"}))
    stage = current(folder)
    assert (stage.set_aside, stage.missing) == ({1}, (0,))
    assert probe(folder).read_set_aside() == {1: "it ran out of memory"}
    finish(folder, 0)
    assert manager.step().actions == (Collect(0, "probe"),)
    assert probe(folder).read_set_aside() == {1: "it ran out of memory"}


def test_nothing_is_done_while_slurm_does_not_answer(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    turns(manager, 2)
    slurm.log()
    slurm.is_down(True)
    turn = manager.step()
    assert turn.actions == (Wait("the scheduler does not answer"),)
    assert not turn.observation.known
    assert not turn.scheduler_answers
    assert slurm.log() == []
    finish(folder, 0, 1)
    assert manager.step().actions == (Collect(0, "probe"),)


def test_a_manager_gives_up_once_slurm_has_been_silent_for_too_long(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    turns(manager, 2)
    manager.site = manager.site.model_copy(update={"patience_min": 60.0})
    slurm.is_down(True)
    looks: list[float] = []
    with pytest.raises(SchedulerUnavailable, match="has not answered for 60 minutes"):
        manager.run(lambda turn: looks.append(clock.now))
    pauses = [later - earlier for earlier, later in pairwise(looks)]
    assert pauses == sorted(pauses), "it is asked less and less often"
    assert max(pauses) <= 300.0


def test_what_was_seen_last_is_noted_for_readers(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    turns(manager, 2)
    slurm.shows(*lines(RUNNING, "PENDING|Priority"))
    manager.step()
    noted = json.loads(folder.observed.read_text())
    assert noted == {"at": 1000.0, "round": 0, "stage": "probe", "running": 1, "pending": {"Priority": 1}}
    slurm.is_down(True)
    manager.step()
    assert json.loads(folder.observed.read_text()) == noted


def kinds(seen: list[Turn]) -> list[str]:
    return [kind for kind, _ in groupby(type(turn.actions[0]).__name__ for turn in seen)]


def test_it_sleeps_between_looks_and_stops_when_a_task_has_had_its_attempts(
    folder: CampaignFolder, manager: Manager, clock: Clock, slurm: FakeSlurm
) -> None:
    seen: list[Turn] = []

    def note(turn: Turn) -> None:
        seen.append(turn)
        assert len(seen) < 60

    with pytest.raises(CampaignStopped, match="tasks 0, 1 failed after 2 attempts"):
        manager.run(note)
    tries = ["Submit", "Wait", "RecordEndings"]
    assert kinds(seen) == ["Plan", *tries, *tries]
    assert clock.now == 1000.0 + 2 * 9 * 7.0

    record_resume(folder, clock.now)
    slurm.is_down(True)
    seen.clear()

    def on_turn(turn: Turn) -> None:
        note(turn)
        slurm.is_down(len(seen) < 3)

    with pytest.raises(CampaignStopped, match="after 4 attempts"):
        manager.run(on_turn)
    assert kinds(seen) == ["Wait", *tries, *tries]
    assert [turn.observation.known for turn in seen[:4]] == [False, False, False, True]


def test_it_does_not_ask_slurm_without_a_pause_while_a_cancelled_job_lingers(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, clock: Clock
) -> None:
    manager.step()
    content = {"attempt": 1, "tasks": [0, 1], "job_name": NAME.format(1), "at": 0.0}
    write_json(probe(folder).intent(1), content)
    slurm.shows(*lines("COMPLETING|None"))
    cancels: list[str] = []

    class Submitted(Exception):
        pass

    def on_turn(turn: Turn) -> None:
        cancels.extend(line for line in slurm.log() if line.startswith("scancel"))
        assert len(cancels) < 20
        if clock.now > 1020.0:
            slurm.shows()
        if isinstance(turn.actions[0], Submit):
            raise Submitted

    with pytest.raises(Submitted):
        manager.run(on_turn)
    assert clock.now == 1028.0
    assert len(cancels) == 4


def test_a_finished_campaign_needs_no_slurm(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    for round_ in (0, 1):
        for name in stages_of(round_):
            where = folder.stage(round_, name)
            where.path.mkdir(parents=True)
            write_json(where.plan, {"tasks": [{}]})
            write_json(where.product, {"tasks": 1})
    slurm.is_down(True)
    assert manager.step().actions == (Finish(),)
    manager.run()
    assert not (slurm.folder / "log").exists()


def test_a_manager_whose_lease_was_taken_submits_nothing_more(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
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
    assert sorted(set(folder.root.rglob("*")) - {folder.observed}) == before
    for action in (Plan(0, "probe"), RecordEndings(0, "probe", {}), SetAside(0, "probe", {0: "x"})):
        with pytest.raises(LeaseHeld, match="taken over"):
            manager._perform(action)
    with pytest.raises(CampaignStopped, match="why"):
        manager._perform(Stop("why"))


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
    asked = manager.settings.resources_for("train")
    assert manager._limits(StageRecord(1, "train"), Observation()) == Limits(
        max_attempts=2,
        max_interruptions=manager.settings.max_interruptions,
        max_running=max(1, cores // (ranks * cpus_per_rank)),
        time_min=asked.time_min,
        memory_GB=asked.memory_GB,
    )
    assert manager._limits(StageRecord(1, "select"), Observation()).max_running == cores
    told = Manager(folder, Site(name="here", executor="local", max_running_tasks=5))
    assert told._limits(StageRecord(1, "train"), Observation()).max_running == 5


def test_resume_tries_failed_labels_again_only_where_nothing_else_is_missing(
    folder: CampaignFolder, manager: Manager
) -> None:
    manager.step()
    first, second = probe(folder).task(0), probe(folder).task(1)
    for task, causes in ((first, {"scf": 2}), (second, {})):
        task.path.mkdir(parents=True)
        write_json(task.result, {"causes": causes})
    second.result.rename(second.path / "not yet")
    record_resume(folder, 1.0)
    assert first.result.exists()

    (second.path / "not yet").rename(second.result)
    record_resume(folder, 2.0)
    assert first.result.exists(), "nothing has stopped: what is tolerated is not paid for again"
    write_json(folder.stopped, {"round": 0, "stage": "probe", "why": "too many failed", "at": 2.5})
    record_resume(folder, 3.0)
    assert not folder.stopped.exists()
    assert not first.result.exists()
    assert second.result.exists()
    assert (first.path / RETRY_FAILURES).exists()
    assert not (second.path / RETRY_FAILURES).exists()
    [kept] = first.path.glob("result-before-*.json")
    assert json.loads(kept.read_text()) == {"causes": {"scf": 2}}
    assert manager.step().actions == (Submit(0, "probe", (0,), 1),)


def test_settings_of_another_version_are_refused_with_the_key(folder: CampaignFolder) -> None:
    identity = folder.read_identity()
    write_json(
        folder.identity, {**identity, "hpcft_version": "0.0.9", "config": {**identity["config"], "speed": 1}}
    )
    with pytest.raises(UserError, match=r"written by hpcft 0\.0\.9, does not fit .*: speed: Extra inputs"):
        settings_of(folder)
    assert site_of(folder) == Site(name="local", executor="local")
    write_json(folder.site, {"name": "here"})
    with pytest.raises(UserError, match=r"site\.json does not fit .*: executor: Field required"):
        site_of(folder)


def test_a_finished_campaign_keeps_its_site_whoever_looks_at_it(
    folder: CampaignFolder, slurm: FakeSlurm
) -> None:
    manager = new_manager(folder, Clock())
    other = manager.site.model_copy(update={"name": "other"})
    Manager(folder, other)
    assert site_of(folder).name == "other", "it is not finished, and goes on there"
    for round_, stage in folder.places():
        where = folder.stage(round_, stage)
        where.path.mkdir(parents=True, exist_ok=True)
        write_json(where.plan, {"tasks": [{}]})
        write_json(where.product, {"tasks": 1})
    Manager(folder, manager.site)
    assert site_of(folder).name == "other"

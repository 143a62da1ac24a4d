"""Trying again, changing how patient a campaign is, and starting again from a stage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk
from fake_slurm import (
    RUNNING,
    Clock,
    FakeSlurm,
    current,
    finish,
    install,
    lines,
    new_manager,
    probe,
    small_campaign,
)

from hpcft.campaign.decide import Submit
from hpcft.campaign.manager import Manager
from hpcft.campaign.mend import change_settings, retry, rewind
from hpcft.errors import SchedulerUnavailable, UserError
from hpcft.labelling.item import Item
from hpcft.labelling.reference import Reference
from hpcft.labelling.worker import label_items
from hpcft.storage.atomic import create_json_once, read_json, write_json
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.structures import read_provenance


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CampaignFolder]:
    with small_campaign(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
def slurm(tmp_path: Path, folder: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path, probe(folder).attempts, monkeypatch)


@pytest.fixture
def manager(folder: CampaignFolder, slurm: FakeSlurm) -> Manager:
    """Both probe tasks are submitted."""
    manager = new_manager(folder, Clock())
    manager.step(), manager.step()
    return manager


def fail(folder: CampaignFolder, task: int, attempt: int, cause: str = "time-limit") -> None:
    number = len(probe(folder).endings())
    ending = {"attempt": attempt, "cause": cause}
    path = probe(folder).attempts / f"ended-{number:06d}.json"
    create_json_once(path, {"at": 0.0, "tasks": {str(task): ending}})


def give_up(folder: CampaignFolder, manager: Manager, task: int) -> None:
    """The campaign allows two attempts."""
    fail(folder, task, 1)
    intent = read_json(probe(folder).intent(1))
    write_json(probe(folder).intent(2), {**intent, "attempt": 2, "tasks": [task]})
    write_json(probe(folder).submitted(2), {"job_ids": {str(task): "900"}, "at": 0.0})
    fail(folder, task, 2)


def test_only_tasks_of_the_cause_get_new_attempts_and_others_stay_given_up(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    give_up(folder, manager, 0)
    fail(folder, 1, 1, "error")
    with pytest.raises(UserError, match=r"no failed task of cause node-failure.*error, time-limit"):
        retry(folder, cause="node-failure")
    assert retry(folder, cause="time-limit").tasks == (0,)
    assert (current(folder).counted_after(0), current(folder).counted_after(1)) == (2, 0)
    [submission] = [a for a in manager.step().actions if isinstance(a, Submit)]
    assert set(submission.tasks) == {0, 1}


def test_a_task_that_was_set_aside_comes_back_and_the_reason_is_kept(
    folder: CampaignFolder, manager: Manager
) -> None:
    give_up(folder, manager, 0)
    probe(folder).task(0).path.mkdir(parents=True)
    write_json(probe(folder).task(0).aside, {"why": "it ran into its time limit"})
    assert 0 not in current(folder).missing
    assert retry(folder, tasks=[0]).tasks == (0,)
    assert 0 in current(folder).missing
    [kept] = probe(folder).task(0).path.glob("aside-before-*.json")
    assert read_json(kept) == {"why": "it ran into its time limit"}


def test_set_aside_is_a_cause_as_the_table_of_labels_shows_it(
    folder: CampaignFolder, manager: Manager
) -> None:
    give_up(folder, manager, 0)
    fail(folder, 1, 1, "error")
    probe(folder).task(0).path.mkdir(parents=True)
    write_json(probe(folder).task(0).aside, {"why": "it ran into its time limit"})
    assert retry(folder, cause="set-aside").tasks == (0,)
    with pytest.raises(UserError, match="no failed task of cause set-aside"):
        retry(folder, cause="set-aside")


def test_a_retry_of_another_stage_than_that_in_progress_names_rewind(
    folder: CampaignFolder, manager: Manager
) -> None:
    with pytest.raises(
        UserError, match=r"is in stage probe of round 0, not in label.*rewind .*--stage label"
    ):
        retry(folder, stage="label")


def test_patience_can_be_changed_and_the_short_way_to_resources_works(folder: CampaignFolder) -> None:
    changed = change_settings(folder, ["label.time_min=90", "max_attempts=5", "label.memory_GB=2.5"])
    assert changed == {
        "label.resources.time_min": (60, 90),
        "max_attempts": (2, 5),
        "label.resources.memory_GB": (None, 2.5),
    }
    config = folder.read_identity()["config"]
    assert (config["label"]["resources"]["time_min"], config["max_attempts"]) == (90, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=3", "may change while a campaign goes on"),
        ("train.epochs=3", "may change while a campaign goes on"),
        ("label.time_min", "write key=value"),
        ("nothing.time_min=3", "may change while a campaign goes on"),
        ("label.time_min=soon", "valid integer; nothing was changed"),
        ("label.memory_GB=-1", "greater than 0; nothing was changed"),
        ("reference.environment={VASP_PP_PATH: /other}", "other labels.*nothing was changed"),
    ],
)
def test_any_other_change_is_refused_and_changes_nothing(
    folder: CampaignFolder, change: str, words: str
) -> None:
    before: Any = folder.read_identity()
    with pytest.raises(UserError, match=words):
        change_settings(folder, ["max_attempts=7", change])
    assert folder.read_identity() == before


def test_a_rewound_stage_is_kept_aside_and_begins_again_from_its_plan(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    finish(folder, 0, 1)
    manager.step()
    assert current(folder).name == "reference"
    (folder.stage(0, "reference").path).mkdir()
    before = probe(folder).product.read_bytes()
    moved = rewind(folder, 0, "probe", manager.scheduler)
    assert [path.name for path in moved] == [
        "reference",
        "probe",
    ]  # the last one first, so that a kill leaves a whole
    assert (folder.aside / "0001/round-000/probe/product.json").read_bytes() == before
    assert current(folder).name == "probe"
    assert current(folder).num_tasks is None
    assert manager.step().actions[0].stage == "probe"  # type: ignore[union-attr]


def test_labels_of_a_rewound_stage_still_say_of_which_reference_they_are(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    """The task had not come to publish what is in its journal."""
    finish(folder, 0, 1)
    manager.step()
    task = folder.stage(0, "reference").task(0).path
    task.mkdir(parents=True)
    reference = Reference("ase.calculators.emt.EMT")
    label_items([Item.single_point(bulk("Cu"))], reference, task)
    [moved] = rewind(folder, 0, "reference", manager.scheduler)
    about = read_provenance(moved / task.relative_to(folder.stage(0, "reference").path) / "labels.h5")
    assert about == {**reference.provenance(), "campaign": "small"}


def test_a_rewind_needs_none_of_the_files_that_the_reference_needs(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm, tmp_path: Path
) -> None:
    finish(folder, 0, 1)
    manager.step()
    stage = folder.stage(0, "reference")
    task = stage.task(0).path
    task.mkdir(parents=True)
    emt = Reference("ase.calculators.emt.EMT")
    label_items([Item.single_point(bulk("Cu"))], emt, task)
    write_json(stage.provenance, {"reference": "espresso", "campaign": "small"})
    identity = folder.read_identity()
    profile = {"command": "/nowhere/pw.x", "pseudo_dir": str(tmp_path / "gone")}
    arguments = {"pseudopotentials": {"Cu": "Cu.upf"}, "profile": profile}
    identity["config"]["reference"] |= {"calculator": "espresso", "arguments": arguments}
    write_json(folder.identity, identity)
    [moved] = rewind(folder, 0, "reference", manager.scheduler)
    about = read_provenance(moved / task.relative_to(stage.path) / "labels.h5")
    assert about == {"reference": "espresso", "campaign": "small"}


def test_a_rewind_that_was_killed_half_way_is_completed_by_saying_it_again(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    finish(folder, 0, 1)
    manager.step()
    target = folder.aside / "0001"
    (target / "round-000").mkdir(parents=True)
    create_json_once(folder.aside / "0001.json", {"round": 0, "stage": "probe", "at": 0.0})
    folder.stage(0, "reference").path.mkdir()
    shutil.move(folder.stage(0, "reference").path, target / "round-000" / "reference")
    moved = rewind(folder, 0, "probe", manager.scheduler)
    assert moved == [folder.aside / "0002/round-000/probe"]


def test_nothing_is_moved_while_slurm_does_not_say_that_nothing_runs(
    folder: CampaignFolder, manager: Manager, slurm: FakeSlurm
) -> None:
    slurm.shows(*lines(RUNNING, RUNNING))
    slurm.is_down(True)
    with pytest.raises(SchedulerUnavailable):
        rewind(folder, 0, "probe", manager.scheduler)
    assert probe(folder).plan.exists()
    assert not folder.aside.exists()


@pytest.mark.parametrize(
    ("round_", "stage", "words"), [(0, "train", "round 0 has no stage train"), (1, "label", "has not begun")]
)
def test_what_cannot_be_rewound_is_said(
    folder: CampaignFolder, manager: Manager, round_: int, stage: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        rewind(folder, round_, stage, manager.scheduler)

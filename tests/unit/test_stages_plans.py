from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from hpcft.config.campaign import Campaign
from hpcft.errors import CampaignStopped
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label_tasks import collect_shards, run_shard, shards
from hpcft.stages.registry import stage_named
from hpcft.stages.sharing import share_out
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import STAGES, CampaignFolder
from hpcft.storage.structures import read_structures, write_structures
from hpcft.training.rank import Rank

CONFIG: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "rounds": 2,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10, "tasks": 3},
    "select": {"frames": 5},
    "label": {"shards": 2, "tolerated_failures": 0.25},
    "relaxations": {"train": "/nowhere/train.extxyz", "test": "/nowhere/test.extxyz"},
    "train": {"epochs": 1, "ranks": 2, "relaxation": {"weight": 1.0}},
    "probe": {"steps": 10, "frames": 1, "tasks": 2},
}


@given(st.integers(1, 200), st.integers(1, 50))
def test_every_replica_has_one_task_and_no_task_has_two_more_than_another(count: int, tasks: int) -> None:
    parts = [payload["replicas"] for payload in share_out(count, tasks)]
    assert [index for part in parts for index in part] == list(range(count))
    assert len(parts) == min(count, tasks)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_every_frame_and_relaxation_has_one_shard_and_no_shard_two_items_more_than_another(
    num_frames: int, num_relaxations: int, count: int
) -> None:
    dealt = shards(num_frames, num_relaxations, count)
    assert sorted(i for shard in dealt for i in shard["frames"]) == list(range(num_frames))
    assert sorted(i for shard in dealt for i in shard["relaxations"]) == list(range(num_relaxations))
    sizes = [len(shard["frames"]) + len(shard["relaxations"]) for shard in dealt]
    assert len(sizes) == max(1, min(count, num_frames + num_relaxations))
    assert max(sizes) - min(sizes) <= 1


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    """Four replicas, three relaxations to train on and two to test; two tasks have probed and five frames are selected."""
    folder = CampaignFolder(tmp_path / "small")
    folder.inputs.mkdir(parents=True)
    write_json(folder.identity, {"name": "small", "rounds": 2, "foundation_file": "foundation.model"})
    for name, count in (("structures", 4), ("relaxations-train", 3), ("relaxations-test", 2)):
        write_structures(folder.inputs / f"{name}.h5", [bulk("Cu")] * count)
    for round_ in (0, 1, 2):
        plan_by_hand(folder, round_, "probe", 2)
        for task, frames in ((0, 2), (1, 1)):
            path = folder.stage(round_, "probe").task(task).path
            path.mkdir(parents=True)
            write_structures(path / "frames.h5", [bulk("Cu")] * frames)
        selected = folder.stage(round_, "select").task(0).path
        selected.mkdir(parents=True)
        write_structures(selected / "selected.h5", [bulk("Cu")] * 5)
    return folder


def plan_by_hand(folder: CampaignFolder, round_: int, stage: str, tasks: int) -> None:
    where = folder.stage(round_, stage)
    where.path.mkdir(parents=True)
    write_json(where.plan, {"tasks": [{}] * tasks})


def context(folder: CampaignFolder, round_: int, stage: str, **changes: Any) -> StageContext:
    return StageContext(folder, Campaign.model_validate({**CONFIG, **changes}), round_, stage)


def plan(folder: CampaignFolder, round_: int, stage: str, **changes: Any) -> list[Any]:
    return [dict(payload) for payload in stage_named(stage).plan(context(folder, round_, stage, **changes))]


LABEL_WITH_RELAXATIONS = [
    {"frames": [0, 2, 4], "relaxations": [1]},
    {"frames": [1, 3], "relaxations": [0, 2]},
]
PLANS: list[tuple[int, str, Any]] = [
    (1, "explore", [{"replicas": [0, 1]}, {"replicas": [2]}, {"replicas": [3]}]),
    (1, "select", [{}]),
    (1, "label", LABEL_WITH_RELAXATIONS),
    (2, "label", [{"frames": [0, 2, 4], "relaxations": []}, {"frames": [1, 3], "relaxations": []}]),
    (1, "train", [{}]),
    (0, "probe", [{"replicas": [0, 1], "relaxations": [0]}, {"replicas": [2, 3], "relaxations": [1]}]),
    (2, "probe", [{"replicas": [0, 1], "relaxations": [0]}, {"replicas": [2, 3], "relaxations": [1]}]),
    (0, "reference", [{"frames": [0, 2], "relaxations": [1]}, {"frames": [1], "relaxations": [0]}]),
    (1, "reference", [{"frames": [0, 2], "relaxations": []}, {"frames": [1], "relaxations": []}]),
    (0, "evaluate", [{}]),
]


@pytest.mark.parametrize(("round_", "stage", "expected"), PLANS)
def test_a_plan_is_the_same_whenever_it_is_made_and_is_plain_json(
    round_: int, stage: str, expected: Any, folder: CampaignFolder
) -> None:
    assert plan(folder, round_, stage) == expected
    assert json.loads(json.dumps(plan(folder, round_, stage))) == expected


def test_relaxations_are_labelled_only_where_something_is_learnt_from_them(folder: CampaignFolder) -> None:
    without = plan(folder, 1, "label", train={"epochs": 1})
    assert [shard["relaxations"] for shard in without] == [[], []]
    (folder.inputs / "relaxations-test.h5").unlink()
    untested = {"train": CONFIG["relaxations"]["train"]}
    assert [task["relaxations"] for task in plan(folder, 0, "probe", relaxations=untested)] == [[], []]
    assert [task["relaxations"] for task in plan(folder, 0, "reference", relaxations=untested)] == [[], []]


def test_a_selection_of_nothing_still_has_a_task(folder: CampaignFolder) -> None:
    write_structures(folder.stage(2, "select").task(0).path / "selected.h5", [])
    assert plan(folder, 2, "label") == [{"frames": [], "relaxations": []}]


def test_only_training_has_more_than_one_rank(folder: CampaignFolder) -> None:
    campaign = Campaign.model_validate(CONFIG)
    ranks = {name: stage_named(name).ranks(campaign) for name in STAGES}
    assert ranks == {**dict.fromkeys(STAGES, 1), "train": 2}


def test_planning_and_the_manager_load_no_torch() -> None:
    program = """
import sys
import hpcft.campaign.manager
from hpcft.stages.registry import stage_named
from hpcft.storage.campaign_folder import STAGES
for name in STAGES:
    stage = stage_named(name)
    assert all(callable(getattr(stage, part)) for part in ("ranks", "plan", "run", "collect"))
print(*sorted({"torch", "mace", "e3nn", "matplotlib", "matscipy"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_random_numbers_differ_by_name_and_by_seed_and_are_the_same_every_time(
    folder: CampaignFolder,
) -> None:
    here = context(folder, 1, "explore")
    names = [
        ("explore", 1, 0),
        ("explore", 1, 1),
        ("explore", 2, 0),
        ("probe", 1, 0),
        ("explore", 10),
        ("explore", 1),
    ]
    drawn = [here.entropy(*name) for name in names]
    assert len(set(drawn)) == len(names)
    assert drawn == [context(folder, 2, "train").entropy(*name) for name in names]
    assert context(folder, 1, "explore", seed=4).entropy("explore", 1, 0) != drawn[0]


def test_the_model_of_round_0_is_the_foundation_and_each_round_trains_one(folder: CampaignFolder) -> None:
    here = context(folder, 2, "train")
    assert here.model(0) == folder.inputs / "foundation.model"
    assert here.model(1) == folder.stage(1, "train").path / "tasks" / "0000" / "model.pt"


def results(folder: CampaignFolder, *counts: dict[str, Any]) -> StageContext:
    here = context(folder, 1, "label")
    here.here.path.mkdir(parents=True)
    write_json(here.here.plan, {"tasks": LABEL_WITH_RELAXATIONS})
    for index, count in enumerate(counts):
        task = here.here.task(index)
        task.path.mkdir(parents=True)
        write_json(task.result, count)
    return here


def test_the_counts_of_all_shards_add_up(folder: CampaignFolder) -> None:
    here = results(
        folder,
        {"items": 4, "done": 3, "failed": 1, "frames_done": 2, "causes": {"scf": 1}},
        {"items": 4, "done": 3, "failed": 1, "frames_done": 1, "causes": {"crash": 1}},
    )
    expected = {
        "items": 8,
        "done": 6,
        "failed": 2,
        "frames_done": 3,
        "relaxations": 3,
        "causes": {"scf": 1, "crash": 1},
    }
    assert collect_shards(here) == expected
    assert collect_shards(here) == expected


def test_more_failures_than_are_tolerated_stop_the_campaign_with_their_causes(folder: CampaignFolder) -> None:
    here = results(
        folder,
        {"items": 4, "done": 2, "failed": 2, "frames_done": 2, "causes": {"scf": 1, "crash": 1}},
        {"items": 4, "done": 3, "failed": 1, "frames_done": 3, "causes": {"scf": 1}},
    )
    with pytest.raises(CampaignStopped) as caught:
        collect_shards(here)
    assert "3 of 8 reference calculations of round 1, stage label failed (1 x crash, 2 x scf)" in str(
        caught.value
    )
    assert "label.tolerated_failures = 0.25" in str(caught.value)
    assert str(here.here.path) in str(caught.value)


def test_a_stage_without_anything_to_label_has_a_product(folder: CampaignFolder) -> None:
    nothing = {"items": 0, "done": 0, "failed": 0, "frames_done": 0, "causes": {}}
    assert collect_shards(results(folder, nothing, nothing))["items"] == 0


def test_a_label_of_an_earlier_round_is_found_again_and_not_paid_for(folder: CampaignFolder) -> None:
    known, new = bulk("Cu", cubic=True), bulk("Cu", cubic=True)
    known.rattle(0.05, seed=1)
    new.rattle(0.05, seed=2)
    for round_, frames in ((1, [known]), (2, [new, known])):
        here = context(folder, round_, "label")
        here.here.task(0).path.mkdir(parents=True)
        payload = {"frames": list(range(len(frames))), "relaxations": []}
        result = run_shard(TaskContext(here, 0, payload, 1, Rank()), frames, "train")
        assert (result["items"], result["done"], result["failed"]) == (len(frames), len(frames), 0)
        assert result["frames_done"] == len(frames)
    labels = read_structures(folder.stage(2, "label").task(0).path / "labels.h5")
    assert [bool(atoms.info["found"]) for atoms in labels] == [False, True]
    first = read_structures(folder.stage(1, "label").task(0).path / "labels.h5")
    assert labels[1].info["REF_energy"] == first[0].info["REF_energy"]

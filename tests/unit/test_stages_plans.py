from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from hpcft.config.campaign import Campaign
from hpcft.labelling.cost import Floats
from hpcft.stages.context import StageContext
from hpcft.stages.label_plan import shards
from hpcft.stages.registry import stage_named
from hpcft.stages.sharing import numbers_of, share_of, share_out, work_of
from hpcft.stages.train import why_no_labels
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import STAGES, CampaignFolder
from hpcft.storage.seal import DamagedFile
from hpcft.storage.structures import write_structures

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


costs = st.lists(st.floats(0.01, 100.0), max_size=60).map(np.array)


@given(costs, costs, st.integers(1, 20))
def test_every_frame_and_relaxation_has_one_shard_and_the_dearest_of_a_shard_come_first(
    frames_s: Floats, relaxations_s: Floats, count: int
) -> None:
    dealt = shards(frames_s, relaxations_s, count)
    work = [item for shard in dealt for item in work_of(shard)]
    assert sorted(i for kind, i in work if kind == "frames") == list(range(len(frames_s)))
    assert sorted(i for kind, i in work if kind == "relaxations") == list(range(len(relaxations_s)))
    assert len(dealt) == max(1, min(count, len(frames_s) + len(relaxations_s)))
    for shard in dealt:
        for kind, cost_s in (("frames", frames_s), ("relaxations", relaxations_s)):
            dear = [cost_s[i] for i in numbers_of(shard[kind])]
            assert dear == sorted(dear, reverse=True)
        assert [kind for kind, _ in work_of(shard)] == sorted(
            (kind for kind, _ in work_of(shard)), reverse=True
        )


@given(st.lists(st.integers(0, 50)), st.integers(0, 10), st.integers(1, 9), st.integers(0, 20))
def test_numbers_are_read_back_from_a_plan_in_their_order(
    numbers: list[int], first: int, step: int, length: int
) -> None:
    for some in (
        numbers,
        [*numbers, *range(first, first + step * length, step)],
        sorted(numbers, reverse=True),
    ):
        assert numbers_of(share_of(some)) == some


def test_a_plan_of_older_versions_is_read_in_its_own_order() -> None:
    old = {"frames": {"first": 1, "stop": 6, "step": 2}, "relaxations": {"first": 0, "stop": 1, "step": 1}}
    assert work_of(old) == [("frames", 1), ("frames", 3), ("frames", 5), ("relaxations", 0)]


def test_a_plan_of_a_million_equal_items_is_no_longer_than_one_of_twenty() -> None:
    few, many = shards(np.ones(20), np.zeros(0), 4), shards(np.ones(1_000_000), np.zeros(0), 4)
    assert len(json.dumps(many)) - len(json.dumps(few)) == 4 * len("00000")
    assert sum(len(numbers_of(shard["frames"])) for shard in many) == 1_000_000


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


def dealt(frames: str, relaxations: str, others: str = "", more: str = "") -> list[dict[str, Any]]:
    """Two tasks with these frames and relaxations, and those."""
    order = ["relaxations", "frames"]
    return [
        {"frames": frames, "relaxations": relaxations, "order": order},
        {"frames": others, "relaxations": more, "order": order},
    ]


PLANS: list[tuple[int, str, Any]] = [
    (1, "explore", [{"replicas": [0, 1]}, {"replicas": [2]}, {"replicas": [3]}]),
    (1, "select", [{}]),
    (1, "label", dealt("", "0 2", "0:5:1", "1")),
    (2, "label", dealt("0:6:2", "", "1 3")),
    (1, "train", [{}]),
    (0, "probe", [{"replicas": [0, 1], "relaxations": [0]}, {"replicas": [2, 3], "relaxations": [1]}]),
    (2, "probe", [{"replicas": [0, 1], "relaxations": [0]}, {"replicas": [2, 3], "relaxations": [1]}]),
    (0, "reference", dealt("0 2", "0", "1", "1")),
    (1, "reference", dealt("0 2", "", "1")),
    (0, "evaluate", [{}]),
]


@pytest.mark.parametrize(("round_", "stage", "expected"), PLANS)
def test_a_plan_is_the_same_whenever_it_is_made_and_is_plain_json(
    round_: int, stage: str, expected: Any, folder: CampaignFolder
) -> None:
    assert plan(folder, round_, stage) == expected
    assert json.loads(json.dumps(plan(folder, round_, stage))) == expected


def shares(tasks: list[Any], kind: str) -> list[list[int]]:
    return [list(numbers_of(task[kind])) for task in tasks]


def test_relaxations_are_labelled_only_where_something_is_learnt_from_them(folder: CampaignFolder) -> None:
    without = plan(folder, 1, "label", train={"epochs": 1})
    assert shares(without, "relaxations") == [[], []]
    (folder.inputs / "relaxations-test.h5").unlink()
    untested = {"train": CONFIG["relaxations"]["train"]}
    assert [task["relaxations"] for task in plan(folder, 0, "probe", relaxations=untested)] == [[], []]
    assert shares(plan(folder, 0, "reference", relaxations=untested), "relaxations") == [[], []]


def test_a_selection_of_nothing_still_has_a_task(folder: CampaignFolder) -> None:
    write_structures(folder.stage(2, "select").task(0).path / "selected.h5", [])
    tasks = plan(folder, 2, "label")
    assert (shares(tasks, "frames"), shares(tasks, "relaxations")) == ([[]], [[]])


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("label", "round-001/select/tasks/0000/selected.h5"),
        ("label", "inputs/relaxations-train.h5"),
        ("reference", "round-000/probe/tasks/0001/frames.h5"),
        ("reference", "inputs/relaxations-test.h5"),
    ],
)
def test_structures_with_a_flipped_bit_are_never_planned(
    stage: str, file: str, folder: CampaignFolder
) -> None:
    """The tasks read only their own structures of a file, and would label wrong ones without a word."""
    path = folder.root / file
    component = struct.pack("<d", bulk("Cu").cell[0, 1])
    content = path.read_bytes()
    assert component in content
    path.write_bytes(content.replace(component, bytes([component[0] ^ 1]) + component[1:], 1))
    with pytest.raises(DamagedFile, match=path.name):
        plan(folder, 1 if stage == "label" else 0, stage)


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


def test_a_round_without_labels_names_the_guards_that_stopped_its_replicas(folder: CampaignFolder) -> None:
    explore = folder.stage(1, "explore")
    explore.path.mkdir(parents=True)
    write_json(explore.product, {"frames": 0, "stopped": {"0": "distance", "1": "force", "2": "distance"}})
    settings = {**CONFIG["explore"], "min_distance": 3.0}
    said = why_no_labels(context(folder, 1, "train", explore=settings))
    assert "explore: 2 replicas by explore.min_distance (3 Å), 1 replica by the guard of force. See" in said
    write_json(explore.product, {"frames": 9, "stopped": {}})
    assert "Stopped" not in why_no_labels(context(folder, 1, "train"))

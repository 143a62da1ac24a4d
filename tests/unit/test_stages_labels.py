"""Label stages: the counts of their shards, labels found again, and what is saved of tasks that were set aside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.campaign.tidy import tidy
from hpcft.config.campaign import Campaign
from hpcft.config.label_run import LabelRun
from hpcft.errors import CampaignStopped
from hpcft.labelling.cost import cost_model
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Journal, Record, journal_path, list_journals
from hpcft.labelling.label import Label
from hpcft.labelling.label_table import LabelTable
from hpcft.labelling.shard import finish_shard
from hpcft.labelling.store import LabelStore
from hpcft.stages import label_file
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.label import plan
from hpcft.stages.label_plan import seen_so_far, shards
from hpcft.stages.label_tasks import collect_shards, reference_of, run_shard
from hpcft.stages.labels import label_outcomes, relaxation_frames, training_labels
from hpcft.stages.quarantine import find_suspects
from hpcft.stages.sharing import work_of
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.structures import read_any, read_provenance, read_structures, write_structures
from hpcft.training.rank import Rank

CONFIG: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "rounds": 2,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10},
    "select": {"frames": 5},
    "label": {"shards": 2, "tolerated_failures": 0.25},
    "train": {"epochs": 1},
    "probe": {"steps": 10, "frames": 1},
}


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    folder = CampaignFolder(tmp_path / "small")
    folder.inputs.mkdir(parents=True)
    write_json(folder.identity, {"name": "small", "rounds": 2, "foundation_file": "foundation.model"})
    return folder


def context(folder: CampaignFolder, round_: int, stage: str, **changes: Any) -> StageContext:
    return StageContext(folder, Campaign.model_validate({**CONFIG, **changes}), round_, stage)


def results(folder: CampaignFolder, *counts: dict[str, Any]) -> StageContext:
    """Round 1's label stage, planned with five frames and three relaxations in two tasks, of which these are done."""
    here = context(folder, 1, "label")
    here.here.outcomes.mkdir(parents=True)
    write_json(here.here.plan, {"tasks": shards(np.ones(5), np.ones(3), 2)})
    for index, count in enumerate(counts):
        here.here.task(index).path.mkdir(parents=True)
        write_json(here.here.task(index).result, count)
    return here


def set_aside(here: StageContext, index: int, why: str = "it ran out of memory") -> None:
    here.here.outcomes.mkdir(parents=True, exist_ok=True)
    write_json(here.here.task(index).aside, {"why": why, "at": 1.0})


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
        "suspects": [],
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


def copper(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def label(here: StageContext, index: int, frames: list[Atoms], payload: dict[str, Any]) -> dict[str, Any]:
    here.here.task(index).path.mkdir(parents=True, exist_ok=True)
    items = [Item.single_point(frame) for frame in frames]
    return run_shard(TaskContext(here, index, payload, 1, Rank()), items)


def test_a_label_of_an_earlier_round_is_found_again_and_not_paid_for(folder: CampaignFolder) -> None:
    known, new = copper(1), copper(2)
    for round_, frames in ((1, [known]), (2, [new, known])):
        here = context(folder, round_, "label")
        here.here.path.mkdir(parents=True, exist_ok=True)
        [payload] = shards(np.ones(len(frames)), np.zeros(0), 1)
        write_json(here.here.plan, {"tasks": [payload]})
        result = label(here, 0, frames, payload)
        assert (result["items"], result["done"], result["failed"]) == (len(frames), len(frames), 0)
        assert result["frames_done"] == len(frames)
        here.here.outcomes.mkdir(exist_ok=True)
        write_json(here.here.task(0).result, result)
        assert collect_shards(here)["done"] == len(frames)
    labels = read_structures(folder.stage(2, "label").task(0).path / "labels.h5")
    assert [bool(atoms.info["found"]) for atoms in labels] == [False, True]
    first = read_structures(folder.stage(1, "label").task(0).path / "labels.h5")
    assert labels[1].info["REF_energy"] == first[0].info["REF_energy"]


def test_a_stage_has_on_record_whose_its_labels_are_for_tasks_that_end_without_the_reference_s_files(
    folder: CampaignFolder,
) -> None:
    here = label_stage(folder, [copper(1)])
    said = read_provenance(here.here.task(0).path / "labels.h5")
    assert said == {**reference_of(here).provenance(), "campaign": "small"}
    assert read_json(here.here.provenance) == said


TOLERANT = {"label": {"shards": 2, "tolerated_failures": 0.6}}


def test_what_a_task_had_labelled_before_it_was_set_aside_is_kept_and_the_rest_has_failed(
    folder: CampaignFolder,
) -> None:
    """Its journal holds two of three frames; it never came to publish them."""
    here = context(folder, 1, "label", **TOLERANT)
    here.here.path.mkdir(parents=True)
    plan = shards(np.ones(5), np.zeros(0), 2)
    write_json(here.here.plan, {"tasks": plan})
    frames = [copper(seed) for seed in range(5)]
    done = label(here, 1, [frames[1], frames[3]], plan[1])
    label(here, 0, [frames[0], frames[2]], plan[0])
    for name in ("shard.json", "labels.h5", "failures.json"):
        (here.here.task(0).path / name).unlink()
    set_aside(here, 0)
    write_json(here.here.task(1).result, done)

    product = collect_shards(here)
    assert product == collect_shards(here)
    assert (product["items"], product["done"], product["failed"]) == (5, 4, 1)
    assert (product["frames_done"], product["causes"]) == (4, {"set-aside": 1})
    labels = label_outcomes(here, "label")
    assert sorted(labels) == [0, 1, 2, 3]
    assert all((labels[i].positions == frames[i].positions).all() for i in labels)
    store = LabelStore(folder.labels)
    keys = [item_key(Item.single_point(frame), reference_of(here)) for frame in frames]
    assert len(store.find(keys)) == 4, "they are not paid for again"

    write_json(here.here.product, {**product, "tasks": 2})
    tidy(here.here)
    assert sorted(label_outcomes(here, "label")) == [0, 1, 2, 3]


RELAXATIONS = {"train": "/nowhere/starts.extxyz", "learn_frames": True}


def test_the_frames_of_a_relaxation_that_was_set_aside_before_its_end_are_kept_and_learnt_from(
    folder: CampaignFolder,
) -> None:
    """Its journal holds three steps, each paid for, and no finished item."""
    training = {"epochs": 1, "relaxation": {"weight": 1.0}}
    here = context(folder, 1, "label", **TOLERANT, train=training, relaxations=RELAXATIONS)
    here.here.path.mkdir(parents=True)
    plan = shards(np.ones(2), np.ones(1), 2)
    [lone] = [i for i, payload in enumerate(plan) if payload["relaxations"]]
    plan[lone]["frames"], plan[1 - lone]["frames"] = "", "0:2:1"
    write_json(here.here.plan, {"tasks": plan})
    reference = reference_of(here)
    task = here.here.task(lone).path
    task.mkdir(parents=True)
    steps = [copper(seed) for seed in range(3)]
    keys = [item_key(Item.single_point(atoms), reference) for atoms in steps]
    with Journal(journal_path(task, 1)) as journal:
        for step, (atoms, key) in enumerate(zip(steps, keys, strict=True)):
            result = Label(-1.0, "free_energy", np.zeros((len(atoms), 3)), None)
            journal.append(Record(0, key, "single-point", result, atoms, 1.0, step=step))
    done = label(here, 1 - lone, [copper(8), copper(9)], plan[1 - lone])
    set_aside(here, lone)
    write_json(here.here.task(1 - lone).result, done)

    product = collected(here).product("label")
    assert product["causes"] == {"set-aside": 1}
    assert product["relaxation_frames"] == len(relaxation_frames(here)) == 3
    assert set(LabelStore(folder.labels).find(keys)) == set(keys), "they are not paid for again"


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_task_that_was_set_aside_before_it_had_a_label_has_failed_with_all_its_items(
    has_begun: bool, folder: CampaignFolder
) -> None:
    here = context(folder, 1, "label", **TOLERANT)
    here.here.path.mkdir(parents=True)
    plan = shards(np.ones(5), np.zeros(0), 2)
    write_json(here.here.plan, {"tasks": plan})
    result = label(here, 0, [copper(seed) for seed in (0, 2, 4)], plan[0])
    set_aside(here, 1)
    write_json(here.here.task(0).result, result)
    if has_begun:
        here.here.task(1).path.mkdir(parents=True)
    product = collect_shards(here)
    assert (product["items"], product["done"], product["failed"]) == (5, 3, 2)
    assert sorted(label_outcomes(here, "label")) == [0, 2, 4]


def test_tasks_that_were_set_aside_count_against_the_tolerated_failures(folder: CampaignFolder) -> None:
    here = results(folder, {"items": 4, "done": 4, "failed": 0, "frames_done": 3, "causes": {}})
    set_aside(here, 1)
    with pytest.raises(
        CampaignStopped, match=r"4 of 8 reference calculations .* \(4 x set-aside\)"
    ) as caught:
        collect_shards(here)
    assert "Task 1 was set aside: it ran out of memory." in str(caught.value)
    assert "failures.json" not in str(caught.value), "a task without a result has none"


def test_stages_that_follow_see_only_tasks_with_a_result(folder: CampaignFolder) -> None:
    here = results(folder, {"items": 4, "done": 4, "failed": 0, "frames_done": 3, "causes": {}})
    set_aside(here, 1)
    assert [task.index for task in here.tasks_of("label")] == [0]
    write_json(here.here.product, {"tasks": 2})
    tidy(here.here)
    assert [task.index for task in here.tasks_of("label")] == [0]
    assert [result["done"] for result in here.results()] == [4]


def finished_calculations(folder: CampaignFolder, seconds: Callable[[int], float]) -> None:
    """Labels of cells of 4 to 40 atoms in round 0, which took as long as `seconds` says; and what teaches nothing."""
    task = folder.stage(0, "reference").task(0).path
    task.mkdir(parents=True)
    calculations: list[tuple[int, float, dict[str, Any]]] = []
    for repeat in range(1, 11):
        calculations += [
            (repeat, seconds(4 * repeat), {}),
            (repeat, 1000.0, {"rung": 1}),  # the ladder's first tries are in it
            (repeat, 0.0, {"found": True}),
        ]
    with Journal(journal_path(task, 1)) as journal:
        for index, (repeat, wall_s, more) in enumerate(calculations):
            atoms = bulk("Cu", cubic=True).repeat((repeat, 1, 1))
            label = Label(-1.0, "energy", np.zeros((len(atoms), 3)), None)
            journal.append(Record(index, f"{index:064x}", "single-point", label, atoms, wall_s, **more))
    finish_shard(task)


def test_shards_are_packed_by_what_earlier_rounds_have_taken(folder: CampaignFolder) -> None:
    """A cell of 40 atoms is worth 10 of 4 where time is linear in them, and 100 where it is quadratic."""
    sizes = [40] + [4] * 30
    cells = [bulk("Cu", cubic=True).repeat((size // 4, 1, 1)) for size in sizes]
    selected = folder.stage(1, "select").task(0).path
    selected.mkdir(parents=True)
    write_structures(selected / "selected.h5", cells)
    here = context(folder, 1, "label")
    assert [len(work_of(task)) for task in plan(here)] == [11, 20]
    finished_calculations(folder, lambda num_atoms: 0.01 * num_atoms**2)
    assert [len(work_of(task)) for task in plan(here)] == [1, 30]
    assert plan(here) == plan(here)
    model = cost_model(reference_of(here), seen_so_far(folder, reference_of(here)))
    assert model.single_points(np.array([4, 40]), np.array([1, 1])) == pytest.approx([0.16, 16.0])


def campaign_folder(root: Path) -> CampaignFolder:
    folder = CampaignFolder(root)
    folder.inputs.mkdir(parents=True)
    write_json(folder.identity, {"name": root.name, "rounds": 2, "foundation_file": "foundation.model"})
    return folder


def label_stage(
    folder: CampaignFolder, frames: list[Atoms], *, round_: int = 1, stage: str = "label", **changes: Any
) -> StageContext:
    """A label stage in one task, labelled and collected."""
    here = context(folder, round_, stage, **changes)
    here.here.path.mkdir(parents=True)
    [payload] = shards(np.ones(len(frames)), np.zeros(0), 1)
    write_json(here.here.plan, {"tasks": [payload]})
    result = label(here, 0, frames, payload)
    here.here.outcomes.mkdir()
    write_json(here.here.task(0).result, result)
    write_json(here.here.product, {**collect_shards(here), "tasks": 1})
    return here


def test_what_one_campaign_has_paid_for_another_that_shares_its_store_takes_over_and_keeps(
    tmp_path: Path,
) -> None:
    first, second = campaign_folder(tmp_path / "first"), campaign_folder(tmp_path / "second")
    sharing = {"label": {"store": str(tmp_path / "shared")}}
    frames = [copper(1), copper(2)]
    paid = label_stage(first, frames, **sharing)
    taken = label_stage(second, frames, **sharing)
    [before, after] = [read_structures(c.here.task(0).path / "labels.h5") for c in (paid, taken)]
    assert [bool(atoms.info["found"]) for atoms in before] == [False, False]
    assert [bool(atoms.info["found"]) for atoms in after] == [True, True]
    assert [atoms.info["REF_energy"] for atoms in after] == [atoms.info["REF_energy"] for atoms in before]

    first.root.rename(tmp_path / "gone")
    keys = [item_key(Item.single_point(frame), reference_of(taken)) for frame in frames]
    assert set(LabelStore(second.labels).find(keys)) == set(keys), "the second campaign stands alone"
    assert set(LabelStore(tmp_path / "shared").find(keys)) == set(keys), "and others find it there"


def test_campaigns_that_share_no_store_or_no_reference_pay_each_for_their_own_labels(tmp_path: Path) -> None:
    frames = [copper(1)]
    sharing = {"label": {"store": str(tmp_path / "shared")}}
    label_stage(campaign_folder(tmp_path / "first"), frames, **sharing)
    other = {"reference": {"calculator": "ase.calculators.emt.EMT", "arguments": {"asap_cutoff": True}}}
    for name, changes in (("alone", {}), ("other", {**sharing, **other})):
        here = label_stage(campaign_folder(tmp_path / name), frames, **changes)
        [labelled] = read_structures(here.here.task(0).path / "labels.h5")
        assert not labelled.info["found"], name


def spoil(here: StageContext, item: int, error: float) -> str:
    """Change one energy of task 0 and publish it, as a calculation that went wrong without a word would; returns its key."""
    task = here.here.task(0).path
    records = [entry.read() for entry in list_journals(task).items.values()]
    wrong = records[item].result
    assert isinstance(wrong, Label)
    records[item] = replace(records[item], result=replace(wrong, energy=wrong.energy + error))
    journal_path(task, 1).unlink()
    with Journal(journal_path(task, 1)) as journal:
        for record in records:
            journal.append(record)
    finish_shard(task)
    return records[item].key


def collected(here: StageContext) -> StageContext:
    write_json(here.here.product, {**collect_shards(here), "tasks": 1})
    return here


def test_a_label_with_a_wrong_energy_is_quarantined_until_the_user_releases_it(
    folder: CampaignFolder,
) -> None:
    frames = [copper(seed) for seed in range(12)]
    here = label_stage(folder, frames)
    assert read_json(here.here.product)["suspects"] == [], "sane labels are no suspects"
    key = spoil(here, 4, -40.0)
    collected(here)

    [suspect] = read_json(here.here.product)["suspects"]
    place = {"round": 1, "task": 0, "item": 4, "step": None}
    assert {name: suspect[name] for name in place} == place
    assert suspect["key"] == key
    assert "off by -10 eV/atom" in suspect["reason"]
    assert sorted(label_outcomes(here, "label")) == [n for n in range(12) if n != 4]
    assert len(training_labels(here)) == 11
    released = context(folder, 1, "label", label={"quarantine": False})
    assert sorted(label_outcomes(released, "label")) == list(range(12))
    assert len(training_labels(released)) == 12


def test_a_labelling_run_exports_a_label_that_looks_wrong_with_the_reason_unless_it_is_released(
    folder: CampaignFolder,
) -> None:
    frames = [copper(seed) for seed in range(12)]
    write_structures(folder.inputs / "structures.h5", frames)
    run = {"name": "run", "structures": "/nowhere/in.extxyz", "reference": CONFIG["reference"]}
    here = StageContext(folder, LabelRun.model_validate(run), 0, "label")
    here.here.outcomes.mkdir(parents=True)
    [payload] = label_file.plan(here)
    write_json(here.here.plan, {"tasks": [payload]})
    write_json(here.here.task(0).result, label(here, 0, frames, payload))
    spoil(here, 4, -40.0)
    [suspect] = label_file.collect(here)["suspects"]
    reasons = [atoms.info.get("suspect") for atoms in read_any(folder.root / "labels.extxyz")]
    assert reasons == [None] * 4 + [suspect["reason"]] + [None] * 7
    release = {**run, "label": {"quarantine": False}}
    label_file.collect(StageContext(folder, LabelRun.model_validate(release), 0, "label"))
    assert not any("suspect" in atoms.info for atoms in read_any(folder.root / "labels.extxyz"))


def test_a_label_of_an_early_round_is_found_out_by_those_of_a_later_one(folder: CampaignFolder) -> None:
    first = label_stage(folder, [copper(seed) for seed in range(4)])
    spoil(first, 1, 40.0)
    collected(first)
    assert len(training_labels(first)) == 4, "four labels say too little"

    second = label_stage(folder, [copper(seed) for seed in range(10, 20)], round_=2)
    [suspect] = read_json(second.here.product)["suspects"]
    assert (suspect["round"], suspect["task"], suspect["item"]) == (1, 0, 1)
    assert len(training_labels(second)) == 13
    assert sorted(label_outcomes(second, "label", 1)) == [0, 2, 3]
    assert sorted(label_outcomes(second, "label", 2)) == list(range(10))


def several_rounds(folder: CampaignFolder) -> list[StageContext]:
    """Stages of both kinds in three rounds, with wrong energies that show at once, later, and only beside another stage's."""
    stages = [
        label_stage(folder, [copper(seed) for seed in range(4)], round_=0, stage="reference"),
        label_stage(folder, [copper(seed) for seed in range(10, 22)]),
        label_stage(folder, [copper(seed) for seed in range(30, 35)], stage="reference"),
        label_stage(folder, [copper(seed) for seed in range(40, 46)], round_=2),
    ]
    for here, item, error in zip(stages, (2, 7, 0, 5), (40.0, -40.0, -55.0, 90.0), strict=True):
        spoil(here, item, error)
    for here in stages:
        collected(here)
    return stages


def tables_of(folder: CampaignFolder) -> list[Path]:
    return sorted(folder.root.glob("round-*/*/label-table.h5"))


def test_labels_are_judged_by_the_tables_of_earlier_stages_as_by_all_their_files(
    folder: CampaignFolder,
) -> None:
    stages = several_rounds(folder)
    by_tables = [find_suspects(here) for here in stages]
    assert [len(found) for found in by_tables] == [0, 1, 2, 2]
    assert [read_json(here.here.product)["suspects"] for here in stages] == by_tables
    assert len(tables_of(folder)) == 4
    for path in tables_of(folder):
        path.unlink()
    assert [find_suspects(here) for here in stages] == by_tables
    assert tables_of(folder) == [], "to look is to change nothing"
    for shard in folder.root.glob("round-*/*/tasks/*/shard.json"):  # as they were before there were tables
        contents = read_json(shard)
        write_json(shard, {key: value for key, value in contents.items() if key != "tables"})
    assert [find_suspects(here) for here in stages] == by_tables


def test_a_collection_reads_the_labels_of_its_own_round_and_no_file_of_an_earlier_one(
    folder: CampaignFolder,
) -> None:
    stages = several_rounds(folder)
    suspects = read_json(stages[-1].here.product)["suspects"]
    for here in stages[:-1]:
        for path in here.here.path.glob("tasks/*/*"):
            path.unlink()
    assert collect_shards(stages[-1])["suspects"] == suspects


@pytest.mark.parametrize("fault", ["missing", "torn", "of other labels"])
def test_a_table_that_does_not_fit_is_made_again_by_the_next_collection(
    fault: str, folder: CampaignFolder
) -> None:
    stages = several_rounds(folder)
    suspects = read_json(stages[-1].here.product)["suspects"]
    table = stages[1].here.label_table
    right = table.read_bytes()
    if fault == "missing":
        table.unlink()
    elif fault == "torn":
        table.write_bytes(right[:-100])
    else:
        table.write_bytes(stages[0].here.label_table.read_bytes())
    assert collect_shards(stages[-1])["suspects"] == suspects
    assert LabelTable.read_file(table).items_s.tolist() == list(range(12))


def test_the_frames_of_a_relaxation_keep_their_steps_in_a_stages_table(folder: CampaignFolder) -> None:
    here = context(
        folder, 1, "label", relaxations=RELAXATIONS, train={"epochs": 1, "relaxation": {"weight": 1.0}}
    )
    task = here.here.task(3).path
    task.mkdir(parents=True)
    write_json(here.here.plan, {"tasks": []})
    with Journal(journal_path(task, 1)) as journal:
        for step in range(3):
            atoms = copper(step)
            forces = np.full((len(atoms), 3), 1e4 if step == 1 else 0.0)
            label_ = Label(-1.0, "free_energy", forces, None)
            journal.append(Record(5, f"{step:064x}", "single-point", label_, atoms, 1.0, step=step))
    finish_shard(task)
    [suspect] = find_suspects(here, keep_tables=True)
    assert {name: suspect[name] for name in ("round", "task", "item", "step")} == {
        "round": 1,
        "task": 3,
        "item": 5,
        "step": 1,
    }
    table = LabelTable.read_file(here.here.label_table)
    assert (table.shards_s.tolist(), table.items_s.tolist(), table.steps_s.tolist()) == (
        [3] * 3,
        [5] * 3,
        [0, 1, 2],
    )


def test_a_shared_store_that_cannot_be_written_stops_the_campaign_and_its_labels_are_kept(
    tmp_path: Path, folder: CampaignFolder
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CampaignStopped, match=r"are safe in the campaign, but cannot be registered in label\.store"
    ):
        label_stage(folder, [copper(1)], label={"store": str(tmp_path / "file" / "labels")})
    here = context(folder, 1, "label")
    key = item_key(Item.single_point(copper(1)), reference_of(here))
    assert set(LabelStore(folder.labels).find([key])) == {key}

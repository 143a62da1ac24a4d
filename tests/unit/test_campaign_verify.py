from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from ase.build import bulk
from round_zero import make_round_zero

from hpcft.campaign.verify import verify_campaign
from hpcft.errors import UserError
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.structures import write_structures

PROBE = "round-000/probe"
REFERENCE = "round-000/reference"
SHARD = f"{REFERENCE}/tasks/0000"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    return make_round_zero(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: CampaignFolder, tmp_path: Path) -> CampaignFolder:
    return CampaignFolder(shutil.copytree(made.root, tmp_path / "tiny"))


def problems(folder: CampaignFolder) -> dict[str, str]:
    return {problem.file: problem.text for problem in verify_campaign(folder).problems}


def test_a_whole_campaign_has_no_problem_and_is_counted(folder: CampaignFolder) -> None:
    found = verify_campaign(folder)
    assert (found.problems, found.num_stages) == ((), 3)
    files = [p for p in folder.root.rglob("*") if p.is_file() and p.parent != folder.leases]
    assert (found.num_files, found.num_bytes) == (len(files), sum(p.stat().st_size for p in files))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inputs/foundation.pt", "is missing; restore it from a backup, or from what it was made of"),
        ("inputs/structures.h5", "is missing; restore it"),
        ("inputs/relaxations-train.h5", "is missing; restore it"),
        (f"{PROBE}/plan.json", "is missing; restore it from a backup, or do this stage and all after it again: hpcft"),
        (f"{PROBE}/product.json", "is missing, although later stages are finished"),
        (f"{PROBE}/results.jsonl", "has no result of task 0, 1"),
        (f"{PROBE}/history.zip", "is missing: how this stage came about is lost"),
        (f"{PROBE}/tasks/0001/trajectory.h5", "--round 0 --stage probe"),
        (f"{PROBE}/tasks/0001/frames.h5", "--round 0 --stage probe"),
        (f"{PROBE}/tasks/0000/relaxed.h5", "--round 0 --stage probe"),
        (f"{SHARD}/labels.h5", "is missing: 4 results are in it; restore it"),
        (f"{SHARD}/failures.json", "is missing"),
        (f"{SHARD}/shard.json", "is missing"),
    ],
)  # fmt: skip
def test_a_file_that_later_work_needs_and_that_is_gone_is_told_with_what_to_do(
    name: str, words: str, folder: CampaignFolder
) -> None:
    (folder.root / name).unlink()
    found = problems(folder)
    assert words in found[name]
    assert found.keys() - {name} <= {f"{REFERENCE}/product.json"}  # whose count has no labels behind it then


@pytest.mark.parametrize(
    "pattern",
    [
        "campaign.json",
        "site.json",
        "inputs/*",
        "label-store/*",
        f"{PROBE}/*.*",
        f"{PROBE}/tasks/0000/*",
        f"{REFERENCE}/*.*",
        f"{SHARD}/*",
        "round-000/evaluate/*.*",
    ],
)
def test_a_file_that_was_cut_off_or_overwritten_is_found_and_is_the_only_one_told_of(
    pattern: str, folder: CampaignFolder
) -> None:
    paths = [path for path in folder.root.glob(pattern) if path.is_file()]
    assert paths
    for path in paths:
        content = path.read_bytes()
        name = path.relative_to(folder.root).as_posix()
        for damaged in (content[: len(content) // 2], b"\0" * len(content), b""):
            if damaged == content or (path.name == "results.jsonl" and not damaged):
                continue
            path.write_bytes(damaged)
            assert problems(folder).keys() == {name}
        path.write_bytes(content)


def change(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})


def fewer_frames(folder: CampaignFolder) -> str:
    name = f"{PROBE}/tasks/0000/frames.h5"
    write_structures(folder.root / name, [bulk("Cu")])
    return f"{name} has 1 structures, but its record says 2"


def fewer_labels_in_the_result(folder: CampaignFolder) -> str:
    results = folder.root / REFERENCE / "results.jsonl"
    results.write_text(results.read_text().replace('"frames_done": 4', '"frames_done": 3'))
    return f"{SHARD}/shard.json lists 4 labels, 0 relaxations and 0 failures, but its task's result says 3, 1 and 0"


def fewer_labels_in_the_product(folder: CampaignFolder) -> str:
    change(folder.root / REFERENCE / "product.json", frames_done=3)
    return f"{REFERENCE}/product.json counts 3 labels, but its tasks have 4"


def fewer_tasks_in_the_product(folder: CampaignFolder) -> str:
    change(folder.root / PROBE / "product.json", tasks=1)
    return f"{PROBE}/product.json counts 1 tasks, but 2 were planned"


def a_trajectory_of_another_task(folder: CampaignFolder) -> str:
    results = folder.root / PROBE / "results.jsonl"
    results.write_text(results.read_text().replace('"frames": 3', '"frames": 5', 1))
    return f"{PROBE}/tasks/0000/trajectory.h5 has 3 frames, but its record says 5"


def a_file_of_another_kind(folder: CampaignFolder) -> str:
    name = f"{PROBE}/tasks/0000/trajectory.h5"
    shutil.copy(folder.root / PROBE / "tasks/0000/frames.h5", folder.root / name)
    return f"{name} is of kind structures, but trajectory is needed here"


def another_foundation(folder: CampaignFolder) -> str:
    (folder.inputs / "foundation.pt").write_bytes(b"another")
    return "inputs/foundation.pt is not the file whose SHA-256 campaign.json has"


def a_store_that_forgot(folder: CampaignFolder) -> str:
    shutil.rmtree(folder.labels)
    return f"{SHARD}/shard.json has 4 labels that label-store/ does not list, so they could be paid for again"


def settings_of_another_version(folder: CampaignFolder) -> str:
    config = read_json(folder.identity)["config"]
    change(folder.identity, config={**config, "new_key": 1})
    return "campaign.json written by hpcft"


def a_result_without_what_it_should_say(folder: CampaignFolder) -> str:
    (folder.root / REFERENCE / "results.jsonl").write_text('{"task": 0, "result": {}}\n')
    return f"{SHARD}/shard.json is not what hpcft wrote there (KeyError: 'frames_done')"


@pytest.mark.parametrize(
    "damage",
    [
        fewer_frames,
        fewer_labels_in_the_result,
        fewer_labels_in_the_product,
        fewer_tasks_in_the_product,
        a_trajectory_of_another_task,
        a_file_of_another_kind,
        another_foundation,
        a_store_that_forgot,
        settings_of_another_version,
        a_result_without_what_it_should_say,
    ],
)
def test_files_that_are_sound_and_do_not_fit_together_are_told(
    damage: Callable[[CampaignFolder], str], folder: CampaignFolder
) -> None:
    expected = damage(folder)
    [(name, text)] = problems(folder).items()
    assert f"{name} {text}".startswith(expected)


def test_the_remedy_for_a_store_that_forgot_is_python_that_mends_it(folder: CampaignFolder) -> None:
    a_store_that_forgot(folder)
    [text] = problems(folder).values()
    code = text.partition("in Python: ")[2]
    imports = "from pathlib import Path; from hpcft.labelling.store import LabelStore; "
    subprocess.run([sys.executable, "-c", imports + code], check=True)
    assert problems(folder) == {}


def test_of_a_stage_in_progress_only_finished_tasks_must_have_their_data(folder: CampaignFolder) -> None:
    stage = folder.stage(1, "explore")
    stage.outcomes.mkdir(parents=True)
    write_json(stage.plan, {"tasks": [{"replicas": [0]}, {"replicas": [1]}]})
    assert problems(folder) == {}
    write_json(stage.task(1).result, {"frames": 3, "stopped": {}})
    [(name, text)] = problems(folder).items()
    assert name == "round-001/explore/tasks/0001/trajectory.h5"
    assert text.startswith("is missing; restore it from a backup")
    stage.task(1).path.mkdir(parents=True)
    shutil.copy(folder.root / PROBE / "tasks/0000/trajectory.h5", stage.task(1).path)
    assert problems(folder) == {}


def test_a_task_that_was_set_aside_needs_no_data(folder: CampaignFolder) -> None:
    results = folder.root / PROBE / "results.jsonl"
    first, _ = results.read_text().splitlines()
    results.write_text(f'{first}\n{{"task": 1, "set_aside": "out of memory"}}\n')
    shutil.rmtree(folder.root / PROBE / "tasks/0001")
    assert problems(folder) == {}


def test_damaged_lines_of_a_journal_are_counted(folder: CampaignFolder) -> None:
    path = folder.root / "round-001" / "label" / "tasks" / "0000" / "journal-1.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"crc32": "00000000", "record": {}}\n{"torn')
    [(name, text)] = problems(folder).items()
    assert name == path.relative_to(folder.root).as_posix()
    assert text.startswith(
        "has 1 damaged lines; restore it from a backup, or let their labels be computed again"
    )


def test_what_was_rewound_is_checked_too(folder: CampaignFolder) -> None:
    shutil.copytree(folder.root / PROBE, folder.aside / "0001" / PROBE)
    assert problems(folder) == {}
    (folder.aside / "0001" / PROBE / "tasks/0001/frames.h5").write_bytes(b"torn")
    assert problems(folder).keys() == {f"aside/0001/{PROBE}/tasks/0001/frames.h5"}


def test_a_user_s_own_files_beside_the_campaign_are_nobody_s_business(folder: CampaignFolder) -> None:
    (folder.root / "notes").mkdir()
    (folder.root / "notes" / "mine.h5").write_text("no HDF5")
    (folder.root / "mine.json").write_text("{")
    assert problems(folder) == {}


def test_what_is_no_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a campaign folder"):
        verify_campaign(CampaignFolder(tmp_path))


def test_nothing_is_written_and_torch_is_not_loaded(folder: CampaignFolder) -> None:
    for path in (folder.root, *folder.root.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat().st_mtime_ns for path in (folder.root, *folder.root.rglob("*"))}
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sorted({'torch', 'mace', 'submitit'} & sys.modules.keys()), file=sys.stderr))\n"
        f"sys.argv = ['hpcft', 'verify', {str(folder.root)!r}, '--json']\n"
        "from hpcft.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "\n")
    found = json.loads(done.stdout)
    assert (found["path"], found["num_stages"], found["problems"]) == (str(folder.root), 3, [])
    assert {path: path.stat().st_mtime_ns for path in (folder.root, *folder.root.rglob("*"))} == before

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.io import write

from hpcft.campaign.create import open_or_create
from hpcft.config.campaign import Campaign, load_campaign
from hpcft.errors import UserError
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.structures import read_structures

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import CAMPAIGN, write_campaign


@pytest.fixture(scope="module")
def shared_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("inputs")).parent


@pytest.fixture
def inputs(shared_inputs: Path, tmp_path: Path) -> Path:
    """A folder with `tiny.yaml` and all that it names, of this test alone."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for path in shared_inputs.iterdir():
        os.link(path, folder / path.name)
    return folder


def campaign_file(inputs: Path, changes: Mapping[str, Any]) -> Path:
    path = inputs / "changed.yaml"
    path.write_text(yaml.safe_dump({**CAMPAIGN, **changes}, sort_keys=False))
    return path


def load(file: Path) -> tuple[Campaign, Path]:
    return load_campaign(file), file


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refusal(file: Path, root: Path) -> str:
    """The message with which a campaign is refused; nothing on disk may have changed by it."""
    before = snapshot(root.parent)
    with pytest.raises(UserError) as caught:
        open_or_create(*load(file), root)
    assert snapshot(root.parent) == before
    return str(caught.value)


def test_a_new_folder_holds_all_that_the_campaign_needs(inputs: Path, tmp_path: Path) -> None:
    campaign, file = load(inputs / "tiny.yaml")
    folder = open_or_create(campaign, file, tmp_path / "runs" / "tiny")
    assert sorted(path.name for path in folder.root.iterdir()) == [
        "campaign.json",
        "campaign.yaml",
        "inputs",
        "leases",
    ]
    assert sorted(path.name for path in folder.inputs.iterdir()) == [
        "foundation.pt",
        "relaxations-test.h5",
        "relaxations-train.h5",
        "structures.h5",
    ]
    assert (folder.inputs / "foundation.pt").read_bytes() == (inputs / "foundation.pt").read_bytes()
    assert (folder.root / "campaign.yaml").read_bytes() == file.read_bytes()
    assert len(read_structures(folder.inputs / "structures.h5")) == 4
    identity = folder.read_identity()
    assert identity["rounds"] == 2
    assert identity["foundation_file"] == "foundation.pt"
    assert Campaign.model_validate(identity["config"]) == campaign
    assert len(identity["id"]) == 8
    assert set(identity["id"]) <= set("0123456789abcdef")


def test_the_same_campaign_finds_its_folder_and_changes_nothing_in_it(inputs: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    open_or_create(*load(inputs / "tiny.yaml"), root)
    before = snapshot(root)
    reordered = campaign_file(inputs, {"name": CAMPAIGN["name"], "rounds": CAMPAIGN["rounds"]})
    reordered.write_text("# another remark\n" + yaml.safe_dump(dict(reversed(CAMPAIGN.items()))))
    for file in (inputs / "tiny.yaml", reordered):
        assert open_or_create(*load(file), root) == CampaignFolder(root)
        assert snapshot(root) == before


def test_two_folders_of_one_campaign_have_jobs_of_different_names(inputs: Path, tmp_path: Path) -> None:
    def new_id(name: str) -> str:
        return str(open_or_create(*load(inputs / "tiny.yaml"), tmp_path / name).read_identity()["id"])

    ids = [new_id("a"), new_id("b")]
    shutil.rmtree(tmp_path / "a")
    ids.append(new_id("a"))
    assert len(set(ids)) == 3


def test_a_folder_of_another_campaign_is_refused_with_the_keys_that_differ(
    inputs: Path, tmp_path: Path
) -> None:
    root = tmp_path / "tiny"
    open_or_create(*load(inputs / "tiny.yaml"), root)
    changed = campaign_file(
        inputs, {"seed": 8, "probe": {**CAMPAIGN["probe"], "steps": 14}, "label": {"shards": 1}}
    )
    lines = refusal(changed, root).splitlines()
    assert lines[0] == f"{root} belongs to another campaign than {changed} describes now:"
    assert lines[1:4] == ["  label.shards: 2 -> 1", "  probe.steps: 12 -> 14", "  seed: 7 -> 8"]
    assert "--dir" in lines[4]
    assert len(lines) == 5


def test_an_input_file_with_other_content_makes_another_campaign(inputs: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    open_or_create(*load(inputs / "tiny.yaml"), root)
    (inputs / "start.extxyz").unlink()
    write(inputs / "start.extxyz", [bulk("Cu", cubic=True)])
    assert "structures: the file's content has changed" in refusal(inputs / "tiny.yaml", root)


@pytest.mark.parametrize("name", ["thesis.tex", "leases.txt", "round-000", "inputs2"])
def test_a_folder_with_somebodys_files_is_refused(name: str, inputs: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    (root / "inputs").mkdir(parents=True)
    (root / name).write_text("four years of work")
    assert "exists and is not a campaign folder" in refusal(inputs / "tiny.yaml", root)


def test_a_file_in_the_place_of_the_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny"
    file.write_text("a file")
    assert "is a file; name a folder" in refusal(inputs / "tiny.yaml", file)
    assert "cannot be made (Not a directory)" in refusal(inputs / "tiny.yaml", file / "below")


def test_an_empty_folder_is_taken(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    open_or_create(*load(inputs / "tiny.yaml"), tmp_path / "tiny")


def with_silicon(inputs: Path, name: str) -> None:
    (inputs / name).unlink()
    write(inputs / name, [bulk("Cu", cubic=True), bulk("Si", cubic=True)])


def knowing_silicon(inputs: Path) -> None:
    from hpcft.models.files import save_model
    from hpcft.models.morse import MorsePotential

    (inputs / "foundation.pt").unlink()
    save_model(inputs / "foundation.pt", MorsePotential([14, 29], cutoff=4.0))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("start.extxyz", "structures"),
        ("vacancies-train.extxyz", "relaxations.train"),
        ("vacancies-test.extxyz", "relaxations.test"),
    ],
)
def test_an_element_that_model_or_reference_does_not_know_is_named(
    file: str, name: str, inputs: Path, tmp_path: Path
) -> None:
    with_silicon(inputs, file)
    assert refusal(inputs / "tiny.yaml", tmp_path / "tiny") == (
        f"{file} ({name}) contains Si, which the foundation model foundation.pt does not know (it knows Cu)"
    )
    knowing_silicon(inputs)
    assert refusal(inputs / "tiny.yaml", tmp_path / "tiny") == (
        f"{file} ({name}) contains Si, which ase.calculators.emt.EMT does not know"
    )


def test_replay_structures_need_no_reference(inputs: Path, tmp_path: Path) -> None:
    knowing_silicon(inputs)
    labelled = bulk("Si", cubic=True)
    labelled.info = {"REF_energy": -3.5, "REF_stress": np.arange(6.0), "remark": "from the internet"}
    labelled.arrays["REF_forces"] = np.arange(24.0).reshape(8, 3)
    write(inputs / "replay.extxyz", [labelled, labelled])
    train = {**CAMPAIGN["train"], "replay": {"file": "replay.extxyz"}}
    folder = open_or_create(*load(campaign_file(inputs, {"train": train})), tmp_path / "tiny")
    kept = read_structures(folder.inputs / "replay.h5")
    assert len(kept) == 2
    assert kept[1].info.keys() == {"REF_energy", "REF_stress"}
    assert kept[1].info["REF_energy"] == -3.5
    assert np.array_equal(kept[1].info["REF_stress"], labelled.info["REF_stress"])
    assert np.array_equal(kept[1].arrays["REF_forces"], labelled.arrays["REF_forces"])


def test_replay_structures_without_labels_are_refused(inputs: Path, tmp_path: Path) -> None:
    train = {**CAMPAIGN["train"], "replay": {"file": "start.extxyz"}}
    message = refusal(campaign_file(inputs, {"train": train}), tmp_path / "tiny")
    assert message.startswith("structure 0 of start.extxyz (train.replay.file) has no REF_energy")


def overlapping() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.positions[1] = atoms.positions[0] + [0.3, 0, 0]
    return atoms


def magnetic() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.set_initial_magnetic_moments([0.6] * 4)
    return atoms


def cluster() -> Atoms:
    return Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])


NO_STARTS = [
    (
        overlapping,
        "nvt",
        "start.extxyz (structures): structure 1 (Cu4): atoms 0 and 1 are 0.30 Å apart, closer than 0.8",
    ),
    (cluster, "npt", "start.extxyz (structures): structure 1 (Cu2): is not periodic in all directions"),
    (magnetic, "nvt", "structure 1 of start.extxyz (structures) carries initial magnetic moments"),
]


@pytest.mark.parametrize(("start", "ensemble", "words"), NO_STARTS)
def test_run_and_check_refuse_the_same_start_structures(
    start: Callable[[], Atoms], ensemble: str, words: str, inputs: Path, tmp_path: Path
) -> None:
    from hpcft.cli.preflight import structure_problems

    (inputs / "start.extxyz").unlink()
    write(inputs / "start.extxyz", [bulk("Cu", cubic=True), start()])
    file = campaign_file(inputs, {"explore": {**CAMPAIGN["explore"], "ensemble": ensemble}})
    message = refusal(file, tmp_path / "tiny")
    assert words in message
    [problem] = structure_problems(load_campaign(file))
    assert (problem.what, problem.severity) == (message, "error")


def test_a_cluster_starts_where_no_cell_is_needed(inputs: Path, tmp_path: Path) -> None:
    (inputs / "start.extxyz").unlink()
    write(inputs / "start.extxyz", [cluster()])
    open_or_create(*load(inputs / "tiny.yaml"), tmp_path / "tiny")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": {"calculator": "ase.calculators.emt.EMTT"}}, "EMTT"),
        ({"reference": {"calculator": "ase.calculators.nowhere.EMT"}}, "ase.calculators.nowhere"),
        (
            {"reference": {"calculator": "ase.calculators.emt.EMT", "arguments": {"asap_cutof": True}}},
            "asap_cutof",
        ),
        ({"structures": "tiny.yaml"}, "tiny.yaml cannot be read by ASE"),
        (
            {"foundation": "start.extxyz"},
            "start.extxyz is no model file; name one of hpcft's (.pt) or of MACE's (.model)",
        ),
    ],
)
def test_a_reference_or_an_input_that_is_not_what_it_should_be_is_named(
    changes: dict[str, Any], words: str, inputs: Path, tmp_path: Path
) -> None:
    assert words in refusal(campaign_file(inputs, changes), tmp_path / "tiny")


def test_a_foundation_file_that_has_gone_since_the_campaign_was_read_is_named(
    inputs: Path, tmp_path: Path
) -> None:
    campaign, file = load(inputs / "tiny.yaml")
    (inputs / "foundation.pt").unlink()
    with pytest.raises(UserError, match=r"there is no model file .*foundation\.pt"):
        open_or_create(campaign, file, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


# Forks after the imports, and is killed when it makes, links or renames its first, second, ... file or folder.
KILLED = """
import os, signal, sys
from pathlib import Path
import hpcft.models.files
from hpcft.campaign.create import open_or_create
from hpcft.config.campaign import load_campaign
file, base = map(Path, sys.argv[1:])
campaign = load_campaign(file)
def create(root, steps_to_live):
    if (child := os.fork()) == 0:
        def count(event, arguments):
            nonlocal steps_to_live
            if event in ("os.rename", "os.link", "os.mkdir"):
                steps_to_live -= 1
                if steps_to_live < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        open_or_create(campaign, file, root)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
steps = 0
while (code := create(base / str(steps), steps)) == -signal.SIGKILL:
    complete = (base / str(steps) / "campaign.json").exists()
    again = create(base / str(steps), 1000)
    print(steps, complete, again, flush=True)
    steps += 1
assert code == 0, code
"""


def test_a_creation_that_was_killed_anywhere_is_done_again(inputs: Path, tmp_path: Path) -> None:
    base = tmp_path / "killed"
    argv = [sys.executable, "-c", KILLED, str(inputs / "tiny.yaml"), str(base)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    deaths = [line.split() for line in done.stdout.splitlines()]
    assert len(deaths) >= 9
    assert deaths[0][1] == "False"
    assert [again for _, _, again in deaths] == ["0"] * len(deaths)
    whole = contents(base / str(len(deaths)))
    for steps, _, _ in deaths:
        assert contents(base / steps) == whole, steps


def contents(root: Path) -> dict[str, Any]:
    """All files but leases and what a killed writer has left; of the identity what must be the same everywhere."""
    found: dict[str, Any] = {
        name: content
        for name, content in snapshot(root).items()
        if not name.startswith("leases") and ".tmp-" not in name
    }
    identity = read_json(root / "campaign.json")
    found["campaign.json"] = {key: identity[key] for key in identity.keys() - {"id", "created"}}
    return found

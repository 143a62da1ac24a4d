"""What a user gets wrong: exit code 2, one message that says where and what to do, no traceback, nothing on disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.io import write

from hpcft.campaign.create import open_or_create
from hpcft.campaign.create_labels import open_or_create_labels
from hpcft.config.campaign import load_campaign
from hpcft.config.label_run import LabelRun
from hpcft.config.site import load_site
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import CAMPAIGN, write_campaign

HPCFT = str(Path(sys.executable).with_name("hpcft"))
SLURM_SITE = Path(__file__).parents[2] / "site-configs" / "test-cluster.yaml"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.yaml` and what it names, a model that knows silicon, and structures that others do not know."""
    from hpcft.models.files import save_model
    from hpcft.models.morse import MorsePotential

    folder = tmp_path_factory.mktemp("inputs")
    write_campaign(folder)
    save_model(folder / "silicon.pt", MorsePotential([14, 29], cutoff=4.0))
    write(folder / "iron.extxyz", [bulk("Cu", cubic=True), bulk("Fe", cubic=True)])
    write(folder / "silicon.extxyz", [bulk("Si", cubic=True)])
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """An empty folder to run commands in, with links to the inputs in a folder beside it."""
    for path in inputs.iterdir():
        (tmp_path / "inputs").mkdir(exist_ok=True)
        os.link(path, tmp_path / "inputs" / path.name)
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refusal(folder: Path, *arguments: object, **environment: str) -> str:
    """What the command says when it refuses; it may have changed nothing, here or in the inputs."""
    before = snapshot(folder.parent)
    done = subprocess.run(
        [HPCFT, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,  # a manager that does not refuse would run
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("hpcft: ")
    assert done.stderr.count("hpcft: ") == 1
    assert done.stderr.endswith("\n")
    assert snapshot(folder.parent) == before
    return done.stderr.removeprefix("hpcft: ").removesuffix("\n")


def changed(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A campaign file with changes: sections are merged, a key whose value is None is left out."""
    content: dict[str, Any] = dict(CAMPAIGN)
    for key, value in changes.items():
        merged = {**content[key], **value} if isinstance(value, dict) else value
        content[key] = (
            {k: v for k, v in merged.items() if v is not None} if isinstance(merged, dict) else merged
        )
    path = folder.parent / "inputs" / "changed.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        pytest.param(
            {"explore": {"temperature_K": None, "temperatur_K": 600}},
            "temperatur_K:",
            "explore.temperatur_K: unknown key; did you mean 'temperature_K'?",
            id="a misspelt key",
        ),
        pytest.param(
            {"foundation": "gone.pt"},
            "foundation:",
            r"foundation: there is no file .*/inputs/gone\.pt; correct the path",
            id="no model file",
        ),
        pytest.param(
            {"structures": "gone.extxyz"},
            "structures:",
            r"structures: there is no file .*/inputs/gone\.extxyz; correct the path",
            id="no structures",
        ),
        pytest.param(
            {"explore": {"temperature_K": -600}},
            "temperature_K:",
            "explore.temperature_K: must be greater than 0 K, but is -600",
            id="a negative temperature",
        ),
        pytest.param(
            {"label": {"shards": 0}}, "shards:", "label.shards: must be at least 1, but is 0", id="no shards"
        ),
        pytest.param(
            {"reference": {"elements": ["Cu", "Xx"]}},
            "- Xx",
            "reference.elements: 'Xx' is no chemical symbol",
            id="no element",
        ),
    ],
)
def test_a_mistake_in_the_campaign_file_is_named_by_its_line_and_key(
    changes: dict[str, Any], line: str, message: str, folder: Path
) -> None:
    file = changed(folder, changes)
    said = refusal(folder, "run", file)
    number = line_of(file, line if line != "- Xx" else "elements:")
    assert re.fullmatch(rf"{re.escape(str(file))}:{number}: {message}.*", said), said


def test_a_file_that_is_no_yaml_is_named_with_the_line(folder: Path) -> None:
    file = folder.parent / "inputs" / "broken.yaml"
    file.write_text("name: tiny\nrounds: [1\nseed: 2\n")
    assert refusal(folder, "run", file).startswith(f"{file}:3: not valid YAML")


def test_a_structure_with_an_element_that_the_model_does_not_know_is_named(folder: Path) -> None:
    said = refusal(folder, "run", changed(folder, {"structures": "iron.extxyz"}))
    assert (
        said
        == "iron.extxyz (structures) contains Fe, which the foundation model foundation.pt does not know (it knows Cu)"
    )


def test_a_structure_with_an_element_that_the_reference_does_not_know_is_named(folder: Path) -> None:
    file = changed(folder, {"structures": "silicon.extxyz", "foundation": "silicon.pt"})
    said = refusal(folder, "run", file)
    assert said == "silicon.extxyz (structures) contains Si, which ase.calculators.emt.EMT does not know"


@pytest.fixture
def tiny(folder: Path) -> CampaignFolder:
    """The folder of a campaign that was made and has not run."""
    file = folder.parent / "inputs" / "tiny.yaml"
    return open_or_create(load_campaign(file), file, folder / "tiny")


def test_a_folder_of_a_different_campaign_is_refused_with_the_difference(
    folder: Path, tiny: CampaignFolder
) -> None:
    file = changed(folder, {"seed": 8, "explore": {"timestep": 2}})
    said = refusal(folder, "run", file, "--dir", "tiny").splitlines()
    assert said[0] == f"{tiny.root} belongs to another campaign than {file} describes now:"
    assert said[1:3] == ["  explore.timestep: 4.0 -> 2.0", "  seed: 7 -> 8"]
    assert "--dir" in said[3]


def test_a_folder_of_somebodys_files_is_no_place_for_a_campaign(folder: Path) -> None:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter-1.tex").write_text("")
    said = refusal(folder, "run", folder.parent / "inputs" / "tiny.yaml", "--dir", "thesis")
    assert said.startswith("thesis exists and is not a campaign folder")


def test_a_slurm_site_on_a_machine_without_slurm_is_refused(folder: Path, tiny: CampaignFolder) -> None:
    file = folder.parent / "inputs" / "tiny.yaml"
    words = "site 'test-cluster' runs on Slurm, but sbatch, squeue, scancel, scontrol, srun cannot be found"
    no_slurm = {"PATH": str(folder)}
    assert refusal(folder, "run", file, "--site", SLURM_SITE, **no_slurm).startswith(words)
    assert refusal(folder, "resume", "tiny", "--site", SLURM_SITE, **no_slurm).startswith(words)
    write_json(tiny.site, load_site(SLURM_SITE).model_dump(mode="json"))
    assert refusal(folder, "resume", "tiny", **no_slurm).startswith(words)
    assert refusal(folder, "run", file, "--dir", "tiny", **no_slurm).startswith(words)


@pytest.mark.parametrize("command", ["status", "report", "resume", "cancel"])
def test_a_folder_that_is_no_campaign_is_named(command: str, folder: Path) -> None:
    said = refusal(folder, command, ".")
    assert said.startswith(f"{folder} is not a campaign folder (it has no campaign.json)")


def test_a_damaged_record_is_named_by_status_and_resume(folder: Path, tiny: CampaignFolder) -> None:
    plan = tiny.stage(0, "probe").plan
    plan.parent.mkdir(parents=True)
    plan.write_text('{"tasks": [')
    for command in ("status", "resume"):
        # A resume holds the lease when it reads the records: that is all that it may leave.
        before = {path for path in snapshot(folder) if "/leases/" not in path}
        done = subprocess.run(
            [HPCFT, command, "tiny"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"hpcft: {plan} is not valid JSON")
        assert done.stderr.count("\n") == 1
        after = {path for path in snapshot(folder) if "/leases/" not in path}
        assert after - before <= {str(tiny.site)}


def test_a_file_that_is_damaged_missing_or_something_else_is_named_by_inspect(
    folder: Path, tiny: CampaignFolder
) -> None:
    whole = (tiny.inputs / "structures.h5").read_bytes()
    (folder / "flipped.h5").write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    (folder / "text.h5").write_text("no HDF5")
    assert refusal(folder, "inspect", "flipped.h5", "--json").startswith("flipped.h5 is damaged")
    assert refusal(folder, "inspect", "text.h5").startswith("text.h5 is damaged or is no HDF5 file")
    assert refusal(folder, "inspect", "gone.h5").startswith("gone.h5 does not exist")


@pytest.fixture
def emt(folder: Path) -> Path:
    """A reference that is sound, with structures beside it."""
    file = folder.parent / "inputs" / "emt.yaml"
    file.write_text("calculator: emt\n")
    return file


def label_refusal(folder: Path, reference: object, *options: object, structures: object = None) -> str:
    """What `hpcft label` says when it refuses; it leaves nothing behind either."""
    return refusal(
        folder,
        "label",
        structures or folder.parent / "inputs" / "start.extxyz",
        "--reference",
        reference,
        *options,
    )


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("calculater: emt", 1, "calculater: unknown key; did you mean 'calculator'?"),
        ("calculator: emt\nlabel: {shard: 2}", 2, "label.shard: unknown key; did you mean 'shards'?"),
        ("calculator: emt\nlabel: 3", 2, "label: must be a section of keys and values, but is 3"),
        ("calculator: emt\ntime_limit_s: 0", 2, "time_limit_s: must be greater than 0 s, but is 0"),
        (
            "calculator: emt\nlabel: {workers: 4, resources: {cpus_per_rank: 2}}",
            2,
            "label.resources.cpus_per_rank: is 2, but 4 workers",
        ),
    ],
)
def test_a_mistake_in_the_file_of_a_reference_is_named_by_its_line_and_key(
    text: str, line: int, message: str, folder: Path, emt: Path
) -> None:
    emt.write_text(text)
    assert label_refusal(folder, emt).startswith(f"{emt}:{line}: {message}")


def test_structures_that_cannot_be_labelled_are_named_before_anything_is_written(
    folder: Path, emt: Path
) -> None:
    inputs = folder.parent / "inputs"
    said = label_refusal(folder, emt, structures=inputs / "silicon.extxyz")
    assert said == "silicon.extxyz contains Si, which emt does not know"
    said = label_refusal(folder, emt, structures=inputs / "gone.extxyz")
    assert said == f"{inputs / 'gone.extxyz'} does not exist or is no file; check the name."
    write(inputs / "cluster.extxyz", [bulk("Cu", cubic=True), Atoms("Cu2", [[0, 0, 0], [0, 0, 2.4]])])
    said = label_refusal(folder, emt, "--relax", "--cell", structures=inputs / "cluster.extxyz")
    assert said.startswith(
        "structure 1 of cluster.extxyz: The cell of Cu2 is to relax, but it is not periodic"
    )


def test_a_program_that_is_not_there_is_named_before_a_task_looks_for_it(folder: Path, emt: Path) -> None:
    (folder.parent / "inputs" / "Cu.upf").touch()
    emt.write_text(
        "calculator: espresso\n"
        f"arguments: {{pseudo_dir: {folder.parent / 'inputs'}, pseudopotentials: {{Cu: Cu.upf}}, input_data: {{ecutwfc: 20}}}}\n"
        "command: '{mpi} no-such-pw.x'\n"
    )
    said = label_refusal(folder, emt)
    assert said.startswith("reference.command: ")
    assert "no-such-pw.x" in said


def test_options_of_a_relaxation_without_one_are_refused(folder: Path, emt: Path) -> None:
    said = label_refusal(folder, emt, "--max-steps", 50)
    assert said == "--max-steps is for relaxations; add --relax, or leave it out"
    assert label_refusal(folder, emt, "--relax", "--fmax", 0).endswith(
        "relaxation.fmax: must be greater than 0 eV/Å, but is 0"
    )


def test_a_folder_of_other_labels_or_of_a_campaign_is_refused_with_the_difference(
    folder: Path, emt: Path, tiny: CampaignFolder
) -> None:
    assert "belongs to another campaign" in label_refusal(folder, emt, "--dir", "tiny")
    structures = folder.parent / "inputs" / "start.extxyz"
    run = LabelRun.model_validate(
        {"name": "start", "structures": structures, "reference": {"calculator": "emt"}}
    )
    open_or_create_labels(run, emt, folder / "run")
    said = label_refusal(folder, emt, "--dir", "run", "--shards", 3, "--relax")
    assert "\n  label.shards: 1 -> 3\n  relaxation: null -> {" in said


def test_labels_are_left_to_slurm_only_where_there_is_one(folder: Path, emt: Path) -> None:
    assert "slurm" in label_refusal(folder, emt, "--submit").lower()

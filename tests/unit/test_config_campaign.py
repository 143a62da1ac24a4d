from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from hpcft.config import campaign as config
from hpcft.config.campaign import Campaign, load_campaign
from hpcft.config.fingerprint import differences
from hpcft.config.training import Weights
from hpcft.config.validate import Section
from hpcft.config.yaml_file import dump_yaml, load_yaml
from hpcft.errors import UserError

VALID = """\
name: quickstart
rounds: 3
foundation: models/small.model
structures: start.xyz
reference:
  calculator: ase.calculators.emt.EMT
  arguments: {asap_cutoff: false}
  elements: [Pd, Au]
explore:
  temperature_K: 1200
  timestep: 4
  steps: 120
  frame_every: 10
select:
  frames: 32
label:
  shards: 2
train:
  epochs: 10
  weights:
    energy: 10
probe:
  steps: 100
  frames: 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid campaign file beside the files that it names."""
    return write_campaign(tmp_path)


def write_campaign(folder: Path) -> Path:
    (folder / "models").mkdir(parents=True)
    (folder / "models/small.model").write_text("a model")
    (folder / "start.xyz").write_text("structures")
    (folder / "other.xyz").write_text("other structures")
    path = folder / "quickstart.yaml"
    path.write_text(VALID)
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def problems(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_campaign(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def test_a_campaign_loads_with_defaults_and_absolute_files(file: Path) -> None:
    campaign = load_campaign(file)
    assert campaign.foundation == file.parent / "models/small.model"
    assert campaign.explore.temperature_K == 1200.0
    assert campaign.reference.elements == ("Pd", "Au")
    assert campaign.label == config.Label(shards=2)
    assert campaign.train.weights == Weights(energy=10)
    assert campaign.train.replay is None
    assert campaign.max_attempts == 3


def test_a_relative_name_of_the_campaign_file_finds_its_input_files(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent.parent)
    campaign = load_campaign(Path(file.parent.name) / file.name)
    assert campaign.structures == file.parent / "start.xyz"


def test_a_link_keeps_the_name_whose_suffix_tells_the_format(file: Path) -> None:
    (file.parent / "models/link.model").symlink_to("small.model")
    change(file, "models/small.model", "models/../models/link.model")
    assert load_campaign(file).foundation == file.parent / "models/link.model"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "temperature_K:",
            "temperatur_K:",
            "10: explore.temperatur_K: unknown key; did you mean 'temperature_K'?",
        ),
        ("rounds: 3", "Rounds: 3", "2: Rounds: unknown key; did you mean 'rounds'?"),
        ("    energy: 10", "    enrgy: 10", "21: train.weights.enrgy: unknown key; did you mean 'energy'?"),
        (
            "shards: 2",
            "shards: 2\n  speed: 3",
            "18: label.speed: unknown key; the keys known here are shards, ",
        ),
        ("rounds: 3\n", "", "1: rounds: this key is missing; add it: Rounds after which the campaign ends"),
        ("  timestep: 4\n", "", "9: explore.timestep: this key is missing; add it: Time step in fs"),
        ("1200", "-300", "10: explore.temperature_K: must be greater than 0 K, but is -300"),
        ("timestep: 4", "timestep: 0", "11: explore.timestep: must be greater than 0 fs, but is 0"),
        (
            "timestep: 4",
            "timestep: 4 fs",
            "11: explore.timestep: must be a number, but is '4 fs'; write the bare",
        ),
        ("steps: 120", "steps: 120.5", "12: explore.steps: must be a whole number, but is 120.5"),
        ("steps: 120", "steps: true", "12: explore.steps: must be a whole number, but is true"),
        (
            "steps: 120",
            "steps: four",
            "12: explore.steps: must be a whole number, but is 'four'; write it in digits",
        ),
        (
            "steps: 120",
            "steps: '120'",
            "12: explore.steps: must be a whole number, but is '120'; write the bare",
        ),
        (
            "steps: 120",
            "steps:",
            "12: explore.steps: must be a whole number, but is empty (null); write a value",
        ),
        ("steps: 120", "steps: [120]", "12: explore.steps: must be a whole number, but is a list"),
        ("shards: 2", "shards: 0", "17: label.shards: must be at least 1, but is 0"),
        ("rounds: 3", "rounds: 1001", "2: rounds: must be at most 1000, but is 1001"),
        ("rounds: 3", "rounds: 3\nseed: -1", "3: seed: must be at least 0, but is -1"),
        (
            "frames: 32",
            "frames: 32\n  exclude_first: 1",
            "16: select.exclude_first: must be less than 1, but is 1",
        ),
        (
            "frames: 32",
            "frames: 32\n  method: randum",
            "16: select.method: must be 'farthest-point' or 'random', but is",
        ),
        ("frames: 32", "frames: 32\n  method: randum", "did you mean 'random'?"),
        (
            "epochs: 10",
            "epochs: 10\n  precision: double",
            "20: train.precision: must be 'float32' or 'float64', but",
        ),
        ("epochs: 10", "epochs: 10\n  replay: {}", "20: train.replay.file: this key is missing"),
        (
            "shards: 2",
            "shards: 2\n  resources:\n    time_min: 0",
            "19: label.resources.time_min: must be at least 1 min",
        ),
        (
            "shards: 2",
            "resources: {memory_GB: -4}",
            "17: label.resources.memory_GB: must be greater than 0 GB",
        ),
        (
            "label:\n  shards: 2",
            "label:",
            "16: label: must be a section of keys and values, but is empty (null); write",
        ),
        ("label:\n  shards: 2", "label: 2", "16: label: must be a section of keys and values, but is 2"),
        (
            "frames: 4",
            "frames: 4\nevaluate: {bootstrap: 10}",
            "25: evaluate.bootstrap: must be at least 100, but is 10",
        ),
        ("start.xyz", "strat.xyz", "4: structures: there is no file {folder}/strat.xyz; correct the path"),
        ("models/small.model", "models", "3: foundation: {folder}/models is a folder; name a file"),
        (
            "models/small.model",
            '"a\\0b"',
            "3: foundation: 'a\\x00b' is not a file name: it has control characters",
        ),
        (
            "models/small.model",
            "~nobody-of-that-name/x",
            "3: foundation: ~nobody-of-that-name/x cannot be looked up",
        ),
        ("models/small.model", "[a, b]", "3: foundation: must be a file name, but is a list"),
        ("start.xyz", "x" * 300, "4: structures: "),
        (
            "calculators.emt.EMT",
            "calculators.emt EMT",
            "6: reference.calculator: 'ase.calculators.emt EMT' is not allowed",
        ),
        ("ase.calculators.emt.EMT", "EMT", "name a class with its module, such as ase.calculators.emt.EMT"),
        (
            "ase.calculators.emt.EMT",
            "os.system('id')",
            "6: reference.calculator: \"os.system('id')\" is not allowed",
        ),
        ("[Pd, Au]", "[Pd, au]", "8: reference.elements: 'au' is no chemical symbol; write Au"),
        ("[Pd, Au]", "[Pd, Qq]", "8: reference.elements: 'Qq' is no chemical symbol"),
        ("[Pd, Au]", "[Pd, Pd]", "8: reference.elements: Pd is listed twice"),
        (
            "[Pd, Au]",
            "[]",
            "8: reference.elements: the list is empty; write at least one chemical symbol",
        ),
        ("[Pd, Au]", "Pd", "8: reference.elements: must be a list, such as [a, b], but is 'Pd'"),
        (
            "elements: [Pd, Au]",
            "elements:\n  - Pd\n  - 3",
            "10: reference.elements[1]: must be text, but is 3; put quotes",
        ),
    ],
)
def test_a_bad_value_is_told_with_line_key_and_remedy(file: Path, old: str, new: str, problem: str) -> None:
    change(file, old, new)
    (found,) = problems(file)
    assert problem.format(folder=file.parent) in found


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "steps: 120",
            "steps: 9",
            "12: explore.steps: 9 steps with a frame every 10 give no frame; raise steps",
        ),
        (
            "steps: 120",
            "steps: 120\n  max_temperature_K: 1000",
            "13: explore.max_temperature_K: must be greater than temperature_K (1200 K)",
        ),
        (
            "frames: 32",
            "frames: 1",
            "17: label.shards: 2 shards for 1 frames (select.frames) would leave some empty",
        ),
        (
            "frames: 32",
            "frames: 32\n  exclude_first: 0.95",
            "16: select.exclude_first: leaves none of the 12 frames",
        ),
        (
            "epochs: 10",
            "epochs: 10\n  ranks: 8",
            "18: train.batch_size: a batch of 4 leaves some of the 8 ranks",
        ),
        ("energy: 10", "{energy: 0, forces: 0}", "20: train.weights: energy, forces and stress are all 0"),
        (
            "energy: 10",
            "{energy: [[0, 0]], forces: 0}",
            "20: train.weights: energy, forces and stress are all 0",
        ),
        (
            "epochs: 10",
            "epochs: 10\n  relaxation: {weight: 1}",
            "20: train.relaxation: needs structures to relax; name their file in relaxations.train",
        ),
        (
            "epochs: 10",
            "epochs: 10\n  replay: {file: other.xyz, weight: [[0, 1], [0, 2]]}",
            "20: train.replay.weight: the epochs of a schedule must increase from 0 on; they are [0.0, 0.0]",
        ),
        (
            "epochs: 10",
            "epochs: 10\n  replay: {file: other.xyz, weight: [0, 1]}",
            "20: train.replay.weight: must be a number, or a schedule such as [[0, 0.0], [5, 1.0]]",
        ),
        (
            "epochs: 10",
            "epochs: 10\n  replay: {file: other.xyz, weight: [[0, -1]]}",
            "20: train.replay.weight: the values of a schedule must be at least 0",
        ),
        (
            "shards: 2",
            "shards: 2\nrelaxations:\n  train: other.xyz\n  test: other.xyz",
            "20: relaxations.test: is the file of relaxations.train",
        ),
        (
            "frames: 4",
            "frames: 51",
            "24: probe.frames: 51 frames do not fit into the 50 steps that discard leaves of 100",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_told_with_line_key_and_remedy(
    file: Path, old: str, new: str, problem: str
) -> None:
    change(
        file,
        f"weights:\n    {old}" if "energy" in new else old,
        f"weights: {new}" if "energy" in new else new,
    )
    (found,) = problems(file)
    assert problem in found


RELAXATION = "shards: 2\nrelaxations: {train: other.xyz}"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("weight: 1, steps: 0", "train.relaxation.steps: must be at least 1, but is 0"),
        (
            "weight: 1, steps: [[0, 5], [3, 0]]",
            "train.relaxation.steps: the values of a schedule must be at least 1",
        ),
        ("weight: 1, steps: 7.5", "train.relaxation.steps: must be a whole number, but is 7.5"),
        ("weight: yes", "train.relaxation.weight: must be a number, or a schedule"),
        ("weight: 1, engine: implicit, last: 3", "train.relaxation.last: engine: implicit does not unroll"),
        (
            "weight: 1, map: fire, learn_step_size: global",
            "train.relaxation.learn_step_size: the map fire has no",
        ),
        ("weight: 1, engine: adjont", "but is 'adjont'; did you mean 'adjoint'?"),
    ],
)
def test_a_bad_training_through_relaxations_is_told_with_its_key(file: Path, keys: str, problem: str) -> None:
    change(file, "shards: 2", RELAXATION)
    change(file, "epochs: 10", f"epochs: 10\n  relaxation: {{{keys}}}")
    (found,) = problems(file)
    assert problem in found


def test_weights_and_steps_may_follow_a_schedule_and_relaxations_may_be_learnt_from_alone(file: Path) -> None:
    change(file, "shards: 2", RELAXATION)
    change(
        file,
        "epochs: 10\n  weights:\n    energy: 10",
        "epochs: 10\n  weights: {energy: 0, forces: 0}\n  relaxation: {weight: [[0, 0], [5, 1]], steps: [[0, 5], [9, 40]]}",
    )
    train = load_campaign(file).train
    assert train.relaxation is not None
    assert train.relaxation.weight == ((0.0, 0.0), (5.0, 1.0))
    assert train.relaxation.steps == ((0.0, 5.0), (9.0, 40.0))
    stored = Campaign.model_validate(json.loads(json.dumps(load_campaign(file).normalised())))
    assert stored.train.relaxation is not None
    assert stored.train.relaxation.steps == train.relaxation.steps


def test_a_problem_with_a_default_stands_on_the_line_of_its_section(file: Path) -> None:
    change(file, "epochs: 10", "ranks: 8\n  epochs: 10")
    assert problems(file)[0].startswith("18: train.batch_size: ")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(file: Path) -> None:
    change(file, "rounds: 3", "rounds: 0")
    change(file, "start.xyz", "nothing.xyz")
    change(file, "1200", "hot")
    change(file, "  frames: 32", "  frames: 32\n  metod: random")
    change(file, "epochs: 10", "batch_size: 4")
    found = problems(file)
    assert [re.match(r"\d+: [\w.]+", problem).group() for problem in found] == [  # type: ignore[union-attr]
        "2: rounds",
        "4: structures",
        "10: explore.temperature_K",
        "16: select.metod",
        "19: train.epochs",
    ]


def test_a_misspelt_required_key_is_one_problem_and_not_two(file: Path) -> None:
    change(file, "timestep:", "time_step:")
    assert problems(file) == ["11: explore.time_step: unknown key; did you mean 'timestep'?"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "-rf",
        ".hidden",
        "a/b",
        "../a",
        "a b",
        "a\nb",
        "a\n",
        "%j",
        "a%A",
        "'a'",
        "$(id)",
        "a;b",
        "é",
        "a" * 65,
    ],
)
def test_a_hostile_name_is_refused(file: Path, name: str) -> None:
    data = load_yaml(file).data
    file.write_text(dump_yaml({**data, "name": name}))
    (found,) = problems(file)
    assert found.startswith("1: name: ")
    assert "is not allowed: use at most 64 of A-Z a-z 0-9 . _ -" in found


def test_control_characters_of_a_hostile_key_do_not_reach_the_terminal(file: Path) -> None:
    change(file, "shards: 2", '"\\e[2J\\nquickstart.yaml:1: all is well": 2')
    (found,) = problems(file)
    assert found.isprintable()


def test_numbers_mean_the_same_with_and_without_a_decimal_point(file: Path) -> None:
    before = load_campaign(file).fingerprint()
    change(file, "1200", "1.2e3")
    assert load_campaign(file).fingerprint() == before


def test_the_fingerprint_depends_on_content_and_not_on_folder_comments_or_written_defaults(
    tmp_path: Path,
) -> None:
    one = write_campaign(tmp_path / "one")
    other = write_campaign(tmp_path / "elsewhere/other")
    change(other, "rounds: 3", "# a comment\nseed: 0\nrounds: 3")
    change(other, "1200", "1200\n  max_temperature_K: 6000")
    assert load_campaign(one).fingerprint() == load_campaign(other).fingerprint()
    change(other, "seed: 0", "seed: 1")
    assert load_campaign(one).fingerprint() != load_campaign(other).fingerprint()


def test_differences_name_each_key_path_and_both_values(file: Path) -> None:
    old = load_campaign(file).normalised()
    (file.parent / "models/small.model").write_text("another model")
    change(file, "1200", "900")
    change(file, "rounds: 3", "rounds: 5")
    new = load_campaign(file).normalised()
    found = differences(old, new)
    assert found[0] == "explore.max_temperature_K: 6000.0 -> 4500.0"
    assert found[1] == "explore.temperature_K: 1200.0 -> 900.0"
    assert found[2].startswith("foundation: the file's content has changed (sha256:")
    assert found[3:] == ["probe.temperature_K: 1200.0 -> 900.0", "rounds: 3 -> 5"]
    assert differences(old, old) == []


def test_differences_name_keys_that_only_one_side_has() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {}, "d": None}) == [
        "a.b: 1 -> not there",
        "c: 2 -> not there",
        "d: not there -> null",
    ]


def test_a_stored_campaign_is_read_back_without_its_files(file: Path) -> None:
    campaign = load_campaign(file)
    stored = campaign.model_dump_json()
    campaign.foundation.unlink()
    assert Campaign.model_validate_json(stored) == campaign
    with pytest.raises(UserError, match=r"small\.model: cannot be read"):
        campaign.fingerprint()


def test_input_files_are_listed_by_their_keys(file: Path) -> None:
    change(file, "epochs: 10", "epochs: 10\n  replay: {file: other.xyz}")
    campaign = load_campaign(file)
    assert list(campaign.files()) == [("foundation",), ("structures",), ("train", "replay", "file")]


def test_every_stage_has_resources(file: Path) -> None:
    change(file, "shards: 2", "shards: 2\n  resources: {time_min: 5}")
    campaign = load_campaign(file)
    assert {stage: campaign.resources_for(stage).time_min for stage in config.STAGES} == {
        **dict.fromkeys(config.STAGES, 60),
        "label": 5,
        "reference": 5,
    }


def test_defaults_that_follow_other_keys(file: Path) -> None:
    campaign = load_campaign(file)
    assert campaign.explore.temperature_limit_K == 6000
    assert campaign.probe_temperature_K == 1200
    change(file, "  frames: 4", "  frames: 4\n  temperature_K: 1600")
    change(file, "1200", "1200\n  max_temperature_K: 9000")
    campaign = load_campaign(file)
    assert campaign.explore.temperature_limit_K == 9000
    assert campaign.probe_temperature_K == 1600


@pytest.mark.parametrize(
    ("steps", "frames", "discard", "discarded", "every"),
    [(100, 4, 0.5, 50, 12), (100, 10, 0.9, 90, 1), (7, 3, 0.5, 4, 1), (10, 10, 0.0, 0, 1)],
)
def test_the_frames_of_a_probe_fit_behind_what_is_discarded(
    steps: int, frames: int, discard: float, discarded: int, every: int
) -> None:
    probe = config.Probe(steps=steps, frames=frames, discard=discard)
    assert (probe.discarded_steps, probe.frame_every) == (discarded, every)
    assert discarded + frames * every <= steps


def test_a_campaign_cannot_be_changed(file: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_campaign(file).rounds = 4


def test_every_key_has_a_description() -> None:
    sections = [
        value for value in vars(config).values() if isinstance(value, type) and issubclass(value, Section)
    ]
    assert len(sections) > 10
    for section in sections:
        assert section.__doc__
        for key, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{key}"


def test_the_configuration_imports_nothing_heavy() -> None:
    program = "import sys, hpcft.config.site, hpcft.config.pretrain; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "hpcft.config.campaign" in loaded
    assert not {"ase", "h5py", "mace", "numpy", "torch"} & set(loaded)


def test_a_shared_store_need_not_exist_lies_beside_the_campaign_file_and_decides_nothing(file: Path) -> None:
    alone = load_campaign(file)
    file.write_text(VALID.replace("label:\n", "label:\n  store: ../labels\n  quarantine: false\n"))
    sharing = load_campaign(file)
    assert sharing.label.store == file.parent.parent.resolve() / "labels"
    assert sharing.files() == alone.files()
    assert sharing.fingerprint() == alone.fingerprint()
    (file.parent / "labels.h5").touch()
    file.write_text(VALID.replace("label:\n", "label:\n  store: labels.h5\n"))
    with pytest.raises(UserError, match=r"label\.store: .*labels\.h5 is a file; name a folder"):
        load_campaign(file)

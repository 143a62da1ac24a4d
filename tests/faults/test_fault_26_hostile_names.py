"""No name that a user, a site or a folder has reaches Slurm or a shell as anything but itself."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from submitit.slurm.slurm import _make_sbatch_string

from hpcft.campaign.create import open_or_create
from hpcft.campaign.scheduler import Scheduler
from hpcft.cluster.executors import JobSpec, slurm_parameters
from hpcft.config.campaign import STAGES, Campaign, Resources, load_campaign
from hpcft.config.site import Site
from hpcft.errors import UserError
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import CAMPAIGN, write_campaign

HOSTILE = [
    "a\n#SBATCH --uid=0",
    "a\r#SBATCH --uid=0",
    "a\u2028#SBATCH --uid=0",
    "a\0b",
    "\x1b[2J",
    "%j",
    "-rf",
    "--wrap=id",
    "a|b",
    "a b",
    "a'b",
    'a"b',
    "a`id`",
    "$(id)",
    "${HOME}",
    "a;id",
    "a&id",
    "a>b",
    "a\\b",
    "a/../../b",
    "..",
    "~root",
    "*",
    "#",
    "",
    "é",
    "x" * 1000,
]

KEYS = {
    "account", "array", "comment", "constraint", "cpus-per-task", "error", "hold", "job-name", "mem", "nodes",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time", "wckey",
}  # fmt: skip


def site_with(**hostile: Any) -> Site:
    """A Slurm site in which each name is `plain` but for those given."""
    words = dict.fromkeys(
        ("partition", "account", "qos", "constraint", "wckey", "option", "srun", "value"), "plain"
    )
    words |= hostile
    return Site.model_validate(
        {
            "name": "site",
            "executor": "slurm",
            "environment": {"VARIABLE": words["value"]},
            "setup": [words.get("setup", "true")],
            "slurm": {
                **{key: words[key] for key in ("partition", "account", "qos", "constraint", "wckey")},
                "options": {"comment": words["option"]},
                "srun_arguments": [words["srun"]],
            },
        }
    )


def batch_script(site: Site, folder: Path = Path("/runs/plain")) -> str:
    spec = JobSpec("hpcft-0123abcd-r0-probe-1", "probe", 2, Resources(memory_GB=1.0), folder)
    return str(_make_sbatch_string("run-it", folder, map_count=3, **slurm_parameters(site, spec)))


def directives(script: str) -> dict[str, str]:
    """What sbatch reads: the lines that begin with #SBATCH before the first command, as option and value."""
    found = {}
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH"))
            assert len(words) == 1, line
            key, _, value = words[0].removeprefix("--").partition("=")
            assert key not in found
            found[key] = value
        elif line and not line.startswith("#"):
            break
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_campaign_a_stage_or_a_site_with_a_hostile_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        Campaign.model_validate({**CAMPAIGN, "name": name})
    with pytest.raises(ValidationError):
        Site.model_validate({"name": name, "executor": "local"})
    with pytest.raises(ValidationError):
        Site.model_validate(
            {"name": "a", "executor": "slurm", "slurm": {"partition": "a"}, "stages": {name: {}}}
        )


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "x" * 1000])
def test_an_option_of_sbatch_or_a_variable_with_a_hostile_name_is_refused(name: str) -> None:
    """submitit writes the keys of its additional parameters as they are."""
    with pytest.raises(ValidationError):
        Site.model_validate(
            {"name": "a", "executor": "slurm", "slurm": {"partition": "a", "options": {name: "1"}}}
        )
    with pytest.raises(ValidationError):
        Site.model_validate({"name": "a", "executor": "local", "environment": {name: "1"}})


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize("where", ["option", "srun", "value", "setup"])
def test_a_value_with_a_control_character_is_refused(where: str, character: str) -> None:
    with pytest.raises(ValidationError, match="control characters"):
        site_with(**{where: f"a{character}b"})


texts = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=40), st.text("a|'\"\\$`;&%#=,() \n-", max_size=12)
)


@settings(max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from(["partition", "account", "qos", "constraint", "wckey", "option", "srun", "value"]),
        texts,
    )
)
@example({"value": 'it\'s $HOME `id` \\ "x" #', "option": 'it\'s $HOME `id` \\ "x" #', "srun": "--x=it's a"})
def test_every_value_of_a_site_is_refused_or_stands_in_the_batch_script_as_itself(
    words: dict[str, str],
) -> None:
    try:
        site = site_with(**words)
    except ValidationError:
        return
    script = batch_script(site)
    found = directives(script)
    assert found.keys() == KEYS
    for key in ("partition", "account", "qos", "constraint", "wckey"):
        assert found[key] == words.get(key, "plain")
    assert found["comment"] == words.get("option", "plain")
    [command] = [line for line in script.split("\n") if line.startswith("srun ")]
    assert shlex.split(command)[-2:] == [words.get("srun", "plain"), "run-it"]
    [export] = [line for line in script.split("\n") if line.startswith("export VARIABLE=")]
    assert shlex.split(export)[1] == f"VARIABLE={words.get('value', 'plain')}"


def test_the_shell_gives_jobs_the_value_of_a_variable_to_the_letter() -> None:
    value = 'it\'s $HOME `id` \\ "x" $(id) ; # *'
    [export] = [line for line in batch_script(site_with(value=value)).split("\n") if "VARIABLE" in line]
    shown = subprocess.run(
        ["bash", "-c", f'{export}\nprintf %s "$VARIABLE"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout == value


@pytest.mark.parametrize("name", ["a b", "a'b", 'a"b', "$(id)", "a;id", "#", "*", "-rf", "é", "a|b", "a=b"])
def test_an_unpleasant_name_of_a_folder_stands_in_the_batch_script_as_itself(name: str) -> None:
    folder = Path("/runs") / name / "attempts"
    script = batch_script(site_with(), folder)
    found = directives(script)
    assert found.keys() == KEYS
    assert found["output"] == f"{folder}/%A_%a_0_log.out"
    assert found["error"] == f"{folder}/%A_%a_0_log.err"
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True).returncode == 0


FOLDERS = ["a\n#SBATCH --uid=0", "a\r", "a\u2028b", "\x1b[2J", "%j", "%A", "100%", "a\\b"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_campaign_folder_that_slurm_would_read_as_something_else_is_refused(
    name: str, file: Path, tmp_path: Path
) -> None:
    for root in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(UserError) as caught:
            open_or_create(load_campaign(file), file, root)
        assert repr(str(root)) in str(caught.value)
        assert str(caught.value).isprintable()
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_renamed_to_a_hostile_name_is_not_resumed(file: Path, tmp_path: Path) -> None:
    folder = open_or_create(load_campaign(file), file, tmp_path / "tiny")
    hostile = folder.root.rename(tmp_path / "%j")
    before = sorted(hostile.rglob("*"))
    hpcft = str(Path(sys.executable).with_name("hpcft"))
    done = subprocess.run([hpcft, "resume", hostile], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("hpcft: the campaign folder ")
    assert sorted(hostile.rglob("*")) == before


def test_a_job_name_is_made_of_what_hpcft_chose_itself(tmp_path: Path) -> None:
    """So it can be told from others in the queue, whose lines are cut at `|`."""
    folder = CampaignFolder(tmp_path)
    write_json(folder.identity, {"id": "0123abcd", "name": "any | name"})
    campaign = Campaign.model_validate(CAMPAIGN)
    scheduler = Scheduler(folder, campaign, Site(name="local", executor="local"))
    for stage in STAGES:
        name = scheduler.job_name(3, stage, 12)
        assert name == f"hpcft-0123abcd-r3-{stage}-12"
        assert re.fullmatch(r"[a-z0-9-]+", name)
    assert os.sep not in name

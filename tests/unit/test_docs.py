"""The documentation says what the code says."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.build import bulk
from typer.testing import CliRunner

from hpcft.cli.main import app
from hpcft.config.label_run import ReferenceFile
from hpcft.config.reference import SHORT_NAMES, Reference
from hpcft.config.site import Site
from hpcft.config.training import Train, TrainingRun
from hpcft.labelling.presets import PRESETS
from hpcft.labelling.requirements import lacks
from hpcft.models.files import export_mace, load_model

ROOT = Path(__file__).parents[2]


def yaml_examples(name: str) -> list[dict[str, object]]:
    return [yaml.safe_load(text) for text in yaml_texts(ROOT / "docs" / name)]


def yaml_texts(document: Path) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)


def test_the_table_of_keys_is_what_the_configuration_s_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_keys.py"))["text"]()
    assert (ROOT / "docs" / "keys.md").read_text() == made, "run: python docs/make_keys.py"


def test_a_key_that_takes_words_lists_them_where_its_text_does_not_explain_each() -> None:
    rows = (ROOT / "docs" / "keys.md").read_text().splitlines()
    (executor,) = [row for row in rows if row.startswith("| `executor` |")]
    assert executor.endswith("Allowed: `local`, `slurm`. |")
    (ensemble,) = [row for row in rows if row.startswith("| `explore.ensemble` |")]
    assert "nvt-svr: velocity" in ensemble and "Allowed" not in ensemble


def test_the_examples_of_sites_are_valid_sites() -> None:
    first, whole_nodes, in_a_container = [
        Site.model_validate(example) for example in yaml_examples("sites.md")
    ]
    assert first.slurm_for("train").gpus_per_rank == 1
    assert first.slurm_for("label").partition == "cpu"
    assert whole_nodes.slurm_for("explore").tasks_per_job == 4
    assert Path(in_a_container.python[2]).name == "in-container"


def test_the_examples_of_a_campaign_s_sections_are_valid() -> None:
    (training,) = yaml_examples("campaigns.md")
    (recommended,) = yaml_examples("relaxation.md")
    for example in (training, recommended):
        Train.model_validate(example["train"])


@pytest.mark.parametrize(
    "example", yaml_examples("labelling.md"), ids=lambda example: example["reference"]["calculator"]
)
def test_the_examples_of_references_take_every_setting_that_they_name(
    example: dict[str, dict[str, Any]],
) -> None:
    settings = Reference.model_validate(example["reference"])
    wanted = (
        PRESETS[settings.calculator].calculator if settings.calculator in PRESETS else settings.calculator
    )
    if importlib.util.find_spec(wanted.split(".")[0]) is None:
        pytest.skip(f"{wanted} is not installed")
    problems = [lack.what for lack in lacks(settings, (), "mpi-here 4") if lack.key == "arguments"]
    # The files of an example are nowhere: that is all that may be wrong with it.
    assert [what for what in problems if "/path/to" not in what and "does not exist" not in what] == []


def test_every_short_name_has_an_example() -> None:
    assert set(SHORT_NAMES) <= {
        example["reference"]["calculator"] for example in yaml_examples("labelling.md")
    }


def test_the_example_of_a_reference_without_a_campaign_is_valid() -> None:
    (example,) = yaml_examples("label-command.md")
    assert ReferenceFile.model_validate(example).reference.time_limit_s == 7200


def test_the_example_of_a_training_is_valid(tmp_path: Path) -> None:
    (example,) = yaml_examples("training.md")
    (tmp_path / "replay.extxyz").touch()
    assert TrainingRun.model_validate(example, context={"folder": tmp_path}).energy_zero == "fit"


def test_the_example_of_molecular_dynamics_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, program = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "md.md").read_text(), re.DOTALL)
    crystals = [bulk("Cu", a=a, cubic=True) for a in (3.6, 3.7)]
    (tmp_path / "example.py").write_text(program)
    runpy.run_path(str(tmp_path / "example.py"), init_globals={"structures": crystals})
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_every_link_to_a_file_of_the_repository_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / document).parent / link).exists()]
    assert not missing


def test_the_campaign_that_readme_begins_with_passes_hpcft_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = yaml_texts(ROOT / "README.md")
    (tmp_path / "campaign.yaml").write_text(text)
    shutil.copy(ROOT / "campaigns" / "quickstart" / "start.extxyz", tmp_path)
    shutil.copy(ROOT / "campaigns" / "quickstart" / "vacancies-test.extxyz", tmp_path / "defects.extxyz")
    foundation = load_model(ROOT / "campaigns" / "foundation" / "emt-metals.pt")
    export_mace(foundation, tmp_path / "my-foundation.model")
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(tmp_path / "trusted.json"))
    monkeypatch.chdir(tmp_path)
    for command in (["model", "import", "my-foundation.model"], ["check", "campaign.yaml"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (done.output, done.exception)
    assert "campaign my-campaign: 3 rounds" in done.output and "no problems found" in done.output


def test_every_command_that_readme_names_exists() -> None:
    commands = set(re.findall(r"hpcft (\w+)", (ROOT / "README.md").read_text()))
    runner = CliRunner()
    for command in sorted(commands - {"iterates"}):
        assert runner.invoke(app, [command, "--help"]).exit_code == 0, command

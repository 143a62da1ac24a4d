"""The settings of `hpcft label`: which of them make it another run, and what its jobs ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcft.cluster.jobs import job_kinds, job_of, max_tasks
from hpcft.config.label_run import LabelRun, ReferenceFile
from hpcft.config.site import Site, Slurm
from hpcft.storage.campaign_folder import stages_of


@pytest.fixture
def structures(tmp_path: Path) -> Path:
    (tmp_path / "in.extxyz").write_text("1\n\nCu 0 0 0\n")
    return tmp_path / "in.extxyz"


def run(structures: Path, **changes: Any) -> LabelRun:
    base = {"name": "in", "structures": structures, "reference": {"calculator": "emt"}}
    return LabelRun.model_validate({**base, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"max_attempts": 9},
        {"reference": {"calculator": "emt", "time_limit_s": 5.0, "memory_limit_GB": 2.0}},
        {
            "label": {
                "tolerated_failures": 0.5,
                "resources": {"time_min": 5, "cpus_per_rank": 4},
                "workers": 4,
            }
        },
        {"label": {"store": "/nowhere/labels"}},
        {"reference": {"calculator": "emt", "environment": {"OMP_NUM_THREADS": "2"}}},
    ],
)
def test_patience_and_resources_make_no_other_run(changes: dict[str, Any], structures: Path) -> None:
    assert run(structures, **changes).fingerprint() == run(structures).fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": {"calculator": "emt", "arguments": {"asap_cutoff": True}}},
        {"label": {"shards": 2}},
        {"relaxation": {}},
        {"reference": {"calculator": "emt", "environment": {"VASP_PP_PATH": "/pots/54"}}},
    ],
)
def test_what_decides_the_labels_or_their_tasks_makes_another_run(
    changes: dict[str, Any], structures: Path
) -> None:
    assert run(structures, **changes).fingerprint() != run(structures).fingerprint()


def test_the_structures_count_by_content_and_not_by_name(structures: Path) -> None:
    before = run(structures).fingerprint()
    moved = structures.rename(structures.with_name("elsewhere.extxyz"))
    assert run(moved).fingerprint() == before
    moved.write_text("1\n\nCu 0 0 1\n")
    assert run(moved).fingerprint() != before


def test_its_jobs_are_those_of_the_label_stage_and_the_controller(structures: Path) -> None:
    settings = run(structures, label={"shards": 8, "resources": {"cpus_per_rank": 4, "memory_GB": 3.0}})
    site = Site(
        name="there",
        executor="slurm",
        slurm=Slurm(partition="all"),
        stages={"label": {"partition": "cpu"}},  # type: ignore[dict-item]
    )
    assert job_kinds(settings) == ("label", "controller")
    assert stages_of(0, settings.kind) == settings.stages
    job = job_of(site, "label", settings)
    assert (job.asked.partition, job.processes, job.cpus, job.memory_GB) == ("cpu", 1, 4, 3.0)
    assert max_tasks(settings, "label") == 8


def test_the_reference_of_a_file_is_that_of_a_campaign() -> None:
    file = ReferenceFile.model_validate(
        {
            "calculator": "espresso",
            "arguments": {"kpts": [2, 2, 2]},
            "ladder": [{"a": 1}],
            "label": {"shards": 3},
        }
    )
    assert file.reference.calculator == "espresso"
    assert file.reference.arguments == {"kpts": [2, 2, 2]}
    assert file.reference.ladder == ({"a": 1},)
    assert file.label.tolerated_failures == 0.0

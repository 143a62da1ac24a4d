"""The small campaign against Quantum ESPRESSO, from its file to its end."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.config.campaign import load_campaign
from hpcft.labelling.item import Item
from hpcft.labelling.journal import Record, read_journals
from hpcft.labelling.label import Label
from hpcft.labelling.reference import reference_from
from hpcft.labelling.shard import SHARD_FILE, read_shard
from hpcft.labelling.worker import label_items

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import hpcft_to_end

CAMPAIGN = Path(__file__).parents[2] / "campaigns" / "silicon-vacancy-dft.yaml"


def records_of(root: Path) -> Iterator[Record]:
    for shard in sorted(root.rglob(SHARD_FILE)):
        yield from read_shard(shard.parent)


def test_the_campaign_s_inputs_are_there_and_nothing_is_missing_on_this_machine(tmp_path: Path) -> None:
    if shutil.which("pw.x") is None:
        pytest.skip("Quantum ESPRESSO is not installed")
    said = hpcft_to_end("check", CAMPAIGN, "--dir", tmp_path / "campaign", cwd=tmp_path)
    assert "no problems found" in said


@pytest.mark.nightly
def test_a_model_of_tersoff_s_silicon_learns_that_of_dft(tmp_path: Path) -> None:
    if shutil.which("pw.x") is None:
        pytest.skip("Quantum ESPRESSO is not installed")
    root = tmp_path / "campaign"
    hpcft_to_end("run", CAMPAIGN, "--dir", root, cwd=tmp_path)
    status = json.loads(hpcft_to_end("status", root, "--json", cwd=tmp_path))
    assert status["state"] == "finished"
    first, *_, last = status["results"]
    assert last["failed_labels"] == 0
    assert last["training_labels"] >= load_campaign(CAMPAIGN).select.frames
    for metric, factor in (
        ("energy_bias_meV_per_atom", 0.01),
        ("force_mae_meV_per_A", 0.5),
        ("delta_q", 0.8),
    ):
        before, after = (abs(results["metrics"][metric]["value"]) for results in (first, last))
        assert after < factor * before, metric
    assert_is_the_label_that_pw_gives(
        next(r for r in records_of(root) if isinstance(r.result, Label)), tmp_path
    )


def assert_is_the_label_that_pw_gives(record: Record, folder: Path) -> None:
    reference = reference_from(load_campaign(CAMPAIGN).reference)
    label_items([Item.single_point(record.atoms)], reference, folder / "again")
    (again,) = read_journals(folder / "again").values()
    assert again.key == record.key
    assert again.result.energy == pytest.approx(record.result.energy, abs=1e-6)
    assert again.result.forces_n3 == pytest.approx(record.result.forces_n3, abs=1e-4)
    assert record.result.energy / len(record.atoms) == pytest.approx(
        -106.4, abs=2.0
    )  # LDA with this pseudopotential

"""A reference that was out of order for a while: the campaign stops and says so, and resume labels what had failed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import hpcft, hpcft_to_end, kill, processes_of, write_campaign


def test_resume_tries_failed_labels_again_once_the_reference_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    licence, root = tmp_path / "licence", tmp_path / "campaign"
    monkeypatch.setenv("HPCFT_TEST_LICENCE", str(licence))
    reference = {"calculator": "calculators.LicensedEMT", "elements": ["Cu"]}
    campaign = write_campaign(tmp_path / "inputs", {"reference": reference, "rounds": 1})

    stopped = hpcft("run", campaign, "--dir", root, cwd=tmp_path)
    output, _ = stopped.communicate()
    assert stopped.returncode == 1, output
    assert "of 10 reference calculations of round 0" in output
    assert "calculator" in output and "hpcft resume" in output

    licence.touch()
    counts = resumed_until_labelled(root)
    assert counts["failed"] == 0
    assert counts["done"] == counts["items"] == 10


@pytest.mark.nightly
def test_retry_tries_what_did_not_converge_with_another_ladder(tmp_path: Path) -> None:
    root = tmp_path / "campaign"
    arguments = {"calls": str(tmp_path / "calls"), "mixing": 0.7}
    reference = {"calculator": "calculators.UnsettledEMT", "arguments": arguments, "elements": ["Cu"]}
    campaign = write_campaign(tmp_path / "inputs", {"reference": reference, "rounds": 1})
    stopped = hpcft("run", campaign, "--dir", root, cwd=tmp_path)
    output, _ = stopped.communicate()
    assert stopped.returncode == 1, output
    assert "10 x scf" in output
    said = hpcft_to_end(
        "retry",
        root,
        "--cause",
        "scf",
        "--set",
        "reference.ladder=[{mixing: 0.3}, {mixing: 0.1}]",
        cwd=tmp_path,
    )
    assert "will try failed labels again" in said
    assert resumed_until_labelled(root)["done"] == 10


def resumed_until_labelled(root: Path) -> dict[str, Any]:
    """Goes on in round 0 until its labels are there; returns their counts."""
    product, log = root / "round-000" / "reference" / "product.json", root.parent / "log"
    with log.open("w") as file:
        resumed = hpcft("resume", root, cwd=root.parent, output=file)
        while resumed.poll() is None and not product.exists():
            time.sleep(0.2)
        kill([resumed.pid, *processes_of(root)])
        resumed.wait()
    assert product.exists(), log.read_text()
    return dict(json.loads(product.read_text()))

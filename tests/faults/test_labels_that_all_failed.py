"""A reference that was out of order for a while: the campaign stops and says so, and resume labels what had failed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import hpcft, kill, processes_of, write_campaign


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
    product = root / "round-000" / "reference" / "product.json"
    with (tmp_path / "log").open("w") as log:
        resumed = hpcft("resume", root, cwd=tmp_path, output=log)
        while resumed.poll() is None and not product.exists():
            time.sleep(0.2)
        kill([resumed.pid, *processes_of(root)])
        resumed.wait()
    assert product.exists(), (tmp_path / "log").read_text()
    counts = json.loads(product.read_text())
    assert counts["failed"] == 0
    assert counts["done"] == counts["items"] == 10

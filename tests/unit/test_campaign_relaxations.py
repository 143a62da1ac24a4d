"""A whole small campaign on this machine that learns from relaxations: what it reports about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CAMPAIGN, hpcft_to_end, write_campaign

RELAXATION = {"weight": [[0, 0.0], [1, 0.05]], "every": 2, "batch_size": 2, "steps": [[1, 3], [3, 6]]}
CASES: dict[str, dict[str, Any]] = {
    "with the cell, at the minimum": {"cell": True, "engine": "implicit"},
    "with FIRE, of which the last steps count": {"map": "fire", "last": 4},
    "with step sizes that are learned": {"learn_step_size": "per-element"},
    "with the frames on the way as labels": {"learn_frames": True},
}


EVERY_NIGHT = [pytest.param(case, marks=pytest.mark.nightly) for case in list(CASES)[1:]]


@pytest.mark.parametrize("case", [*list(CASES)[:1], *EVERY_NIGHT])
def test_a_campaign_reports_its_relaxations_after_k_steps_and_converged(tmp_path: Path, case: str) -> None:
    changes = dict(CASES[case])
    cell, learn_frames = changes.pop("cell", False), changes.pop("learn_frames", False)
    file = write_campaign(
        tmp_path / "inputs",
        {
            "rounds": 1,
            "relaxations": {**CAMPAIGN["relaxations"], "cell": cell, "learn_frames": learn_frames},
            "train": {**CAMPAIGN["train"], "relaxation": {**RELAXATION, **changes}},
        },
    )
    root = tmp_path / "campaign"
    said = hpcft_to_end("run", file, "--dir", root, cwd=tmp_path)
    assert ("relaxed structures, and what they cost" in said) == (changes.get("engine") != "implicit")
    for round_ in (0, 1):
        product = json.loads((root / f"round-{round_:03d}/evaluate/product.json").read_text())
        metrics = product["metrics"]
        assert metrics["delta_q"]["value"] > 0
        assert ("delta_q_steps" in metrics) == (changes.get("engine") != "implicit")
        assert ("cell_distance" in metrics) == cell
        assert product["relaxations"] == 2
    trained = json.loads((root / "round-001/train/product.json").read_text())
    assert trained["relaxations_refused"] == []
    labelled = json.loads((root / "round-001/label/product.json").read_text())
    assert trained["labels"] == labelled["frames_done"] + labelled.get("relaxation_frames", 0)
    assert (trained["labels"] > CAMPAIGN["select"]["frames"]) == learn_frames
    assert trained["last"]["relaxation/dropped"] == 0
    learned = "learn_step_size" in changes
    assert ("relaxation/step_size" in trained["last"]) == learned
    if learned:
        assert trained["step_size"]["elements"] == [29]
        assert trained["step_size"]["step_sizes"] != [0.05]

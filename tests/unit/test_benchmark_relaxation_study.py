"""The relaxation study in sizes small enough for a test: that it measures what it says, not what the figures are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEYS = {
    "system", "method", "seed", "delta_q_k", "delta_q_converged", "delta_q_k_before",
    "delta_q_converged_before",
    "force_mae", "force_mae_before", "force_mae_out", "energy_mae", "energy_mae_out", "wrong_minimum", "num_labels",
    "num_relaxations", "step_size", "steps", "kind",
}  # fmt: skip


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("relaxation_study")


@pytest.mark.nightly
def test_the_study_writes_a_row_for_every_method_and_resumes_where_it_was_stopped(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The models are so bad that nothing would come to rest.
    monkeypatch.setattr(importlib.import_module("study_training"), "MOST_STEPS", 3)
    tiny = study.Sizes(
        per_crystal=1,
        pretraining_steps=2,
        num_train=2,
        num_test=2,
        force_steps=2,
        force_steps_first=0,
        force_steps_long=3,
        bptt_steps=1,
        steps=2,
    )
    arguments = ["--json", str(tmp_path / "rows.json"), "--quick", "--resume"]
    only_two = study.parse([*arguments, "--methods", "none", "forces"])
    rows = study.study(only_two, tiny)
    assert [row["method"] for row in rows] == ["none", "forces"]
    trained: list[str] = []
    fine_tuned = study.fine_tuned
    monkeypatch.setattr(
        study,
        "fine_tuned",
        lambda problem, method, sizes: trained.append(method) or fine_tuned(problem, method, sizes),
    )
    rows = study.study(study.parse(arguments), tiny)
    assert trained == ["forces-long", "bptt", "combined"]
    assert [row["method"] for row in rows] == ["none", "forces", "forces-long", "bptt", "combined"]
    assert all(row.keys() >= KEYS for row in rows)
    assert len({row["num_labels"] for row in rows[1:]}) == 1
    assert rows[0]["delta_q_converged"] == rows[0]["delta_q_converged_before"]
    assert all(row["delta_q_converged"] != rows[0]["delta_q_converged"] for row in rows[1:])
    assert [table.title for table in study.report(rows)] == ["main", "mean over systems"]


def test_a_reduction_is_that_of_the_mean_and_its_interval_knows_that_structures_are_paired(
    study: Any,
) -> None:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(3):
        before = random.uniform(1, 10, 20)
        rows.append({"delta_q_k_each": list(0.6 * before), "delta_q_k_each_before": list(before)})
    found = study.reduction([rows, rows[:1]], "delta_q_k")
    assert [found.value, found.low, found.high] == pytest.approx([40, 40, 40])


@pytest.mark.parametrize("name", ["cu-ag-vacancies", "si-defects", "cu-au-cell", "pd-ag-surface"])
def test_what_is_relaxed_has_no_overlaps_and_differs_from_draw_to_draw(study: Any, name: str) -> None:
    system, random = study.SYSTEMS[name], np.random.default_rng(0)
    first, second = system.start(random), system.start(random)
    for atoms in (first, second):
        distances = atoms.get_all_distances(mic=True)
        assert distances[np.triu_indices(len(atoms), 1)].min() > 1.4
        assert set(atoms.symbols) <= set(system.elements)
    assert len(first) != len(second) or not np.allclose(first.positions, second.positions)

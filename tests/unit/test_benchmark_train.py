"""The benchmark of training on a tiny model: that it measures what it says, not what the figures are."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train.py"


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("train")


def measured(tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The figures in the file, and the table."""
    found = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(found), *options]
    table = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    return json.loads(found.read_text()), table


@pytest.mark.nightly
def test_a_checkpoint_is_timed_beside_the_epochs_and_what_was_not_run_is_absent(tmp_path: Path) -> None:
    found, table = measured(tmp_path, "--only", "checkpoint")
    assert "checkpoint by epoch" in table
    assert found["checkpoint_share"] > 0
    low, high = found["checkpoint_share_range"]
    assert low <= found["checkpoint_share"] <= high
    settings, raw = found["settings"], found["repetitions_checkpoint"]
    assert len(raw["epochs"]) == settings["epochs"] - 1  # the first compiles
    assert not [name for name in found if name.startswith(("epoch_", "ddp_", "grad_"))]


def test_ratios_are_of_the_two_runs_of_a_seed_and_seconds_of_all_epochs(train: Any) -> None:
    def run(program: str, seed: int, *seconds: float) -> Any:
        epochs = [train.Mark(wall=s, cpu=s / 2) for s in seconds]
        return train.Trained(program, seed, epochs, peak_MiB=100.0 * seed, valid_force_mae=1.0)

    runs = [run("hpcft", 1, 1.0, 1.0), run("mace", 1, 2.0, 2.0), run("hpcft", 2, 6.0), run("mace", 2, 8.0)]
    found = train.compared(runs)
    assert found["epoch_ratio"] == pytest.approx(0.625)
    assert found["epoch_ratio_range"] == found["epoch_cpu_ratio_range"] == [0.5, 0.75]
    assert found["epoch_seconds_hpcft"] == 1.0
    assert found["epoch_cpu_seconds_mace"] == 1.0
    assert found["peak_MiB_hpcft_range"] == [100.0, 200.0]


def test_a_program_that_starts_from_another_model_is_refused(train: Any, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    before = {"loss": 0.8, "force_mae_meV_per_A": 50.0, "energy_mae_meV_per_atom": 7.0}
    # A sum of one batch's mean, divided by its 8 structures.
    row = {"mode": "eval", "epoch": None, "loss": 0.1, "mae_f": 0.05, "mae_e_per_atom": 0.007}
    log = tmp_path / "results" / "tuned_run-1_train.txt"
    log.write_text(json.dumps(row))
    assert train.difference_at_start(tmp_path, before, train.QUICK) < 1e-12
    log.write_text(json.dumps(row | {"mae_f": 0.051}))
    with pytest.raises(SystemExit, match="do not start from the same"):
        train.difference_at_start(tmp_path, before, train.QUICK)


@pytest.mark.nightly
def test_the_benchmark_trains_with_both_programs_and_on_two_ranks(tmp_path: Path) -> None:
    found, table = measured(tmp_path)
    assert "beside mace" in table
    assert found["start_rel_diff"] < 1e-6
    assert found["grad_rel_diff_2"] < 1e-12
    for name in ("hpcft", "mace"):
        assert found[f"epoch_seconds_{name}"] > 0
        assert found[f"epoch_cpu_seconds_{name}"] > 0
        assert found[f"peak_MiB_{name}"] > 100
        assert 0 < found[f"valid_force_mae_{name}"] < 1.5 * found["valid_force_mae_before"]
    for name in (
        "epoch_ratio",
        "epoch_cpu_ratio",
        "ddp_speedup_2",
        "ddp_cpu_speedup_2",
        "ddp_speedup_2_batch_16",
        "checkpoint_share",
    ):
        assert found[name] > 0

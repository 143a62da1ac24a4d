"""The benchmark of a GPU, without one: that all its parts run, and that it says so where there is no GPU to measure."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.py"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("on_gpu")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def check_results(found: dict[str, Any]) -> None:
    """On one device everything is the same but for single precision."""
    for name, value in found["correct"].items():
        assert value < (1e-4 if "float32" in name else 1e-9), name
    assert found["correct"]["pairs that only one neighbour list has"] == 0


@pytest.mark.nightly
def test_results_are_compared_and_kept_part_by_part(tmp_path: Path) -> None:
    ended = run(
        "--device", "cpu", "--tiny", "--json", str(tmp_path / "found.json"), "--only", "correct", "bptt"
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    check_results(found)
    assert found["bptt"]["adjoint, k=2, s"] > 0
    assert (found["failed"], found["left out"]) == ({}, [])
    assert "gradient of a relaxation off by, adjoint" in ended.stdout


@pytest.mark.nightly
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    ended = run("--device", "cpu", "--tiny", "--json", str(tmp_path / "found.json"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    check_results(found)
    for engine in ("hpcft", "ase"):
        assert found["md"][f"2 × 32 atoms, {engine}, µs per step and atom"] > 0
    assert found["training"]["plain, torch.float32, structures per s"] > 0
    assert found["fusers"]["as hpcft, ms a force evaluation"] > 0


def test_a_part_that_fails_and_one_that_comes_too_late_leave_the_others(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(_: Any) -> Any:
        yield {"first": 1}
        raise RuntimeError("no such kernel")

    parts = {"a": fails, "b": lambda _: iter([{"second": 2}])}
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    (tmp_path / "foundation.model").touch()
    bench = on_gpu.Bench(tmp_path, on_gpu.TINY, "cpu", None, lambda line: None)
    kept: list[Any] = []
    found = on_gpu.measure_all(bench, list(parts), 60.0, lambda so_far: kept.append(json.dumps(so_far)))
    assert (found["a"], found["b"]) == ({"first": 1}, {"second": 2})
    assert json.loads(kept[0])["a"] == {"first": 1}  # what is there is kept at once
    assert json.loads(kept[-1]) == found
    assert "no such kernel" in found["failed"]["a"]
    late = on_gpu.measure_all(bench, ["b"], -1.0, kept.append)
    assert late["left out"] == ["b"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses() -> None:
    ended = run()
    assert ended.returncode == 1
    assert "torch sees no GPU here" in ended.stderr

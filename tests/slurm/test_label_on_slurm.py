"""Labels of a file through sbatch on a real Slurm."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from calculators import lines_of
from tiny import hpcft, hpcft_to_end, kill, submissions_of

pytestmark = pytest.mark.slurm

SITE = Path(__file__).parents[2] / "site-configs" / "test-cluster.yaml"
NUM_STRUCTURES = 24


@pytest.fixture
def base(slurm_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with structures and a reference whose finished calculations are written down in `calls`."""
    for name, value in slurm_cluster.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "faults"), prepend=":")
    monkeypatch.setenv("HPCFT_TEST_CALLS", str(tmp_path / "calls"))
    write(tmp_path / "in.extxyz", [copper(seed) for seed in range(NUM_STRUCTURES)])
    (tmp_path / "ref.yaml").write_text(
        "calculator: calculators.SlowEMT\ntime_limit_s: 60\nlabel: {shards: 3}\n"
    )
    return tmp_path


def copper(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def command(root: str, *more: object) -> tuple[object, ...]:
    return "label", "in.extxyz", "--reference", "ref.yaml", "--dir", root, "--site", SITE, *more


def forces(path: Path) -> list[np.ndarray]:
    return [atoms.arrays["REF_forces"] for atoms in read(path, ":")]


def test_labels_on_slurm_survive_their_manager_and_are_those_of_this_machine(base: Path) -> None:
    with (base / "first.log").open("w") as log:
        manager = hpcft(*command("run"), cwd=base, output=log)
        while len(lines_of(base / "calls")) < 3 and manager.poll() is None:
            time.sleep(0.05)
        kill([manager.pid])
        assert manager.wait() == -9
    hpcft_to_end(*command("run"), cwd=base)
    calls = lines_of(base / "calls")
    assert len(calls) == len(set(calls)) == NUM_STRUCTURES
    assert len(submissions_of(base / "run")) == 1
    hpcft_to_end("label", "in.extxyz", "--reference", "ref.yaml", "--dir", "here", cwd=base)
    for one, other in zip(
        forces(base / "run/labels.extxyz"), forces(base / "here/labels.extxyz"), strict=True
    ):
        assert np.array_equal(one, other)


def test_labels_are_made_with_no_process_on_the_login_node(base: Path) -> None:
    said = hpcft_to_end(*command("run", "--submit"), cwd=base)
    assert said.rstrip().splitlines()[-1].startswith("controller job ")
    deadline = time.monotonic() + 300
    while json.loads(hpcft_to_end("status", "run", "--json", cwd=base))["state"] != "finished":
        assert time.monotonic() < deadline, hpcft_to_end("status", "run", cwd=base)
        time.sleep(2)
    assert len(forces(base / "run" / "labels.extxyz")) == NUM_STRUCTURES

"""The benchmark of one shared file: what needs no h5py with MPI. (Its measure needs one, which takes minutes to build.)"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parallel_hdf5.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("parallel_hdf5")


def test_without_an_h5py_that_has_mpi_it_says_how_to_come_by_one() -> None:
    said = subprocess.run(
        [sys.executable, str(SCRIPT)], check=False, capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 1
    assert "h5py is built without MPI" in said.stderr
    assert "HDF5_MPI=ON" in SCRIPT.read_text()


def test_a_file_that_a_kill_left_is_judged_by_the_numbers_in_it(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "all.h5"
    assert benchmark.judge(path) == "not begun"
    energies = np.repeat(np.arange(3.0), benchmark.FRAMES)
    for wrong, end in ((None, "sound"), (150, "wrong numbers, no error")):
        if wrong is not None:
            energies[wrong] = 0.0
        with h5py.File(path, "w") as file:
            file["0000/potential_energy"] = energies
        assert benchmark.judge(path) == end
    path.write_bytes(path.read_bytes()[:600])
    assert benchmark.judge(path) == "unreadable"

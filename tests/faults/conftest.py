"""What the tests of faults share: calculators by dotted path, and processes that must be gone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
from ase import Atoms
from ase.build import bulk

sys.path.insert(0, str(Path(__file__).parent))

from dying_jobs import disturb, undisturbed, undisturbed_in_two
from slurm_campaign import campaign, campaign_on, slurm_cluster

__all__ = ["campaign", "campaign_on", "disturb", "slurm_cluster", "undisturbed", "undisturbed_in_two"]

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def calculators_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `calculators.CountingEMT` be a dotted path here and in every process that a test starts."""
    paths = [HERE, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def metals() -> Callable[..., list[Atoms]]:
    """Rattled cells of four atoms, one of each given symbol, each different from all others."""

    def build(*symbols: str) -> list[Atoms]:
        cells = []
        for seed, symbol in enumerate(symbols):
            atoms = bulk(symbol, cubic=True)
            atoms.rattle(0.05, seed=seed)
            cells.append(atoms)
        return cells

    return build


@pytest.fixture
def wait_until_gone() -> Callable[[Iterable[int]], None]:
    """Return once none of the processes runs any more; a zombie has stopped running."""

    def is_running(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def wait(pids: Iterable[int]) -> None:
        deadline = time.monotonic() + 120
        while alive := [pid for pid in pids if is_running(pid)]:
            if time.monotonic() > deadline:
                pytest.fail(f"processes {alive} are still there")
            time.sleep(0.01)

    return wait

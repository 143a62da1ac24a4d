"""Quantum ESPRESSO and GPAW in two shards at once, of which one is killed: all labels that physics allows, each paid for once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.espresso import Espresso, EspressoProfile
from calculators import lines_of

from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Item
from hpcft.labelling.journal import Record, journal_path, read_journals
from hpcft.labelling.label import Label
from hpcft.labelling.reference import Reference

PSEUDO_DIR = Path("/usr/share/espresso/pseudo")
SETTINGS = {"ecutwfc": 16, "conv_thr": 1e-8, "electron_maxstep": 30}

# pw.x, which writes down what it has computed; five atoms are more than this build can take.
PW = """#!/bin/sh
grep -q 'nat *= *5$' espresso.pwi && kill -s SEGV $$
pw.x "$@" || exit $?
md5sum < espresso.pwi >> {calls}
"""

SHARD = """
import sys
from pathlib import Path
import test_real_dft as test
from hpcft.labelling.worker import label_items

folder, attempt, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
items, reference = getattr(test, sys.argv[4])(folder)
label_items(items, reference, folder, attempt=attempt, workers=workers, scratch=folder / "scratch")
"""


def silicon(strain: float) -> Atoms:
    return bulk("Si", a=5.43 * (1 + strain))


def espresso_shard(folder: Path) -> tuple[list[Item], Reference]:
    """Three that converge, one each that does not converge, takes too long, or crashes the code."""
    rattled, large, five = bulk("Si", cubic=True), bulk("Si", cubic=True).repeat(3), bulk("Si", cubic=True)
    rattled.rattle(0.1, seed=0)  # at Gamma without smearing the gap closes, and the charge sloshes for ever
    del five[5:]
    structures = [silicon(0.0), rattled, large, silicon(0.02), five, silicon(-0.02)]
    arguments = {
        "profile": {"command": str(folder.parent / "pw-telling"), "pseudo_dir": str(PSEUDO_DIR)},
        "pseudopotentials": {"Si": "Si.pz-vbc.UPF"},
        "input_data": SETTINGS,
        "kpts": None,
    }
    reference = Reference("ase.calculators.espresso.Espresso", arguments, time_limit_s=15)
    return [Item.single_point(atoms) for atoms in structures], reference


def gpaw_shard(folder: Path) -> tuple[list[Item], Reference]:
    cubic = bulk("Si", cubic=True)
    cubic.rattle(0.02, seed=1)
    arguments = {"mode": {"name": "pw", "ecut": 200}, "xc": "LDA", "kpts": [1, 1, 1], "txt": "gpaw.txt"}
    return [Item.single_point(atoms) for atoms in (silicon(0.0), cubic)], Reference("gpaw.GPAW", arguments)


def start(folder: Path, attempt: int, which: str, workers: int = 1) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SHARD, str(folder), str(attempt), str(workers), which]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def causes(records: dict[int, Record]) -> dict[int, str]:
    return {index: r.result.cause for index, r in records.items() if isinstance(r.result, Failure)}


@pytest.fixture
def codes(tmp_path: Path) -> None:
    """The real codes, or a failure that says how to get them."""
    assert shutil.which("pw.x") and (PSEUDO_DIR / "Si.pz-vbc.UPF").is_file(), (
        "needs Quantum ESPRESSO: make packages"
    )
    assert importlib.util.find_spec("gpaw"), "needs GPAW: pip install -e '.[gpaw]'"
    telling = tmp_path / "pw-telling"
    telling.write_text(PW.format(calls=tmp_path / "calls"))
    telling.chmod(0o755)


def test_two_codes_label_at_once_and_a_killed_shard_pays_for_nothing_twice(
    tmp_path: Path, codes: None
) -> None:
    espresso, gpaw = tmp_path / "espresso", tmp_path / "gpaw"
    in_gpaw = start(gpaw, 0, "gpaw_shard")
    first = start(espresso, 0, "espresso_shard")
    journal = journal_path(espresso, 0)
    while first.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    paid = len(lines_of(tmp_path / "calls"))
    assert paid >= 1
    while any((espresso / "scratch").iterdir()):  # with the shard, what it had started is gone
        time.sleep(0.01)
    assert start(espresso, 1, "espresso_shard", workers=2).wait() == 0
    assert in_gpaw.wait() == 0

    records = read_journals(espresso)
    assert causes(records) == {1: "scf", 2: "time-limit", 4: "crash"}
    assert sorted(records) == list(range(6))
    calls = lines_of(tmp_path / "calls")
    assert len(calls) == len(set(calls)) == 3
    energies = []
    for index in (0, 3, 5):
        label = records[index].result
        assert isinstance(label, Label)
        assert label.stress_6 is not None
        np.testing.assert_allclose(label.forces_n3, 0, atol=1e-4)  # by symmetry
        energies.append(label.energy)
    assert energies[0] == pytest.approx(alone(tmp_path / "alone"), abs=1e-6)
    assert len({round(energy, 3) for energy in energies}) == 3

    in_gpaw_labels = read_journals(gpaw)
    assert causes(in_gpaw_labels) == {}
    two, eight = (record.result for record in in_gpaw_labels.values())
    assert isinstance(two, Label)
    assert isinstance(eight, Label)
    assert np.abs(eight.forces_n3).max() > 0.05
    assert list((espresso / "scratch").iterdir()) == list((gpaw / "scratch").iterdir()) == []


def alone(folder: Path) -> float:
    """The same by ASE alone."""
    calculator = Espresso(
        profile=EspressoProfile("pw.x", PSEUDO_DIR),
        pseudopotentials={"Si": "Si.pz-vbc.UPF"},
        input_data=SETTINGS,
        kpts=None,
        directory=folder,
    )
    atoms = silicon(0.0)
    atoms.calc = calculator
    return float(atoms.get_potential_energy(force_consistent=True))

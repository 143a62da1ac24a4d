"""Fault 31: a self-consistent field that does not converge gives no label, whatever else the code prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Item
from hpcft.labelling.journal import read_journals
from hpcft.labelling.label import Label
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import finish_shard, read_shard
from hpcft.labelling.worker import label_items

PSEUDO_DIR = Path("/usr/share/espresso/pseudo")


@pytest.fixture(autouse=True)
def quantum_espresso() -> None:
    """The real code, or a failure that says how to get it."""
    installed = shutil.which("pw.x") is not None and (PSEUDO_DIR / "Si.pz-vbc.UPF").is_file()
    assert installed, (
        "needs Quantum ESPRESSO: apt-get install quantum-espresso quantum-espresso-data (or make packages)"
    )


SMEARING = {"input_data": {"occupations": "smearing", "smearing": "mv", "degauss": 0.01}}


def espresso(command: str = "pw.x", ladder: tuple[dict[str, Any], ...] = (), **options: Any) -> Reference:
    """Silicon at Gamma without smearing, so that disorder closes the gap and the charge sloshes for ever."""
    arguments = {
        "profile": {"command": command, "pseudo_dir": str(PSEUDO_DIR)},
        "pseudopotentials": {"Si": "Si.pz-vbc.UPF"},
        "input_data": {"ecutwfc": 16, "conv_thr": 1e-8, "electron_maxstep": 30, **options},
        "kpts": None,
    }
    return Reference("ase.calculators.espresso.Espresso", arguments, ladder=ladder)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def rattled() -> Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=0)
    return atoms


def test_an_unconverged_structure_is_failed_with_cause_scf_while_the_shard_goes_on(
    tmp_path: Path, rattled: Atoms
) -> None:
    items = [Item.single_point(rattled), Item.single_point(bulk("Si"))]
    summary = label_items(items, espresso(), tmp_path, scratch=tmp_path / "scratch")
    assert (summary.num_done, summary.num_failed, summary.causes) == (1, 1, {"scf": 1})
    failure = read_journals(tmp_path)[0].result
    assert isinstance(failure, Failure)
    assert "convergence NOT achieved" in failure.output or "JOB DONE." in failure.output
    finish_shard(tmp_path)
    assert [record.index for record in read_shard(tmp_path)] == [1]
    assert [failed["cause"] for failed in json.loads((tmp_path / "failures.json").read_text())] == ["scf"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_wrapper_that_loses_the_exit_status_does_not_make_it_a_label(
    tmp_path: Path, rattled: Atoms
) -> None:
    command = "sh -c 'pw.x \"$@\"; true' pw.x"
    summary = label_items([Item.single_point(rattled)], espresso(command), tmp_path)
    assert summary.causes == {"scf": 1}


def test_the_ladder_gives_the_label_that_the_first_settings_could_not(tmp_path: Path, rattled: Atoms) -> None:
    summary = label_items([Item.single_point(rattled)], espresso(ladder=(SMEARING,)), tmp_path)
    record = read_journals(tmp_path)[0]
    assert summary.num_done == 1
    assert record.rung == 1
    assert isinstance(record.result, Label)
    assert record.result.energy_kind == "free_energy"
    assert record.result.stress_6 is not None


@pytest.mark.parametrize("value", [False, ".false.", "false"])
def test_the_option_that_hides_it_is_refused_before_anything_runs(value: object) -> None:
    with pytest.raises(UserError, match="scf_must_converge"):
        espresso(scf_must_converge=value)


def test_the_time_limit_that_a_user_puts_around_the_code_is_told_from_a_crash(
    tmp_path: Path, rattled: Atoms
) -> None:
    summary = label_items([Item.single_point(rattled)], espresso("timeout -k 5 0.05 pw.x"), tmp_path)
    assert summary.causes == {"time-limit": 1}


def test_an_input_that_the_code_rejects_is_no_problem_of_convergence(tmp_path: Path, rattled: Atoms) -> None:
    summary = label_items([Item.single_point(rattled)], espresso(ecutwfc=-1), tmp_path)
    assert summary.causes == {"bad-input": 1}

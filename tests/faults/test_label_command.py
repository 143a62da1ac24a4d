"""`hpcft label` for real, on this machine: a file of structures in, a file of labels out, through kills and failures."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read, write
from calculators import lines_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import history_of, hpcft, hpcft_to_end, kill, processes_of

Metals = Callable[..., list[Atoms]]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run; finished calculations are written down in `calls` there."""
    monkeypatch.setenv("HPCFT_TEST_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("HPCFT_TEST_LICENCE", str(tmp_path / "licence"))
    return tmp_path


def wish(base: Path, structures: list[Atoms], calculator: str, **more: Any) -> tuple[object, ...]:
    """The command for these structures and this reference, with the folder `run`."""
    write(base / "in.extxyz", structures)
    (base / "ref.yaml").write_text(yaml.safe_dump({"calculator": calculator, "time_limit_s": 60, **more}))
    return "label", "in.extxyz", "--reference", "ref.yaml", "--dir", "run"


def run(base: Path, *arguments: object) -> tuple[int, str]:
    process = hpcft(*arguments, cwd=base)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def sizes(count: int) -> list[Atoms]:
    """Copper cells of one to three times four atoms, each different, that say which they are."""
    cells = []
    for number in range(count):
        atoms = bulk("Cu", cubic=True).repeat((1 + number % 3, 1, 1))
        atoms.rattle(0.05, seed=number)
        atoms.info |= {"config_type": f"cell {number}", "weight": 2.0}
        cells.append(atoms)
    return cells


def assert_emt_labels(base: Path) -> None:
    """Every structure of the input, in its order, has EMT's own numbers."""
    labels = read(base / "run" / "labels.extxyz", ":")
    for atoms, given in zip(labels, read(base / "in.extxyz", ":"), strict=True):
        assert np.array_equal(atoms.positions, given.positions)
        given.calc = EMT()
        assert atoms.info["REF_energy"] == pytest.approx(given.get_potential_energy(), abs=1e-10)
        assert atoms.arrays["REF_forces"] == pytest.approx(given.get_forces(), abs=1e-10)
        assert atoms.info["REF_stress"] == pytest.approx(given.get_stress(), abs=1e-10)


def test_every_structure_of_a_file_is_labelled_in_its_place_and_never_again(base: Path) -> None:
    structures = [*sizes(14), *sizes(5)]  # some stand there twice
    command = (*wish(base, structures, "calculators.CountingEMT"), "--shards", 3)
    said = hpcft_to_end(*command, cwd=base)
    assert re.search(r"done +19\n", said)
    assert_emt_labels(base)
    labels = read(base / "run" / "labels.extxyz", ":")
    assert [atoms.info["config_type"] for atoms in labels] == [a.info["config_type"] for a in structures]
    assert len(lines_of(base / "calls")) == 14
    assert len(json.loads((base / "run/round-000/label/plan.json").read_text())["tasks"]) == 3

    hpcft_to_end(*command, cwd=base)
    assert len(lines_of(base / "calls")) == 14
    assert "all is well" in hpcft_to_end("verify", "run", cwd=base)
    assert hpcft_to_end("status", "run", cwd=base).startswith("in: finished\n")
    hpcft_to_end("archive", "run", "--out", "run.tar", cwd=base)


def test_a_manager_that_is_killed_in_the_middle_is_followed_by_one_that_pays_for_nothing_twice(
    base: Path,
) -> None:
    command = (*wish(base, sizes(60), "calculators.SlowEMT"), "--shards", 2)
    with (base / "first.log").open("w") as log:
        manager = hpcft(*command, cwd=base, output=log)
        while len(lines_of(base / "calls")) < 5 and manager.poll() is None:
            time.sleep(0.05)
        kill([manager.pid])
        assert manager.wait() == -9
    hpcft_to_end(*command, cwd=base)
    calls = lines_of(base / "calls")
    assert len(calls) == len(set(calls)) == 60
    assert_emt_labels(base)


@pytest.mark.nightly
def test_when_everything_is_killed_only_what_was_in_flight_is_computed_again(base: Path) -> None:
    command = (*wish(base, sizes(60), "calculators.SlowEMT"), "--shards", 2)
    with (base / "first.log").open("w") as log:
        manager = hpcft(*command, cwd=base, output=log)
        while len(lines_of(base / "calls")) < 10 and manager.poll() is None:
            time.sleep(0.05)
        kill([manager.pid, *processes_of(base / "run")])
        manager.wait()
    hpcft_to_end(*command, cwd=base)
    calls = lines_of(base / "calls")
    assert len(set(calls)) == 60
    assert len(calls) <= 60 + 2  # one in each task
    assert_emt_labels(base)


def test_failures_are_listed_by_cause_and_tried_again_when_the_user_says_so(
    base: Path, metals: Metals
) -> None:
    structures = metals("Cu", "Au", "Ni", "Au", "Cu")
    command = (*wish(base, structures, "calculators.LicensedForGoldEMT"), "--shards", 2)
    status, said = run(base, *command)
    assert status == 1, said
    assert re.search(r"failed: \w+ +2\n", said)
    assert "hpcft resume run" in said
    done = read(base / "run" / "labels.extxyz", ":")
    assert [atoms.info["index"] for atoms in done] == [0, 2, 4]
    failed = read(base / "run" / "failed.extxyz", ":")
    assert [atoms.info["index"] for atoms in failed] == [1, 3]
    assert all("no licence for 'Au', says its server" in atoms.info["message"] for atoms in failed)
    assert "stopped: 2 of 5 reference calculations" in hpcft_to_end("status", "run", cwd=base)

    again, _ = run(base, *command)
    assert again == 1, "the same command asks for the same, and what has failed has an answer"
    assert len(lines_of(base / "calls")) == 3

    (base / "licence").touch()
    (cause,) = {atoms.info["cause"] for atoms in failed}
    said = hpcft_to_end("retry", "run", "--cause", cause, "--set", "reference.time_limit_s=30", cwd=base)
    assert "reference.time_limit_s: 60.0 -> 30" in said
    hpcft_to_end("resume", "run", cwd=base)
    assert_emt_labels(base)
    assert len(lines_of(base / "calls")) == 5
    assert not (base / "run" / "failed.extxyz").exists()


def test_what_failed_in_a_finished_run_is_tried_again_and_everything_else_is_kept(
    base: Path, metals: Metals
) -> None:
    structures = metals("Cu", "Au", "Ni", "Pt")
    tolerant = {"label": {"tolerated_failures": 0.25}}
    command = (*wish(base, structures, "calculators.LicensedForGoldEMT", **tolerant), "--shards", 2)
    said = hpcft_to_end(*command, cwd=base)
    assert re.search(r"failed: \w+ +1\n", said)
    before = (base / "run" / "labels.extxyz").read_text()
    assert len(read(base / "run" / "labels.extxyz", ":")) == 3
    history = history_of(base / "run")

    status, refusal = run(base, "retry", "run", "--cause", "scf")
    assert status == 2
    assert "no failed task of cause scf" in refusal
    assert hpcft_to_end("status", "run", cwd=base).startswith("in: finished\n"), "and so it stays"

    (base / "licence").touch()
    [retry, resume] = re.findall(r"hpcft ((?:retry|resume) run)(?: &&|\n)", said)
    assert "1 will try failed labels again" in hpcft_to_end(*retry.split(), cwd=base)
    assert "1 of 2 tasks done" in hpcft_to_end("status", "run", cwd=base)
    said = hpcft_to_end(*resume.split(), cwd=base)
    assert "failed:" not in said
    assert "ended without a result" not in said
    assert_emt_labels(base)
    assert len(lines_of(base / "calls")) == 4, "nothing is paid for twice"
    assert set(before.splitlines()) <= set((base / "run" / "labels.extxyz").read_text().splitlines())
    assert history.keys() < history_of(base / "run").keys(), "how it came about before is kept"
    assert "all is well" in hpcft_to_end("verify", "run", cwd=base)
    status, refusal = run(base, *retry.split())
    assert status == 2
    assert "nothing in it has failed" in refusal


def test_a_relaxation_that_failed_in_a_finished_run_goes_on_from_its_last_step(base: Path) -> None:
    structures = sizes(3)
    del structures[1][0]
    tolerant = {"label": {"tolerated_failures": 1.0}, "arguments": {"calls": str(base / "calls")}}
    command = (*wish(base, structures, "calculators.DiesAtStepEMT", **tolerant), "--relax")
    assert re.search(r"failed: crash +1\n", hpcft_to_end(*command, cwd=base))
    frames = [atoms.info["step"] for atoms in read(base / "run" / "frames.extxyz", ":")]
    assert len(frames) == len(lines_of(base / "calls")) > 4
    hpcft_to_end("retry", "run", cwd=base)
    hpcft_to_end("resume", "run", cwd=base)
    assert len(read(base / "run" / "relaxed.extxyz", ":")) == 3
    assert len(read(base / "run" / "frames.extxyz", ":")) > len(frames)
    calls = lines_of(base / "calls")
    assert len(calls) == len(set(calls)) == len(read(base / "run" / "frames.extxyz", ":"))


def test_a_relaxation_with_another_criterion_pays_only_for_the_steps_that_no_other_has_taken(
    base: Path,
) -> None:
    structures = sizes(3)
    del structures[1][0]
    shared = {"label": {"store": str(base / "store")}}
    paid = {}
    for name, fmax, more in (
        ("loose", 0.1, shared),
        ("tight", 0.02, shared),
        ("loose again", 0.11, shared),
        ("alone", 0.02, {}),
    ):
        command = wish(base, structures, "calculators.CountingEMT", **more)[:-1]
        before = len(lines_of(base / "calls")) if paid else 0
        hpcft_to_end(*command, name, "--relax", "--fmax", fmax, "--shards", 2, cwd=base)
        paid[name] = len(lines_of(base / "calls")) - before
    assert 0 < paid["loose"] < paid["alone"]
    assert paid["loose"] + paid["tight"] == paid["alone"]
    assert paid["loose again"] == 0
    for file in ("relaxed.extxyz", "frames.extxyz"):
        assert (base / "tight" / file).read_text() == (base / "alone" / file).read_text()
    assert len(read(base / "loose again" / "frames.extxyz", ":")) <= paid["loose"]
    assert "all is well" in hpcft_to_end("verify", "tight", cwd=base)


def test_other_settings_for_what_failed_in_a_finished_run_are_those_of_the_file_said_again(
    base: Path, metals: Metals
) -> None:
    """Patience, ladder and the command may change; anything that would make other labels is refused."""
    options = {
        "label": {"tolerated_failures": 1.0},
        "arguments": {"calls": str(base / "calls"), "mixing": 0.5},
    }
    structures = metals("Cu", "Ni")
    said = hpcft_to_end(*wish(base, structures, "calculators.UnsettledEMT", **options), cwd=base)
    assert re.search(r"failed: scf +2\n", said)

    command = wish(base, structures, "calculators.UnsettledEMT", **options, ladder=[{"mixing": 0.1}])
    assert re.search(r"failed: scf +2\n", hpcft_to_end(*command, cwd=base)), "it is finished"
    hpcft_to_end("retry", "run", "--cause", "scf", cwd=base)
    hpcft_to_end("resume", "run", cwd=base)
    assert_emt_labels(base)

    options["arguments"]["mixing"] = 0.1
    status, refusal = run(base, *wish(base, structures, "calculators.UnsettledEMT", **options))
    assert status == 2
    assert "reference.arguments.mixing: 0.5 -> 0.1" in refusal


@pytest.mark.parametrize("tolerated", [0.0, 1.0])
def test_a_task_that_is_given_up_does_not_keep_the_others_from_their_labels(
    tolerated: float, base: Path, metals: Metals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code breaks where the machine lacks it, in the one task that comes to its third structure."""
    monkeypatch.setenv("HPCFT_TEST_ORDERS", str(base / "orders"))
    (base / "orders").write_text("break 2")
    structures = metals("Cu", "Ni", "Ag", "Pd")
    options = {"max_attempts": 1, "label": {"tolerated_failures": tolerated}}
    command = (*wish(base, structures, "calculators.ObedientEMT", **options), "--shards", 2)
    status, said = run(base, *command)
    assert status == (0 if tolerated else 1), said
    assert "set-aside" in said
    num_done = len(lines_of(base / "calls"))
    assert len(read(base / "run" / "labels.extxyz", ":")) == num_done < 4
    (base / "orders").write_text("go")
    if tolerated:  # the run is finished
        hpcft_to_end("retry", "run", "--cause", "set-aside", cwd=base)
    hpcft_to_end("resume", "run", cwd=base)
    assert_emt_labels(base)
    assert len(lines_of(base / "calls")) == 4


def test_structures_are_relaxed_to_forces_below_the_criterion(base: Path) -> None:
    command = (
        *wish(base, sizes(4), "ase.calculators.emt.EMT"),
        "--shards",
        2,
        "--relax",
        "--fmax",
        0.02,
        "--cell",
    )
    hpcft_to_end(*command, cwd=base)
    relaxed = read(base / "run" / "relaxed.extxyz", ":")
    for atoms, start in zip(relaxed, read(base / "in.extxyz", ":"), strict=True):
        assert np.allclose(atoms.arrays["start_positions"], start.positions, rtol=0, atol=1e-12)
        atoms.calc = EMT()
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.02
        assert atoms.get_potential_energy() == pytest.approx(atoms.info["REF_energy"], abs=1e-9)
        assert abs(atoms.get_stress()).max() < 0.02
    frames = read(base / "run" / "frames.extxyz", ":")
    places = [(atoms.info["index"], atoms.info["step"]) for atoms in frames]
    assert places == sorted(set(places))
    for atoms in frames:
        given, atoms.calc = atoms.arrays["REF_forces"], EMT()
        assert given == pytest.approx(atoms.get_forces(), abs=1e-9)


@pytest.mark.nightly
def test_a_finished_run_is_computed_again_from_what_is_in_the_label_store_after_a_rewind(base: Path) -> None:
    command = wish(base, sizes(3), "calculators.CountingEMT")
    hpcft_to_end(*command, cwd=base)
    hpcft_to_end("rewind", "run", "--round", 0, "--stage", "label", "--yes", cwd=base)
    hpcft_to_end("resume", "run", cwd=base)
    assert len(lines_of(base / "calls")) == 3
    assert len(history_of(base / "run")) > 0
    assert_emt_labels(base)

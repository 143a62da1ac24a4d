"""Labels of one task that are computed side by side, in tries, with limits, and on the way of relaxations."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from calculators import ChargedEMT, lines_of

from hpcft.errors import UserError
from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Item, item_key
from hpcft.labelling.journal import Record, journal_path, read_journals
from hpcft.labelling.label import Label, Relaxation
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import finish_shard, read_frames, read_shard
from hpcft.labelling.supervised import Share, shares
from hpcft.labelling.worker import label_items

Metals = Callable[..., list[Atoms]]


def reference(name: str, where: Path, **settings: object) -> Reference:
    return Reference(f"calculators.{name}", {"calls": str(where / "calls"), **settings})


def test_two_workers_compute_at_the_same_time_on_cores_and_threads_of_their_own(
    tmp_path: Path, metals: Metals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    (tmp_path / "met").mkdir()
    items = [Item.single_point(atoms) for atoms in metals("Cu", "Ni", "Au", "Pt", "Cu")]
    meeting = reference("MeetingEMT", tmp_path, folder=str(tmp_path / "met"))
    summary = label_items(
        items, meeting, tmp_path / "shard", workers=2
    )  # alone, the first would wait for ever
    assert (summary.num_done, summary.num_computed) == (5, 5)
    assert len(lines_of(tmp_path / "calls")) == 5
    told = [path.read_text().split() for path in (tmp_path / "met").iterdir()]
    ours = sorted(os.sched_getaffinity(0))
    if len(ours) >= 2:
        cores = [set(map(int, text.split(","))) for text, _ in told]
        assert not cores[0] & cores[1]
        assert {int(threads) for _, threads in told} == {len(ours) // 2}
    finish_shard(tmp_path / "shard")
    for atoms, record in zip(
        metals("Cu", "Ni", "Au", "Pt", "Cu"), read_shard(tmp_path / "shard"), strict=True
    ):
        atoms.calc = EMT()
        assert isinstance(record.result, Label)
        np.testing.assert_array_equal(record.result.forces_n3, atoms.get_forces())


def test_workers_ranks_and_threads_together_fill_a_task_s_cores_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 18)))
    assert shares(2, 1, 8) == [Share((10, 11, 12, 13), 4), Share((14, 15, 16, 17), 4)]
    assert shares(2, 4, 8) == [Share((10, 11, 12, 13), 1), Share((14, 15, 16, 17), 1)]
    assert shares(1, 8, 8) == [Share(None, 1)]
    assert (
        shares(2, 1, 4) == [Share(None, 2)] * 2
    )  # not bound itself: another task would be bound to the same cores
    assert shares(16, 1, 8) == [Share(None, 1)] * 16


def test_what_another_worker_has_finished_is_kept_when_the_run_ends_with_an_error(
    tmp_path: Path, metals: Metals
) -> None:
    calls = tmp_path / "calls"

    def stop(record: Record) -> None:
        while len(lines_of(calls)) < 2:
            time.sleep(0.01)
        time.sleep(1)  # till its answer has come
        raise KeyboardInterrupt

    items = [Item.single_point(atoms) for atoms in metals("Cu", "Ni")]
    with pytest.raises(KeyboardInterrupt):
        label_items(
            items, reference("CountingEMT", tmp_path), tmp_path / "shard", workers=2, on_progress=stop
        )
    assert sorted(read_journals(tmp_path / "shard")) == [0, 1]


def test_numbers_that_are_none_beside_energy_and_forces_cost_only_their_structure(
    tmp_path: Path, metals: Metals
) -> None:
    bad_start, bad_result, good = metals("Cu", "Au", "Cu")
    bad_start.set_initial_magnetic_moments([np.nan, 0, 0, 0])
    broken = Reference("calculators.ChargedEMT", {"broken": "Au"}, properties=("dipole",))
    items = [Item.single_point(atoms) for atoms in (bad_start, bad_result, good)]
    summary = label_items(items, broken, tmp_path / "shard")
    assert (summary.num_done, summary.causes) == (1, {"geometry": 1, "non-finite": 1})


def test_frames_of_another_reference_are_not_gone_on_from(tmp_path: Path, metals: Metals) -> None:
    dying = reference("DiesAtStepEMT", tmp_path)
    items = [Item.relaxation(metals("Cu")[0], fmax=0.01, max_steps=50)]
    label_items(items, dying, tmp_path / "shard")
    journal = journal_path(tmp_path / "shard", 0)
    frames = [line for line in journal.read_bytes().splitlines(keepends=True) if b'"step":' in line]
    journal.write_bytes(b"".join(frames))  # as after a kill in its middle
    with pytest.raises(UserError, match="another reference"):
        label_items(items, reference("CountingEMT", tmp_path), tmp_path / "shard", attempt=1)
    assert label_items(items, dying, tmp_path / "shard", attempt=1).num_done == 1


def test_a_calculation_that_holds_too_much_memory_is_killed_with_all_its_processes_and_the_others_go_on(
    tmp_path: Path, metals: Metals
) -> None:
    greedy = Reference("calculators.GreedyEMT", {"calls": str(tmp_path / "calls")}, memory_limit_GB=0.25)
    items = [Item.single_point(atoms) for atoms in metals("Au", "Cu")]
    summary = label_items(items, greedy, tmp_path / "shard")
    assert (summary.num_done, summary.causes) == (1, {"memory": 1})
    failure = read_journals(tmp_path / "shard")[0].result
    assert isinstance(failure, Failure)
    assert "above its limit of 0.25 GB" in failure.message


def test_a_relaxation_goes_on_from_its_last_frame_after_a_crash_and_its_frames_are_labels(
    tmp_path: Path, metals: Metals
) -> None:
    dying = reference("DiesAtStepEMT", tmp_path)
    items = [Item.relaxation(metals("Cu")[0], fmax=0.01, max_steps=50)]
    assert label_items(items, dying, tmp_path / "shard").causes == {"crash": 1}
    finish_shard(tmp_path / "shard")
    assert len(read_frames(tmp_path / "shard")) == 4  # paid for, though the relaxation has failed
    again = label_items(items, dying, tmp_path / "shard", attempt=1, retry_causes=["crash"])
    assert again.num_done == 1
    calls = lines_of(tmp_path / "calls")
    assert len(calls) == len(set(calls))  # no step was computed twice

    label_items(items, dying, tmp_path / "undisturbed")
    finish_shard(tmp_path / "shard")
    finish_shard(tmp_path / "undisturbed")
    (ours,), (wanted,) = read_shard(tmp_path / "shard"), read_shard(tmp_path / "undisturbed")
    assert isinstance(ours.result, Relaxation)
    assert isinstance(wanted.result, Relaxation)
    np.testing.assert_array_equal(ours.result.relaxed.positions, wanted.result.relaxed.positions)
    assert ours.result.num_steps == wanted.result.num_steps == len(calls) - 1

    frames = read_frames(tmp_path / "shard")
    assert [frame.step for frame in frames] == list(range(len(calls)))
    for frame in frames:
        assert frame.atoms is not None
        assert isinstance(frame.result, Label)
        assert frame.key == item_key(Item.single_point(frame.atoms), dying)
        atoms = frame.atoms.copy()
        atoms.calc = EMT()
        np.testing.assert_allclose(frame.result.forces_n3, atoms.get_forces(), atol=1e-12)


@pytest.mark.parametrize(("energy", "offset"), [("free", 0.0), ("extrapolated", 0.25)])
def test_moments_charges_dipole_and_the_energy_that_was_asked_for_are_kept_with_the_label(
    tmp_path: Path, metals: Metals, energy: str, offset: float
) -> None:
    asked = ("magmoms", "charges", "dipole")
    charged = Reference("calculators.ChargedEMT", properties=asked, energy=energy)  # type: ignore[arg-type]
    (atoms,) = metals("Cu")
    label_items([Item.single_point(atoms)], charged, tmp_path / "shard")
    finish_shard(tmp_path / "shard")
    (record,) = read_shard(tmp_path / "shard")
    assert isinstance(record.result, Label)
    atoms.calc = ChargedEMT()
    assert record.result.energy == atoms.get_potential_energy(force_consistent=True) + offset
    assert set(record.result.extra) == set(asked)
    np.testing.assert_array_equal(record.result.extra["magmoms"], atoms.positions[:, 0] + 1)
    np.testing.assert_array_equal(record.result.extra["dipole"], atoms.positions.sum(axis=0))


def test_what_a_reference_cannot_give_is_a_failure_that_names_it(tmp_path: Path, metals: Metals) -> None:
    plain = Reference("ase.calculators.emt.EMT", properties=("dipole",))
    label_items([Item.single_point(metals("Cu")[0])], plain, tmp_path / "shard")
    failure = read_journals(tmp_path / "shard")[0].result
    assert isinstance(failure, Failure)
    assert (failure.cause, failure.message) == ("bad-input", "EMT does not give dipole")


def test_every_try_down_the_ladder_is_on_record_with_its_cause(tmp_path: Path, metals: Metals) -> None:
    ladder = ({"mixing": 0.3}, {"mixing": 0.1})
    arguments = {"calls": str(tmp_path / "calls"), "mixing": 0.7}
    unsettled = Reference("calculators.UnsettledEMT", arguments, ladder=ladder)
    label_items([Item.single_point(metals("Cu")[0])], unsettled, tmp_path / "shard")
    record = read_journals(tmp_path / "shard")[0]
    assert record.done
    assert [(one.rung, one.cause) for one in record.tries] == [(0, "scf"), (1, "scf")]
    assert record.rung == 2
    hopeless = Reference("calculators.UnsettledEMT", arguments, ladder=ladder[:1])
    label_items([Item.single_point(metals("Cu")[0])], hopeless, tmp_path / "failed")
    finish_shard(tmp_path / "failed")
    (failed,) = json.loads((tmp_path / "failed" / "failures.json").read_text())
    assert [one["message"] for one in failed["tries"]] == [
        "SCFError: no convergence with mixing 0.7",
        "SCFError: no convergence with mixing 0.3",
    ]
    outputs = gzip.decompress((tmp_path / "failed" / "failed-outputs.gz").read_bytes()).decode()
    assert "item 0: scf" in outputs
    assert "Traceback" in outputs


def test_scratch_that_cannot_be_written_is_named(tmp_path: Path, metals: Metals) -> None:
    (tmp_path / "scratch").touch()
    emt = Reference("ase.calculators.emt.EMT")
    with pytest.raises(UserError, match=r"scratch .*\$TMPDIR"):
        label_items(
            [Item.single_point(metals("Cu")[0])], emt, tmp_path / "shard", scratch=tmp_path / "scratch"
        )

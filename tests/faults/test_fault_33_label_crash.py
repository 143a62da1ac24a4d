"""Fault 33: a structure whose calculation kills its own process costs only itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from ase import Atoms
from calculators import lines_of

from hpcft.errors import LabelError
from hpcft.labelling.causes import Failure
from hpcft.labelling.item import Item
from hpcft.labelling.journal import journal_path, read_journals
from hpcft.labelling.reference import Reference
from hpcft.labelling.worker import label_items


def dying(folder: Path, signal_name: str = "SIGSEGV") -> Reference:
    arguments = {"calls": str(folder / "calls"), "pids": str(folder / "pids"), "signal_name": signal_name}
    return Reference("calculators.DyingEMT", arguments)


def failure_of(folder: Path, index: int) -> Failure:
    result = read_journals(folder)[index].result
    assert isinstance(result, Failure)
    return result


def test_a_segmentation_fault_costs_only_its_structure_and_names_the_signal(
    tmp_path: Path, metals: Callable[..., list[Atoms]], wait_until_gone: Callable[[Iterable[int]], None]
) -> None:
    items = [Item.single_point(atoms) for atoms in metals("Cu", "Au", "Ni", "Ag", "Pt")]
    summary = label_items(items, dying(tmp_path), tmp_path / "shard")
    assert (summary.num_done, summary.causes) == (3, {"crash": 2})
    assert "SIGSEGV" in failure_of(tmp_path / "shard", 1).message
    assert "last words" in failure_of(tmp_path / "shard", 1).output
    assert "exit code 7" in failure_of(tmp_path / "shard", 3).message
    wait_until_gone([int(line) for line in lines_of(tmp_path / "pids")])


def test_every_structure_may_crash(tmp_path: Path, metals: Callable[..., list[Atoms]]) -> None:
    items = [Item.single_point(atoms) for atoms in metals("Au", "Au", "Ag")]
    summary = label_items(items, dying(tmp_path, "SIGKILL"), tmp_path / "shard")
    assert (summary.num_done, summary.causes) == (0, {"crash": 3})
    assert "memory" in failure_of(tmp_path / "shard", 0).message


def test_a_polite_signal_from_outside_is_not_held_against_the_structure(
    tmp_path: Path, metals: Callable[..., list[Atoms]]
) -> None:
    reference = Reference("calculators.TerminatedOnceEMT", {"calls": str(tmp_path / "calls")})
    summary = label_items([Item.single_point(metals("Cu")[0])], reference, tmp_path / "shard")
    assert (summary.num_done, summary.num_failed) == (1, 0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_calculation_that_is_always_ended_by_a_polite_signal_is_tried_again_by_the_next_attempt(
    tmp_path: Path, metals: Callable[..., list[Atoms]], name: str
) -> None:
    items = [Item.single_point(metals("Au")[0])]
    summary = label_items(items, dying(tmp_path, name), tmp_path / "shard")
    assert summary.causes == {"interrupted": 1}
    assert label_items(items, dying(tmp_path, name), tmp_path / "shard", attempt=1).num_computed == 1


def test_output_without_bound_is_kept_only_at_its_end(
    tmp_path: Path, metals: Callable[..., list[Atoms]]
) -> None:
    reference = Reference("calculators.ChattyEMT", {"calls": str(tmp_path / "calls")})
    summary = label_items([Item.single_point(metals("Cu")[0])], reference, tmp_path / "shard")
    assert summary.causes == {"calculator": 1}
    failure = failure_of(tmp_path / "shard", 0)
    assert failure.message == "RuntimeError: enough of it"
    assert "line 19999 of very much output" in failure.output
    assert len(failure.output) < 110_000  # of 600,000, and in the journal they are packed
    assert journal_path(tmp_path / "shard", 0).stat().st_size < 50_000


def test_a_missing_binary_is_the_fault_of_the_machine_and_of_no_structure(
    tmp_path: Path, metals: Callable[..., list[Atoms]]
) -> None:
    (tmp_path / "X.UPF").touch()
    arguments = {
        "profile": {"command": "no-such-program", "pseudo_dir": str(tmp_path)},
        "pseudopotentials": {"Cu": "X.UPF"},
    }
    reference = Reference("ase.calculators.espresso.Espresso", arguments)
    with pytest.raises(LabelError, match="no-such-program") as caught:
        label_items([Item.single_point(metals("Cu")[0])], reference, tmp_path / "shard")
    assert caught.value.cause == "missing-binary"
    assert read_journals(tmp_path / "shard") == {}


@pytest.mark.parametrize("command", ["false", "/nowhere/cp2k.psmp -s", "echo Segmentation fault"])
def test_cp2k_that_does_not_start_on_a_node_turns_no_structure_into_a_failure(
    command: str, tmp_path: Path, metals: Callable[..., list[Atoms]]
) -> None:
    reference = Reference("ase.calculators.cp2k.CP2K", {"command": command})
    with pytest.raises(LabelError, match=f"did not start by its command '{command}'") as caught:
        label_items([Item.single_point(metals("Cu")[0])], reference, tmp_path / "shard")
    assert caught.value.cause == "missing-binary"
    assert read_journals(tmp_path / "shard") == {}

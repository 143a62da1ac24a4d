"""Training data: the order in which structures are drawn, and what is refused."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import UserError
from hpcft.models.graph import build_graph
from hpcft.training.data import LabelledSet, draw, share

CUTOFF = 4.0


def labelled(number: int) -> Atoms:
    atoms = bulk("Cu", a=3.7, cubic=True).repeat((1 + number % 2, 1, 1))
    atoms.rattle(0.1, seed=number)
    atoms.info["REF_energy"] = -float(number)
    atoms.arrays["REF_forces"] = np.random.default_rng(number).normal(size=(len(atoms), 3))
    return atoms


@given(
    num_items=st.integers(1, 13),
    batch_size=st.integers(1, 9),
    ranks=st.integers(1, 5),
    seed=st.lists(st.integers(0, 2**63), min_size=1, max_size=4),
)
def test_every_pass_draws_each_item_once_whatever_the_batch_and_the_ranks(
    num_items: int, batch_size: int, ranks: int, seed: list[int]
) -> None:
    num_steps = -(-3 * num_items // batch_size)
    stream: list[int] = []
    for step in range(num_steps):
        batch = draw(num_items, batch_size, step, seed)
        shares = [share([1.0] * len(batch), rank, ranks) for rank in range(ranks)]
        assert sorted(chain(*shares)) == list(range(len(batch)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        stream += batch
    for number in range(3):
        assert sorted(stream[number * num_items : (number + 1) * num_items]) == list(range(num_items))
    one_by_one = [draw(num_items, 1, step, seed)[0] for step in range(len(stream))]
    assert stream == one_by_one


@given(st.lists(st.floats(0, 100), max_size=20), st.integers(1, 6))
def test_the_ranks_share_what_there_is_to_do_and_none_has_two_while_another_has_none(
    costs: list[float], ranks: int
) -> None:
    shares = [share(costs, rank, ranks) for rank in range(ranks)]
    assert sorted(chain(*shares)) == list(range(len(costs)))
    loads = [sum(costs[i] for i in mine) for mine in shares]
    # Graham's bound: at most 4/3 of the best, which is at least the mean and the dearest item.
    least = max([sum(costs) / ranks, *costs])
    assert max(loads) <= 4 / 3 * least + max(sorted(costs)[::-1][ranks : ranks + 1], default=0.0) + 1e-9
    if len(costs) >= ranks:
        assert all(shares)


def test_a_large_structure_is_not_put_beside_others_while_another_rank_has_less() -> None:
    assert [share([100, 10, 10, 10], rank, 2) for rank in range(2)] == [[0], [1, 2, 3]]


def test_passes_and_seeds_differ_in_their_order() -> None:
    def order(number: int, *seed: int) -> tuple[int, ...]:
        return tuple(draw(20, 20, number, seed))

    assert len({order(0, 1, 0), order(1, 1, 0), order(0, 2, 0), order(0, 1, 1), order(0, 0, 1)}) == 5
    assert order(3, 1, 0) == order(3, 1, 0)


def test_a_batch_holds_the_labels_of_its_structures_in_the_order_that_was_asked_for() -> None:
    structures = [labelled(number) for number in range(4)]
    structures[2].info["REF_stress"] = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    data = LabelledSet(structures, CUTOFF, torch.float64)
    for _ in range(2):  # the second time from the graphs that were kept
        batch = data.batch([2, 0])
        assert batch.labels.energies_b.tolist() == [-2.0, 0.0]
        forces = np.concatenate([structures[2].arrays["REF_forces"], structures[0].arrays["REF_forces"]])
        np.testing.assert_array_equal(batch.labels.forces_n3.numpy(), forces)
        expected = build_graph([structures[2], structures[0]], CUTOFF)
        for name, tensor in batch.graph.tensors().items():
            assert torch.equal(tensor, expected.tensors()[name]), name
        assert batch.labels.stress_known_b.tolist() == [1.0, 0.0]
        assert batch.labels.stress_b33[0].tolist() == [[1, 6, 5], [6, 2, 4], [5, 4, 3]]
        assert batch.labels.stress_b33[1].abs().max() == 0
    assert data.num_atoms([2, 0, 1]) == 4 + 4 + 8


def test_a_stress_may_have_nine_components_and_one_that_is_not_finite_counts_as_unknown() -> None:
    whole, unknown = labelled(0), labelled(2)
    whole.info["REF_stress"] = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])
    unknown.info["REF_stress"] = np.full(6, np.nan)
    labels = LabelledSet([whole, unknown], CUTOFF, torch.float64).batch([0, 1]).labels
    assert labels.stress_b33[0].tolist() == whole.info["REF_stress"].tolist()
    assert labels.stress_known_b.tolist() == [1.0, 0.0]
    assert torch.isfinite(labels.stress_b33).all()


@pytest.mark.parametrize("missing", ["REF_energy", "REF_forces"])
def test_a_structure_without_a_label_is_refused_by_its_number_and_origin(missing: str) -> None:
    structures = [labelled(0), labelled(1)]
    structures[1].info.pop(missing, None)
    structures[1].arrays.pop(missing, None)
    with pytest.raises(UserError, match="structure 1 of the replay data has no REF_energy or no REF_forces"):
        LabelledSet(structures, CUTOFF, torch.float64, "the replay data")


def test_labels_that_ase_strips_from_extxyz_are_refused_with_the_hint_to_write_ref_keys(
    tmp_path: Path,
) -> None:
    atoms = labelled(0)
    del atoms.info["REF_energy"], atoms.arrays["REF_forces"]
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((4, 3)))
    ase.io.write(tmp_path / "data.extxyz", atoms)
    assert "energy=-1.0" in (tmp_path / "data.extxyz").read_text()
    with pytest.raises(UserError, match=r"ASE strips the plain keys 'energy' and 'forces'.*write REF_\*"):
        LabelledSet(ase.io.read(tmp_path / "data.extxyz", ":"), CUTOFF, torch.float64)


def test_labels_written_with_ref_keys_survive_extxyz(tmp_path: Path) -> None:
    atoms = labelled(1)
    atoms.calc = EMT()
    atoms.info["REF_stress"] = atoms.get_stress()
    atoms.calc = None
    ase.io.write(tmp_path / "data.extxyz", atoms)
    labels = LabelledSet(ase.io.read(tmp_path / "data.extxyz", ":"), CUTOFF, torch.float64).batch([0]).labels
    assert labels.energies_b.tolist() == [-1.0]
    np.testing.assert_allclose(labels.forces_n3.numpy(), atoms.arrays["REF_forces"], atol=1e-8)
    assert labels.stress_known_b.tolist() == [1.0]
    assert labels.stress_b33[0, 1, 2] == pytest.approx(atoms.info["REF_stress"][3], abs=1e-8)

"""What calculations will take, learnt from those before, and tasks that end together."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from ase.build import bulk, molecule
from hypothesis import given
from hypothesis import strategies as st

from hpcft.labelling.cost import CostModel, Floats, Seen, cost_model, count_kpoints, deal_out
from hpcft.labelling.reference import Reference
from hpcft.stages.label_plan import shards
from hpcft.stages.sharing import numbers_of

EMT = Reference("ase.calculators.emt.EMT")
ESPRESSO = Reference("ase.calculators.espresso.Espresso")


def makespan(cost_s: Floats, tasks: list[list[int]]) -> float:
    return max(sum(cost_s[item] for item in task) for task in tasks)


def skewed_mix(seed: int = 0) -> Floats:
    """Seconds of many small cells and a few supercells under cubic scaling, sorted as files often are."""
    random = np.random.default_rng(seed)
    sizes = np.concatenate([random.integers(2, 12, 900), random.integers(60, 200, 20)])
    return CostModel(3.0).single_points(sizes, np.ones(len(sizes), dtype=np.int64))


def test_a_skewed_mix_is_done_far_earlier_than_when_it_is_dealt_out_in_turn() -> None:
    cost_s, num_tasks = skewed_mix(), 8
    in_turn = [list(range(task, len(cost_s), num_tasks)) for task in range(num_tasks)]
    best = max(cost_s.sum() / num_tasks, cost_s.max())
    assert makespan(cost_s, deal_out(cost_s, num_tasks)) < 1.05 * best
    assert makespan(cost_s, in_turn) > 1.3 * best


@given(st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=9), st.integers(1, 3))
def test_no_task_ends_later_than_four_thirds_of_the_best_that_is_possible(
    costs: list[float], num_tasks: int
) -> None:
    tasks = deal_out(costs, num_tasks)
    assert sorted(item for task in tasks for item in task) == list(range(len(costs)))
    loads = (
        [
            sum(cost for cost, task in zip(costs, choice, strict=True) if task == number)
            for number in range(num_tasks)
        ]
        for choice in itertools.product(range(num_tasks), repeat=min(len(costs), 9))
    )
    assert makespan(np.array(costs), tasks) <= (4 / 3) * min(map(max, loads)) * (1 + 1e-9)


def test_the_same_costs_give_the_same_tasks_and_equal_ones_are_dealt_out_in_turn() -> None:
    cost_s = skewed_mix()
    assert deal_out(cost_s, 8) == deal_out(cost_s.copy(), 8)
    assert deal_out(np.ones(7), 3) == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_hundred_thousand_structures_are_dealt_out_evenly() -> None:
    cost_s = np.random.default_rng(1).lognormal(0.0, 1.0, 100_000)
    tasks = deal_out(cost_s, 500)
    assert makespan(cost_s, tasks) == pytest.approx(cost_s.sum() / 500, rel=0.01)


def seen(exponent: float, scatter: float = 0.0, num: int = 200, **changes: Any) -> Seen:
    random = np.random.default_rng(2)
    atoms = random.integers(4, 100, num).astype(float)
    seconds = 0.03 * atoms**exponent * np.exp(random.normal(0, scatter, num))
    return Seen(
        **{
            "num_atoms": atoms,
            "num_kpoints": np.ones(num),
            "step_s": seconds,
            "num_steps": np.zeros(0),
            **changes,
        }
    )


@pytest.mark.parametrize("exponent", [0.6, 1.4, 2.7])
def test_exponent_and_seconds_are_learnt_from_labels(exponent: float) -> None:
    model = cost_model(ESPRESSO, seen(exponent, scatter=0.2))
    assert model.exponent == pytest.approx(exponent, abs=0.1)
    expected = 0.03 * 50**exponent
    assert model.single_points(np.array([50]), np.array([1]))[0] == pytest.approx(expected, rel=0.1)


def test_some_calculations_on_a_slow_node_do_not_mislead() -> None:
    all_well = seen(2.0, scatter=0.1)
    slow = all_well.step_s * np.where((np.arange(200) % 10 == 0) & (all_well.num_atoms < 20), 50.0, 1.0)
    assert cost_model(EMT, seen(2.0, step_s=slow)).exponent == pytest.approx(2.0, abs=0.15)


def test_a_slope_that_no_method_has_is_clamped() -> None:
    assert cost_model(EMT, seen(-1.0)).exponent == 0.0
    assert cost_model(EMT, seen(6.0)).exponent == 4.0


def test_the_method_says_the_exponent_while_labels_are_few_or_all_of_a_size() -> None:
    priors = [cost_model(Reference(path)).exponent for path in (
        "ase.calculators.espresso.Espresso", "gpaw.GPAW", "tblite.ase.TBLite", "ase.calculators.emt.EMT"
    )]  # fmt: skip
    assert priors == [3.0, 3.0, 2.0, 1.0]
    assert cost_model(ESPRESSO, seen(1.0, num=3)).exponent == 3.0
    alike = seen(1.0, num_atoms=np.full(200, 32.0))
    model = cost_model(ESPRESSO, alike)
    assert model.exponent == 3.0
    assert model.single_points(np.array([32]), np.array([1]))[0] == pytest.approx(np.median(alike.step_s))


def test_times_that_are_no_times_teach_nothing() -> None:
    nothing = seen(1.0, num=10, step_s=np.array([0.0, np.nan, -1.0, np.inf, 0.0] * 2))
    assert cost_model(ESPRESSO, nothing) == cost_model(ESPRESSO)


def test_a_relaxation_costs_its_expected_steps_which_are_learnt() -> None:
    atoms, kpoints = np.array([8]), np.array([1])
    before = cost_model(EMT)
    assert before.relaxations(atoms, kpoints) > 5 * before.single_points(atoms, kpoints)
    after = cost_model(EMT, seen(1.0, num_steps=np.array([10.0, 14.0])))
    assert after.relaxations(atoms, kpoints) == pytest.approx(12 * after.single_points(atoms, kpoints))


def kpoints(arguments: dict[str, Any], *structures: Any) -> list[int]:
    cell_s33 = np.array([atoms.cell.array for atoms in structures])
    pbc_s3 = np.array([atoms.pbc for atoms in structures])
    return count_kpoints(Reference("ase.calculators.emt.EMT", arguments), cell_s33, pbc_s3).tolist()


def test_k_points_are_those_of_the_mesh_or_of_the_spacing_in_each_cell() -> None:
    small, large = bulk("Si", cubic=True), bulk("Si", cubic=True).repeat((2, 2, 2))
    slab, alone = bulk("Si", cubic=True), molecule("H2O")
    slab.pbc = (True, True, False)
    assert kpoints({}, small, large) == [1, 1]
    assert kpoints({"kpts": [2, 3, 4]}, small, large) == [24, 24]
    assert kpoints({"kpts": {"size": (2, 2, 2), "gamma": True}}, small) == [8]
    assert kpoints({"kpts": [2, 3, 4]}, slab) == [6]
    # |b| = 1/5.43 1/Å: six points at a spacing of 0.2 with 2 pi, three at half of it
    assert kpoints({"kspacing": 0.2}, small, large, slab, alone) == [216, 27, 36, 1]
    assert kpoints({"kspacing": 0.2 / (2 * np.pi), "pseudopotentials": {}}, small, large) == [216, 27]
    assert kpoints({"kpts": {"density": 5.0}}, small, large) == [216, 27]


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("wish", [{"kspacing": 0.2}, {"kpts": {"density": 5.0}}])
def test_a_cell_that_is_no_cell_costs_one_k_point_and_leaves_the_others_theirs(
    wish: dict[str, Any], number: float
) -> None:
    sound, damaged, slab = (bulk("Si", cubic=True) for _ in range(3))
    damaged.cell[0, 0] = number
    slab.cell[2, 2] = number
    slab.pbc = (True, True, False)
    assert kpoints(wish, damaged, sound, slab) == [1, 216, 1]


def test_k_points_agree_with_the_meshes_of_ase() -> None:
    from ase.calculators.calculator import kptdensity2monkhorstpack
    from ase.io.espresso import kspacing_to_grid

    structures = [bulk("Cu"), bulk("Ti"), bulk("Si", cubic=True).repeat((1, 2, 3))]
    spacings = [int(np.prod(kspacing_to_grid(atoms, 0.043))) for atoms in structures]
    assert kpoints({"kspacing": 0.043, "input_data": {}}, *structures) == spacings
    densities = [int(np.prod(kptdensity2monkhorstpack(atoms, 2.9, even=False))) for atoms in structures]
    assert kpoints({"kpts": {"density": 2.9}}, *structures) == densities


def test_equal_structures_go_to_one_task_whatever_they_cost() -> None:
    first_equals = np.array([0, 1, 0, 3, 1, 0])
    payloads = shards(np.array([5.0, 4, 5, 3, 4, 5]), np.zeros(0), 2, first_equals)
    tasks = [list(numbers_of(payload["frames"])) for payload in payloads]
    assert sorted(number for numbers in tasks for number in numbers) == list(range(6))
    assert {0, 2, 5} in [
        set(numbers) for numbers in tasks
    ]  # paid for once, so the rest goes to the other task

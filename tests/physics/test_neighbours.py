"""Neighbour lists against all pairs counted out, and a list with a skin against a fresh one."""

from __future__ import annotations

import dataclasses
import itertools
import resource
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.models.graph import Graph, build_graph, find_edges, rebuild_edges
from hpcft.models.neighbours import VerletList

Pair = tuple[int, int, int, int, int]


def counted_out(atoms: Atoms, cutoff: float) -> set[Pair]:
    """Every ordered pair within the cutoff, by trying all cells that could hold one."""
    extent = float(np.ptp(atoms.positions, axis=0).max()) * 2 + cutoff
    ranges = []
    for axis in range(3):
        if not atoms.pbc[axis]:
            ranges.append(range(1))
            continue
        normal = atoms.cell.reciprocal()[axis]
        most = int(np.ceil(extent * np.linalg.norm(normal))) + 1
        ranges.append(range(-most, most + 1))
    found = set()
    for shift in itertools.product(*ranges):
        vectors = atoms.positions[None] - atoms.positions[:, None] + np.array(shift) @ atoms.cell.array
        for i, j in zip(*np.nonzero(np.linalg.norm(vectors, axis=2) < cutoff), strict=True):
            if i != j or any(shift):
                found.add((int(i), int(j), *shift))
    return found


def pairs_of(graph: Graph) -> list[Pair]:
    edges = torch.cat([graph.senders_e[:, None], graph.receivers_e[:, None], graph.shifts_e3.long()], dim=1)
    return sorted(tuple(row) for row in edges.tolist())  # type: ignore[misc]


@settings(max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 6),
    periodic=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    has_cell=st.booleans(),
    cutoff=st.floats(1.0, 6.0),
)
def test_the_neighbour_list_holds_exactly_the_pairs_within_the_cutoff(
    seed: int, count: int, periodic: tuple[bool, bool, bool], has_cell: bool, cutoff: float
) -> None:
    random = np.random.default_rng(seed)
    cell = np.eye(3) * random.uniform(2.5, 7.0, 3) + random.uniform(-1.2, 1.2, (3, 3))
    if not has_cell:
        cell[~np.array(periodic)] = 0.0
    # Unwrapped, as in a running simulation: some atoms are outside of the cell.
    atoms = Atoms("Cu" * count, positions=random.uniform(-9.0, 9.0, (count, 3)), cell=cell, pbc=periodic)
    senders, receivers, shifts = find_edges(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    found = list(zip(senders.tolist(), receivers.tolist(), *shifts.astype(int).T.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == counted_out(atoms, cutoff)


def test_a_molecule_keeps_its_neighbours_when_one_atom_has_flown_off_and_memory_stays_small() -> None:
    far = 2e6
    positions = np.array(
        [[0, 0, 0], [1, 1, 0], [far, far, far], [far, far + 1, far], [-far, 0, 0]], dtype=float
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    senders, receivers, _ = find_edges(positions, np.zeros((3, 3)), np.zeros(3, bool), 5.0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sorted(zip(senders.tolist(), receivers.tolist(), strict=True)) == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert after - before < 200 * 1024  # kB


def test_edges_built_again_are_those_of_a_new_graph(mixed_structures: list[Atoms]) -> None:
    graph = build_graph(mixed_structures, 4.0)
    moved = [atoms.copy() for atoms in mixed_structures]
    for number, atoms in enumerate(moved):
        atoms.rattle(0.5, seed=number)
    positions = torch.from_numpy(np.concatenate([atoms.positions for atoms in moved]))
    again = rebuild_edges(graph.with_positions(positions), 4.0)
    assert pairs_of(again) == pairs_of(build_graph(moved, 4.0))
    assert pairs_of(again) != pairs_of(graph)


def test_a_list_with_a_skin_gives_the_edges_of_a_fresh_list_all_along_a_trajectory(
    mixed_structures: list[Atoms],
) -> None:
    cutoff = 4.0
    neighbours = VerletList(mixed_structures, cutoff, skin=1.0, dtype=torch.float64, device="cpu")
    assert pairs_of(neighbours.graph_at(None)) == pairs_of(build_graph(mixed_structures, cutoff))
    moving = [atoms.copy() for atoms in mixed_structures]
    random = np.random.default_rng(0)
    velocities = [random.normal(0, 0.04, (len(atoms), 3)) for atoms in moving]
    num_steps, seen = 60, set()
    for _ in range(num_steps):
        for atoms, velocity in zip(moving, velocities, strict=True):
            atoms.positions += velocity
        positions = torch.from_numpy(np.concatenate([atoms.positions for atoms in moving]))
        pairs = pairs_of(neighbours.graph_at(positions))
        assert pairs == pairs_of(build_graph(moving, cutoff))
        seen.add(tuple(pairs))
    assert len(seen) > 30  # atoms did come and go
    assert 4 < neighbours.num_builds < num_steps / 2


def test_two_atoms_that_meet_head_on_see_each_other_in_time() -> None:
    """Each moves less than the skin, together they cross it: the list must go by half of it."""
    cutoff, skin = 4.0, 1.0
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [cutoff + 1.4 * skin, 0, 0]])
    neighbours = VerletList([atoms], cutoff, skin=skin, dtype=torch.float64, device="cpu")
    assert pairs_of(neighbours.graph_at(None)) == []
    atoms.positions += [[0.75 * skin, 0, 0], [-0.75 * skin, 0, 0]]
    assert pairs_of(neighbours.graph_at(torch.from_numpy(atoms.positions))) == [
        (0, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_replica_that_is_no_longer_finite_leaves_the_others_a_fresh_list(
    make_alloy: Callable[..., Atoms], bad: float
) -> None:
    sane, broken = make_alloy(seed=1), make_alloy(seed=2)
    neighbours = VerletList([sane, broken], 4.0, skin=1.0, dtype=torch.float64, device="cpu")
    sane.positions[0] += 1.3
    broken.positions[0] = bad
    positions = torch.from_numpy(np.concatenate([sane.positions, broken.positions]))
    pairs = [pair for pair in pairs_of(neighbours.graph_at(positions)) if pair[0] < len(sane)]
    assert pairs == pairs_of(build_graph([sane], 4.0))


def test_edge_vectors_that_are_kept_are_those_worked_out_anew(mixed_structures: list[Atoms]) -> None:
    """Fails if kept vectors outlive a move of the atoms or of the cell, or stand in the way of a gradient."""

    def anew(graph: Graph) -> torch.Tensor:
        return dataclasses.replace(graph, known=None).vectors_e3

    neighbours = VerletList(mixed_structures, 4.0, skin=1.0, dtype=torch.float64, device="cpu")
    start = neighbours.graph_at(None)
    moved = neighbours.graph_at(start.positions_n3 + 0.1 * torch.randn_like(start.positions_n3))
    strained = dataclasses.replace(moved, cell_b33=1.01 * moved.cell_b33)
    some = moved.take([0, 2])
    for graph in (start, moved, strained, some, moved.with_positions(start.positions_n3)):
        torch.testing.assert_close(graph.vectors_e3, anew(graph), rtol=0, atol=1e-14)
    assert moved.vectors_e3 is moved.vectors_e3  # worked out once
    stretched = (1.02 * moved.cell_b33).requires_grad_(True)
    pulled = moved.positions_n3.clone().requires_grad_(True)
    graph = dataclasses.replace(moved, positions_n3=pulled, cell_b33=stretched)
    gradients = torch.autograd.grad((graph.vectors_e3**2).sum(), [pulled, stretched])
    wanted = torch.autograd.grad((anew(graph) ** 2).sum(), [pulled, stretched])
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=0)
        assert gradient.abs().max() > 0

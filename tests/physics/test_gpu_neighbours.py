"""The GPU's neighbour list against matscipy's, on the library's own CPU path: the same code, another device.

The extra `test` brings the library, so that its absence is a failure here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from test_neighbours import pairs_of

from hpcft.models import gpu_neighbours
from hpcft.models.graph import Graph, build_graph, rebuild_edges


def with_edges_of_library(graph: Graph, cutoff: float) -> Graph:
    found = gpu_neighbours.edges_where_they_are(graph, cutoff)
    assert found is not None
    senders, receivers, shifts = found
    assert senders.dtype == receivers.dtype == torch.int64
    assert shifts.dtype == graph.positions_n3.dtype
    return replace(graph, senders_e=senders, receivers_e=receivers, shifts_e3=shifts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_holds_matscipys_pairs_in_cells_of_all_kinds(dtype: torch.dtype) -> None:
    """Skewed and smaller than the cutoff, periodic or not along each direction, with atoms outside of the cell."""
    random = np.random.default_rng(0)
    for _ in range(20):
        structures = []
        for count in random.integers(1, 7, 3):
            cell = np.eye(3) * random.uniform(2.5, 7.0, 3) + random.uniform(-1.2, 1.2, (3, 3))
            positions = random.uniform(-9.0, 9.0, (count, 3))
            structures.append(Atoms("Cu" * count, positions=positions, cell=cell, pbc=random.random(3) < 0.5))
        cutoff = random.uniform(1.0, 6.0)
        graph = build_graph(structures, cutoff, dtype=dtype)
        assert pairs_of(with_edges_of_library(graph, cutoff)) == pairs_of(graph)


def test_a_crystal_under_great_pressure_loses_no_pair() -> None:
    """Denser than the library guesses: fails if its list is cut off at that guess."""
    crystal = bulk("Cu", a=1.8, cubic=True).repeat(2)
    crystal.rattle(0.02, seed=1)
    graph = build_graph([crystal], 4.5)
    most = int(torch.bincount(graph.senders_e).max())
    assert most > 0.2 * 4 / 3 * np.pi * 4.5**3
    assert pairs_of(with_edges_of_library(graph, 4.5)) == pairs_of(graph)


@pytest.mark.parametrize(
    "break_it", [lambda a: a.set_cell(None), lambda a: a.positions.__setitem__(0, np.nan)]
)
def test_what_it_cannot_bin_is_left_to_matscipy(break_it: Callable[[Atoms], None]) -> None:
    crystal, broken = bulk("Cu", cubic=True), bulk("Cu", cubic=True)
    broken.pbc = False
    break_it(broken)
    graph = build_graph([crystal, broken], 4.0)
    assert gpu_neighbours.edges_where_they_are(graph, 4.0) is None


def test_without_the_library_atoms_on_a_gpu_go_to_matscipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_neighbours, "library", lambda: None)
    graph = build_graph([bulk("Cu", cubic=True)], 4.0)
    assert gpu_neighbours.edges_where_they_are(graph, 4.0) is None
    assert pairs_of(rebuild_edges(graph, 4.0)) == pairs_of(graph)

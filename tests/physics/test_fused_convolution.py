"""MACE's convolution over slots gives what e3nn gives edge by edge: energies, forces, stress, and gradients of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase import Atoms
from small_models import small_mace
from torch import Tensor

from hpcft.models.fused_convolution import FusedTensorProduct, _Slots, fuse, separate
from hpcft.models.graph import build_graph
from hpcft.models.libraries import o3
from hpcft.models.protocol import evaluate
from hpcft.relaxation import Descent, unroll


def numbers_of(model: Any, structures: list[Atoms]) -> list[Tensor]:
    """Energies, forces, stress, and the gradient of a loss of the forces in the weights."""
    graph = build_graph(structures, model.cutoff)
    found = evaluate(model, graph, stress=True, create_graph=True)
    random = torch.Generator().manual_seed(0)
    target = torch.randn(found.forces_n3.shape, generator=random, dtype=torch.float64)
    loss = ((found.forces_n3 - target) ** 2).sum() + (found.energies_b**2).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert found.stress_b33 is not None
    known = [
        g if g is not None else torch.zeros_like(p)
        for g, p in zip(gradients, model.parameters(), strict=True)
    ]
    return [x.detach() for x in (found.energies_b, found.forces_n3, found.stress_b33, *known)]


def plain(model: Any) -> Any:
    model = copy.deepcopy(model)
    separate(model.model)
    return model


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * max(1.0, float(b.abs().max())))


def test_slots_and_edges_agree(make_alloy: Callable[..., Atoms]) -> None:
    model = small_mace()
    structures = [make_alloy((2, 1, 1), seed=1), make_alloy((1, 1, 1), seed=2)]
    graph = build_graph(structures, model.cutoff)
    edge_index = torch.stack([graph.senders_e, graph.receivers_e])
    assert _Slots.of(edge_index, len(graph.numbers_n)) is not None  # the slots are what is tested
    assert all(type(i.conv_tp) is FusedTensorProduct for i in model.model.interactions)
    assert_equal(numbers_of(model, structures), numbers_of(plain(model), structures))


def test_uneven_neighbourhoods_and_atoms_alone_agree_too(
    mixed_structures: list[Atoms], make_alloy: Callable[..., Atoms]
) -> None:
    model = small_mace()
    lonely = [make_alloy(), *(Atoms("Cu") for _ in range(60))]
    graph = build_graph(lonely, model.cutoff)
    assert _Slots.of(torch.stack([graph.senders_e, graph.receivers_e]), len(graph.numbers_n)) is None
    for structures in (mixed_structures, lonely, [Atoms("Cu"), Atoms("Al")]):
        assert_equal(numbers_of(model, structures), numbers_of(plain(model), structures))


def test_an_unrolled_relaxation_has_the_same_gradient(make_alloy: Callable[..., Atoms]) -> None:
    """The neighbours change from step to step: fails if slots of an earlier graph are taken."""
    gradients = []
    for model in (small_mace(), plain(small_mace())):
        graph = build_graph([make_alloy((1, 1, 1), seed=4)], model.cutoff)
        end = unroll(model, graph, Descent(0.01, momentum=0.5), steps=6).positions_n3
        gradients.append(torch.autograd.grad((end**2).sum(), list(model.parameters()), allow_unused=True))
    kept = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None]
    assert len(kept) > 5
    for ours, theirs in kept:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def test_graphs_in_turn_do_not_take_each_other_s_slots(make_alloy: Callable[..., Atoms]) -> None:
    model = small_mace()
    graphs = [build_graph([make_alloy((1, 1, 1), seed=seed)], model.cutoff) for seed in range(3)]
    alone = [float(small_mace().energies(graph).detach()[0]) for graph in graphs]
    for _ in range(2):
        assert [float(model.energies(graph).detach()[0]) for graph in graphs] == alone
    assert len(set(alone)) == 3


def test_names_and_weights_stay_and_it_can_be_undone() -> None:
    model = small_mace()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    separate(model.model)
    assert all(type(i.conv_tp) is o3.TensorProduct for i in model.model.interactions)
    assert not any(hasattr(i, "conv_fusion") for i in model.model.interactions)
    fuse(model.model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_another_precision_computes_in_it(
    dtype: torch.dtype, make_alloy: Callable[..., Atoms]
) -> None:
    model = small_mace()
    structures = [make_alloy()]
    numbers_of(model, structures)  # coefficients of float64 are known by now
    other = copy.deepcopy(model).to(dtype)
    graph = build_graph(structures, model.cutoff, dtype=dtype)
    energy = other.energies(graph).detach()
    assert energy.dtype == dtype
    torch.testing.assert_close(energy.double(), numbers_of(model, structures)[0], rtol=1e-5, atol=1e-5)

"""The gradient through an unrolled relaxation, against finite differences and between engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from hpcft.models.graph import Graph, build_graph, rebuild_edges
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, as_module, evaluate
from hpcft.relaxation import ENGINES, MapSettings, delta_q, unroll

MAPS = {
    "plain": MapSettings(steps=6, step_size=0.08, max_step=10.0),
    "heavy ball": MapSettings(steps=8, step_size=0.03, momentum=0.8, max_step=10.0),
    "heavy ball with steps cut short": MapSettings(steps=6, step_size=0.05, momentum=0.8, max_step=0.05),
}


@dataclass
class Problem:
    """Relaxations of a mixed batch, and where they should end."""

    graph: Graph
    target_n3: Tensor

    def loss(
        self, potential: Potential, settings: MapSettings, engine: str, start_n3: Tensor | None = None
    ) -> Tensor:
        graph = self.graph if start_n3 is None else self.graph.with_positions(start_n3)
        # Weights tell the structures apart: a mix-up of their distances would show.
        weights = torch.arange(1.0, graph.num_structures + 1, dtype=torch.float64)
        return (weights * delta_q(unroll(potential, graph, settings, engine), self.target_n3, graph)).sum()


@pytest.fixture
def problem(potential: Potential, make_alloy: Callable[..., Atoms]) -> Problem:
    cluster = Atoms("Cu3Al", positions=[[0, 0, 0], [2.4, 0, 0], [0, 2.6, 0.3], [1, 1, 2.1]])
    starts = [make_alloy(rattle=0.25, seed=1), cluster, make_alloy((1, 1, 1), rattle=0.25, seed=4)]
    targets = [atoms.copy() for atoms in starts]
    for number, atoms in enumerate(targets):
        atoms.rattle(0.1, seed=20 + number)
        atoms.wrap()
    graph = build_graph(starts, potential.cutoff)
    return Problem(graph, torch.from_numpy(np.concatenate([atoms.positions for atoms in targets])))


def edges_of(graph: Graph) -> set[tuple[int, ...]]:
    rows = torch.cat([graph.senders_e[:, None], graph.receivers_e[:, None], graph.shifts_e3.long()], dim=1)
    return {tuple(row) for row in rows.tolist()}


def slope(loss: Callable[[float], Tensor], step: float = 1e-5) -> float:
    """Central difference of fourth order."""
    near, far = (float(loss(h) - loss(-h)) / (2 * h) for h in (step, 2 * step))
    return (4 * near - far) / 3


@pytest.mark.parametrize("settings", MAPS.values(), ids=MAPS)
def test_the_gradient_with_respect_to_the_model_is_that_of_finite_differences(
    potential: Potential, problem: Problem, settings: MapSettings
) -> None:
    parameters = [p for p in as_module(potential).parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        problem.loss(potential, settings, "adjoint"), parameters, allow_unused=True, materialize_grads=True
    )
    random = torch.Generator().manual_seed(1)
    originals = [p.detach().clone() for p in parameters]
    for _ in range(3):
        directions = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]

        def loss(h: float, directions: list[Tensor] = directions) -> Tensor:
            with torch.no_grad():
                for p, original, direction in zip(parameters, originals, directions, strict=True):
                    p.copy_(original + h * direction)
            return problem.loss(potential, settings, "plain").detach()

        try:
            expected = slope(loss)
        finally:
            loss(0.0)
        found = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        assert abs(expected) > 1e-3
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", MAPS.values(), ids=MAPS)
def test_the_gradient_with_respect_to_the_start_is_that_of_finite_differences(
    potential: Potential, problem: Problem, settings: MapSettings
) -> None:
    start = problem.graph.positions_n3.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(problem.loss(potential, settings, "adjoint", start), start)
    random = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = torch.randn(start.shape, generator=random, dtype=start.dtype)

        def loss(h: float, direction: Tensor = direction) -> Tensor:
            return problem.loss(potential, settings, "plain", start.detach() + h * direction).detach()

        expected = slope(loss)
        assert abs(expected) > 1e-3
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", MAPS.values(), ids=MAPS)
def test_in_these_relaxations_atoms_do_come_into_the_cutoff_and_leave_it(
    potential: Potential, problem: Problem, settings: MapSettings
) -> None:
    end = rebuild_edges(
        problem.graph.with_positions(unroll(potential, problem.graph, settings)), potential.cutoff
    )
    before, after = edges_of(problem.graph), edges_of(end)
    assert before - after
    assert after - before


@pytest.mark.parametrize("settings", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_goes_by_the_forces_between_the_neighbours_of_the_moment(
    potential: Potential, problem: Problem, settings: MapSettings, engine: str
) -> None:
    graph, velocity = problem.graph, torch.zeros_like(problem.graph.positions_n3)
    for _ in range(settings.steps):
        graph = rebuild_edges(graph, potential.cutoff)
        velocity = settings.momentum * velocity + settings.step_size * evaluate(potential, graph).forces_n3
        length = velocity.norm(dim=1, keepdim=True)
        velocity = torch.where(length > settings.max_step, velocity * settings.max_step / length, velocity)
        graph = graph.with_positions(graph.positions_n3 + velocity)
    found = unroll(potential, problem.graph, settings, engine).detach()
    torch.testing.assert_close(found, graph.positions_n3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", MAPS.values(), ids=MAPS)
def test_the_engines_give_the_same_loss_and_the_same_gradient(
    potential: Potential, problem: Problem, settings: MapSettings
) -> None:
    assert set(ENGINES) == {"plain", "checkpoint", "adjoint"}
    start = problem.graph.positions_n3.clone().requires_grad_(True)
    inputs = [start, *as_module(potential).parameters()]
    losses, gradients = [], []
    for engine in ENGINES:
        loss = problem.loss(potential, settings, engine, start)
        losses.append(float(loss.detach()))
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.ravel() for g in found]))
    assert losses == pytest.approx(losses[:1] * len(ENGINES), rel=1e-12)
    assert gradients[0].abs().max() > 1e-2
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-10)


def test_the_map_is_gradient_descent_with_steps_of_bounded_length(morse: MorsePotential) -> None:
    """By hand: a dimer far from its minimum, one step and two with momentum."""
    graph = build_graph([Atoms("Cu2", positions=[[0, 0, 0], [2.2, 0, 0]])], morse.cutoff)
    force = evaluate(morse, graph).forces_n3.numpy()
    first = unroll(morse, graph, MapSettings(steps=1, step_size=0.01, max_step=1.0)).detach().numpy()
    np.testing.assert_allclose(first, graph.positions_n3.numpy() + 0.01 * force, atol=1e-14)
    next_force = evaluate(morse, graph.with_positions(torch.from_numpy(first))).forces_n3.numpy()
    both = (
        unroll(morse, graph, MapSettings(steps=2, step_size=0.01, momentum=0.5, max_step=1.0))
        .detach()
        .numpy()
    )
    np.testing.assert_allclose(both, first + 0.01 * next_force + 0.5 * 0.01 * force, atol=1e-14)
    limited = unroll(morse, graph, MapSettings(steps=1, step_size=1.0, max_step=0.03)).detach().numpy()
    assert np.abs(force).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(limited - graph.positions_n3.numpy(), axis=1), 0.03, rtol=1e-12)


def test_an_engine_that_does_not_exist_is_an_error_that_names_those_that_do(morse: MorsePotential) -> None:
    graph = build_graph([Atoms("Cu")], morse.cutoff)
    with pytest.raises(
        ValueError, match="no gradient engine 'magic'; choose one of plain, checkpoint, adjoint"
    ):
        unroll(morse, graph, MapSettings(steps=1), "magic")

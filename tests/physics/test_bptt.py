"""The gradient through an unrolled relaxation, against finite differences and between engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.graph import Graph, build_graph, rebuild_edges
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, as_module, evaluate
from hpcft.relaxation import (
    ENGINES,
    Coordinates,
    Descent,
    Fire,
    RelaxationMap,
    StepSize,
    Stop,
    Unrolled,
    cell_distance,
    delta_q,
    require_twice_differentiable,
    unroll,
    with_cells,
)


@dataclass(frozen=True)
class Settings:
    """One way to relax."""

    map: RelaxationMap
    steps: int
    with_cell: bool = False
    some_fixed: bool = False
    stops_early: bool = False


MAPS = {
    "plain": Settings(Descent(0.08, max_step=10.0), 6),
    "heavy ball": Settings(Descent(0.03, momentum=0.8, max_step=10.0), 8),
    "heavy ball with steps cut short": Settings(Descent(0.05, momentum=0.8, max_step=0.05), 6),
    "FIRE": Settings(Fire(first_timestep=0.3), 12),
    "one step size for each element": Settings(Descent(StepSize(0.04, [13, 29]).double(), momentum=0.5), 6),
    "some atoms fixed": Settings(Descent(0.05, momentum=0.8, max_step=10.0), 6, some_fixed=True),
    "structures that stop early": Settings(Descent(0.03, momentum=0.8, max_step=10.0), 8, stops_early=True),
}
CELLS = {
    "heavy ball with the cell": Settings(Descent(0.03, momentum=0.8, max_step=10.0), 8, with_cell=True),
    "FIRE with the cell": Settings(Fire(first_timestep=0.3), 10, with_cell=True),
}


EXACT = [name for name in ENGINES if name != "finite-difference"]


@dataclass
class Problem:
    """Relaxations of a mixed batch, and where they should end."""

    graph: Graph
    target_n3: Tensor
    stop: Stop | None = None

    def relax(
        self,
        potential: Potential,
        settings: Settings,
        engine: str,
        start_n3: Tensor | None = None,
        **options: Any,
    ) -> Unrolled:
        graph = self.graph if start_n3 is None else self.graph.with_positions(start_n3)
        fixed = torch.arange(len(graph.numbers_n)) % 3 == 0
        return unroll(
            potential,
            graph,
            settings.map,
            settings.steps,
            engine=engine,
            stop=self.stop,
            movable_n=~fixed if settings.some_fixed else None,
            with_cell=settings.with_cell,
            **options,
        )

    def loss(
        self,
        potential: Potential,
        settings: Settings,
        engine: str,
        start_n3: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        end = self.relax(potential, settings, engine, start_n3, **options)
        # Weights tell the structures apart: a mix-up of their distances would show.
        weights = torch.arange(1.0, self.graph.num_structures + 1, dtype=torch.float64)
        if not settings.with_cell:
            return (weights * delta_q(end.positions_n3, self.target_n3, self.graph)).sum()
        target = with_cells(self.graph, 1.02 * self.graph.cell_b33)
        distance = delta_q(end.positions_n3, self.target_n3, target, final_cell_b33=end.cell_b33)
        return (weights * (distance + cell_distance(end.cell_b33, target))).sum()


def problem_of(potential: Potential, starts: list[Atoms]) -> Problem:
    targets = [atoms.copy() for atoms in starts]
    for number, atoms in enumerate(targets):
        atoms.rattle(0.1, seed=20 + number)
        atoms.wrap()
    graph = build_graph(starts, potential.cutoff)
    return Problem(graph, torch.from_numpy(np.concatenate([atoms.positions for atoms in targets])))


@pytest.fixture
def problem(potential: Potential, make_alloy: Callable[..., Atoms], settings: Settings) -> Problem:
    starts = [make_alloy(rattle=0.25, seed=1), make_alloy((1, 1, 1), rattle=0.25, seed=4)]
    if not settings.with_cell:
        cluster = Atoms("Cu3Al", positions=[[0, 0, 0], [2.4, 0, 0], [0, 2.6, 0.3], [1, 1, 2.1]])
        starts.insert(1, cluster)
    problem = problem_of(potential, starts)
    if settings.stops_early:  # one by its forces, half way; one by its last step
        half = replace(settings, steps=settings.steps // 2)
        there = problem.graph.with_positions(problem.relax(potential, half, "adjoint").positions_n3.detach())
        coordinates = Coordinates.of(there)
        forces = evaluate(potential, rebuild_edges(there, potential.cutoff)).forces_n3
        problem.stop = Stop(fmax=1.01 * float(coordinates.largest(forces).min()))
    return problem


ALL = pytest.mark.parametrize("settings", [*MAPS.values(), *CELLS.values()], ids=[*MAPS, *CELLS])


def parameters_of(potential: Potential, settings: Settings) -> list[Tensor]:
    step_size = getattr(settings.map, "step_size", None)
    learnable = list(step_size.parameters()) if isinstance(step_size, StepSize) else []
    return [*as_module(potential).parameters(), *learnable]


def edges_of(graph: Graph) -> set[tuple[int, ...]]:
    rows = torch.cat([graph.senders_e[:, None], graph.receivers_e[:, None], graph.shifts_e3.long()], dim=1)
    return {tuple(row) for row in rows.tolist()}


def slope(loss: Callable[[float], Tensor], step: float = 1e-5) -> float:
    """Central difference of fourth order."""
    near, far = (float(loss(h) - loss(-h)) / (2 * h) for h in (step, 2 * step))
    return (4 * near - far) / 3


@ALL
def test_the_gradient_with_respect_to_the_model_is_that_of_finite_differences(
    potential: Potential, problem: Problem, settings: Settings
) -> None:
    parameters = [p for p in parameters_of(potential, settings) if p.requires_grad]
    gradients = torch.autograd.grad(
        problem.loss(potential, settings, "adjoint"), parameters, allow_unused=True, materialize_grads=True
    )
    random = torch.Generator().manual_seed(1)
    originals = [p.detach().clone() for p in parameters]
    for _ in range(2):
        directions = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]

        def loss(h: float, directions: list[Tensor] = directions) -> Tensor:
            with torch.no_grad():
                for p, original, direction in zip(parameters, originals, directions, strict=True):
                    p.copy_(original + h * direction)
            return problem.loss(potential, settings, "adjoint").detach()

        try:
            expected = slope(loss)
        finally:
            loss(0.0)
        found = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        assert abs(expected) > 1e-3
        assert found == pytest.approx(expected, rel=1e-6)


@ALL
def test_the_gradient_with_respect_to_the_start_is_that_of_finite_differences(
    potential: Potential, problem: Problem, settings: Settings
) -> None:
    start = problem.graph.positions_n3.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(problem.loss(potential, settings, "adjoint", start), start)
    random = torch.Generator().manual_seed(2)
    for _ in range(2):
        direction = torch.randn(start.shape, generator=random, dtype=start.dtype)

        def loss(h: float, direction: Tensor = direction) -> Tensor:
            return problem.loss(potential, settings, "adjoint", start.detach() + h * direction).detach()

        expected = slope(loss)
        assert abs(expected) > 1e-3
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6)


@ALL
def test_in_these_relaxations_atoms_do_come_into_the_cutoff_and_leave_it(
    potential: Potential, problem: Problem, settings: Settings
) -> None:
    end = problem.relax(potential, settings, "adjoint")
    there = with_cells(problem.graph.with_positions(end.positions_n3), end.cell_b33.detach())
    before, after = edges_of(problem.graph), edges_of(rebuild_edges(there, potential.cutoff))
    assert before - after
    assert after - before


@ALL
def test_the_engines_give_the_same_loss_and_the_same_gradient(
    potential: Potential, problem: Problem, settings: Settings
) -> None:
    start = problem.graph.positions_n3.clone().requires_grad_(True)
    inputs = [start, *parameters_of(potential, settings)]
    losses, gradients = {}, {}
    for engine in ENGINES:
        loss = problem.loss(potential, settings, engine, start)
        losses[engine] = float(loss.detach())
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        gradients[engine] = torch.cat([g.ravel() for g in found])
    assert list(losses.values()) == pytest.approx([losses["plain"]] * len(ENGINES), rel=1e-12)
    expected = gradients.pop("plain")
    assert expected.abs().max() > 1e-2
    for engine, gradient in gradients.items():
        bound = 1e-10 if engine in EXACT else 1e-6
        assert float((gradient - expected).norm() / expected.norm()) < bound, engine


@ALL
def test_truncated_back_propagation_is_that_of_a_relaxation_which_starts_later(
    potential: Potential, problem: Problem, settings: Settings
) -> None:
    """All steps is everything; one step is what the forces of that step alone say."""
    parameters = list(as_module(potential).parameters())

    def gradient(last: int | None) -> Tensor:
        loss = problem.loss(potential, settings, "adjoint", last=last)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.ravel() for g in found])

    whole = gradient(None)
    torch.testing.assert_close(gradient(settings.steps), whole, rtol=1e-10, atol=1e-10)
    differences = [float((gradient(last) - whole).norm() / whole.norm()) for last in (settings.steps - 1, 1)]
    assert 1e-6 < differences[0] < differences[1]


def test_the_truncated_gradient_is_that_of_the_steps_it_names(morse: MorsePotential, make_alloy: Any) -> None:
    """By hand: three steps without a gradient, then two with one."""
    graph = build_graph([make_alloy(rattle=0.2, seed=1)], morse.cutoff)
    target = torch.from_numpy(make_alloy(rattle=0.1, seed=2).positions)
    map = Descent(0.04, max_step=10.0)
    middle = unroll(morse, graph, map, 3).positions_n3.detach()
    end = unroll(morse, rebuild_edges(graph.with_positions(middle), morse.cutoff), map, 2)
    expected = torch.autograd.grad(delta_q(end.positions_n3, target, graph).sum(), morse.length)[0]
    truncated = unroll(morse, graph, map, 5, last=2)
    found = torch.autograd.grad(delta_q(truncated.positions_n3, target, graph).sum(), morse.length)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", [MAPS[name] for name in ("plain", "heavy ball with steps cut short")])
def test_every_step_goes_by_the_forces_between_the_neighbours_of_the_moment(
    potential: Potential, problem: Problem, settings: Settings, engine: str
) -> None:
    map: Any = settings.map
    graph, velocity = problem.graph, torch.zeros_like(problem.graph.positions_n3)
    for _ in range(settings.steps):
        graph = rebuild_edges(graph, potential.cutoff)
        velocity = map.momentum * velocity + map.step_size * evaluate(potential, graph).forces_n3
        length = velocity.norm(dim=1, keepdim=True)
        velocity = torch.where(length > map.max_step, velocity * map.max_step / length, velocity)
        graph = graph.with_positions(graph.positions_n3 + velocity)
    found = problem.relax(potential, settings, engine).positions_n3.detach()
    torch.testing.assert_close(found, graph.positions_n3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [MAPS["structures that stop early"]])
def test_structures_stop_each_in_its_own_step_where_it_would_stop_alone(
    potential: Potential, problem: Problem, settings: Settings, make_alloy: Callable[..., Atoms]
) -> None:
    together = problem.relax(potential, settings, "adjoint")
    assert len(set(together.num_steps_b.tolist())) >= 2
    assert together.valid_b.all()
    for b in range(problem.graph.num_structures):
        mine = problem.graph.structure_n == b
        alone = replace(problem, graph=problem.graph.take([b]), target_n3=problem.target_n3[mine]).relax(
            potential, settings, "adjoint"
        )
        assert int(alone.num_steps_b) == int(together.num_steps_b[b])
        assert bool(alone.converged_b) == bool(together.converged_b[b])
        torch.testing.assert_close(alone.positions_n3, together.positions_n3[mine], rtol=0, atol=1e-12)


def gradient_descent(steps: int, **options: Any) -> Any:
    return {"map": Descent(**options), "steps": steps}


def test_the_map_is_gradient_descent_with_steps_of_bounded_length(morse: MorsePotential) -> None:
    """By hand: a dimer far from its minimum, one step and two with momentum."""
    graph = build_graph([Atoms("Cu2", positions=[[0, 0, 0], [2.2, 0, 0]])], morse.cutoff)

    def end(steps: int, **options: Any) -> np.ndarray:
        found = unroll(morse, graph, **gradient_descent(steps, **options))
        return found.positions_n3.detach().numpy()

    force = evaluate(morse, graph).forces_n3.numpy()
    first = end(1, step_size=0.01, max_step=1.0)
    np.testing.assert_allclose(first, graph.positions_n3.numpy() + 0.01 * force, atol=1e-14)
    next_force = evaluate(morse, graph.with_positions(torch.from_numpy(first))).forces_n3.numpy()
    both = end(2, step_size=0.01, momentum=0.5, max_step=1.0)
    np.testing.assert_allclose(both, first + 0.01 * next_force + 0.5 * 0.01 * force, atol=1e-14)
    limited = end(1, step_size=1.0, max_step=0.03)
    assert np.abs(force).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(limited - graph.positions_n3.numpy(), axis=1), 0.03, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_structure_whose_map_diverges_is_left_out_and_the_others_keep_their_gradient(
    morse: MorsePotential, make_alloy: Callable[..., Atoms], engine: str
) -> None:
    """Fails if one bad structure puts NaN, or anything at all, into the gradient of the batch."""
    good, overlapping = make_alloy(rattle=0.2, seed=1), make_alloy((1, 1, 1), rattle=0.2, seed=2)
    overlapping.positions[1] = overlapping.positions[0] + [0.02, 0, 0]
    morse.log_depth.data.add_(2.0)
    target = torch.from_numpy(make_alloy(rattle=0.1, seed=3).positions)
    gradients = []
    for structures in ([good], [good, overlapping]):
        graph = build_graph(structures, morse.cutoff)
        end = unroll(morse, graph, Descent(0.001), 4, engine=engine)
        assert end.valid_b.tolist() == [True, False][: len(structures)]
        only = graph.take([0])
        loss = delta_q(end.positions_n3[: len(good)], target, only).sum()
        gradients.append(torch.autograd.grad(loss, morse.length)[0])
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
    assert np.array_equal(end.positions_n3[len(good) :].detach().numpy(), overlapping.positions)


def test_what_cannot_be_unrolled_is_an_error_that_says_what_can(morse: MorsePotential) -> None:
    graph = build_graph([Atoms("Cu")], morse.cutoff)
    with pytest.raises(
        ValueError, match="no gradient engine 'magic'; choose one of plain, checkpoint, adjoint"
    ):
        unroll(morse, graph, Descent(), 1, engine="magic")
    with pytest.raises(ValueError, match="0 steps goes nowhere"):
        unroll(morse, graph, Descent(), 0)
    with pytest.raises(ValueError, match="at least one step"):
        unroll(morse, graph, Descent(), 3, last=0)
    with pytest.raises(ValueError, match="span no volume"):
        unroll(morse, graph, Descent(), 3, with_cell=True)
    for wrong in ({"step_size": -1.0}, {"momentum": 1.0}, {"max_step": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Descent(**wrong)


class Linear(MorsePotential):
    """Its forces are constants."""

    def energies(self, graph: Graph) -> Tensor:
        return graph.vectors_e3.abs().sum().expand(graph.num_structures)


class Detached(MorsePotential):
    """Its energy does not know where it comes from."""

    def energies(self, graph: Graph) -> Tensor:
        return super().energies(graph.with_positions(graph.positions_n3.detach()))


@pytest.mark.parametrize("kind", [Linear, Detached])
def test_a_model_that_cannot_be_differentiated_twice_is_refused(
    make_alloy: Callable[..., Atoms], morse: MorsePotential, kind: type[MorsePotential]
) -> None:
    graph = build_graph([make_alloy()], morse.cutoff)
    require_twice_differentiable(morse, graph)
    require_twice_differentiable(
        morse, build_graph([Atoms("Cu", cell=[2.6] * 3, pbc=True)], morse.cutoff)
    )  # nothing to tell by
    with pytest.raises(UserError, match="not twice differentiable"):
        require_twice_differentiable(kind([13, 29]).double(), graph)

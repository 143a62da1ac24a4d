"""The gradient of a relaxed structure by the implicit function theorem, against finite differences and BPTT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from hpcft.models.graph import Graph, build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, as_module, device_of, dtype_of
from hpcft.relaxation import (
    Coordinates,
    Descent,
    ImplicitReport,
    Lbfgs,
    Solver,
    Unrolled,
    cell_distance,
    delta_q,
    relaxed_implicitly,
    unroll,
    with_cells,
)
from hpcft.relaxation.implicit import rigid_motions

# A soft mode makes a small force a long way from the minimum, and a small residual a large error.
TIGHT: Any = {"fmax": 1e-12, "max_stress": 1e-13, "map": Lbfgs(), "solver": Solver(tolerance=1e-12)}


MACE_BY_NIGHT = pytest.mark.parametrize(
    "potential", ["morse", pytest.param("tiny_mace", marks=pytest.mark.nightly)], indirect=True
)


@dataclass
class Problem:
    """Structures to be relaxed by a model, and where they should end."""

    graph: Graph
    target_n3: Tensor
    fixed_n: Tensor
    with_cell: bool = False
    options: dict[str, Any] = field(default_factory=lambda: dict(TIGHT))

    @classmethod
    def of(
        cls, potential: Potential, starts: list[Atoms], fixed: dict[int, list[int]] | None = None, **more: Any
    ) -> Problem:
        """`fixed`: the fixed atoms of some of the structures."""
        targets = [atoms.copy() for atoms in starts]
        for number, atoms in enumerate(targets):
            atoms.rattle(0.1, seed=20 + number)
        masks = [
            np.isin(np.arange(len(atoms)), (fixed or {}).get(number, []))
            for number, atoms in enumerate(starts)
        ]
        return cls(
            build_graph(starts, potential.cutoff, dtype=dtype_of(potential), device=device_of(potential)),
            torch.from_numpy(np.concatenate([atoms.positions for atoms in targets])),
            torch.from_numpy(np.concatenate(masks)),
            **more,
        )

    def relax(self, potential: Potential) -> tuple[Unrolled, ImplicitReport]:
        return relaxed_implicitly(
            potential, self.graph, movable_n=~self.fixed_n, with_cell=self.with_cell, **self.options
        )

    def distances(self, end: Unrolled) -> Tensor:
        target_n3 = self.target_n3.to(end.positions_n3.dtype)
        if not self.with_cell:
            return delta_q(end.positions_n3, target_n3, self.graph)
        target = with_cells(self.graph, 1.02 * self.graph.cell_b33)
        distance = delta_q(end.positions_n3, target_n3, target, final_cell_b33=end.cell_b33)
        # The last term sees the direction of the cell too, which the others do not.
        return distance + cell_distance(end.cell_b33, target) + end.cell_b33[:, 0, 1] + end.positions_n3[1, 0]

    def loss(self, end: Unrolled) -> Tensor:
        """Weights tell the structures apart; what is not valid is left out, as in training."""
        weights = torch.arange(1.0, self.graph.num_structures + 1, dtype=end.positions_n3.dtype)
        return (weights * self.distances(end))[end.valid_b].sum()

    def from_where_it_ends(self, potential: Potential) -> Problem:
        """The same at rest already: a cluster that turns on its way would turn differently with other parameters."""
        with torch.no_grad():
            end, _ = self.relax(potential)
        assert end.valid_b.all()
        return replace(self, graph=with_cells(self.graph.with_positions(end.positions_n3), end.cell_b33))


def gradient_of(loss: Tensor, potential: Potential) -> Tensor:
    found = torch.autograd.grad(
        loss, list(as_module(potential).parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.ravel() for g in found])


def slope_along(potential: Potential, direction: Tensor, loss: Callable[[], float], step: float) -> float:
    """Central difference of fourth order; the potential is left as it was."""
    parameters = list(as_module(potential).parameters())
    originals = [p.detach().clone() for p in parameters]
    parts = direction.split([p.numel() for p in parameters])

    def at(h: float) -> float:
        with torch.no_grad():
            for p, original, part in zip(parameters, originals, parts, strict=True):
                p.copy_(original + h * part.reshape(p.shape))
        return loss()

    try:
        near, far = ((at(h) - at(-h)) / (2 * h) for h in (step, 2 * step))
    finally:
        at(0.0)
    return (4 * near - far) / 3


def assert_gradient_of_finite_differences(potential: Potential, problem: Problem, step: float = 3e-4) -> None:
    end, report = problem.relax(potential)
    assert end.valid_b.all()
    gradient = gradient_of(problem.loss(end), potential)
    assert report.left_out == {}
    # In exact arithmetic as many iterations as there are numbers to find; more only by rounding.
    assert 1 <= report.num_iterations < 6 * len(problem.target_n3)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=gradient.dtype)

    def loss() -> float:
        return float(problem.loss(problem.relax(potential)[0]).detach())

    expected = slope_along(potential, direction, loss, step)
    assert abs(expected) > 1e-3
    assert float(gradient @ direction) == pytest.approx(expected, rel=1e-6)


def vacancy(make_alloy: Callable[..., Atoms], seed: int = 1, **options: Any) -> Atoms:
    """Of so low a symmetry that where it relaxes to depends on the model, at fixed cell too."""
    atoms = make_alloy((2, 1, 1), seed=seed, **options)
    del atoms[3]
    return atoms


def cluster() -> Atoms:
    return Atoms("Cu3Al", positions=[[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0.3], [1.3, 1, 2.4]])


def line() -> Atoms:
    """It stays straight by symmetry; bent it would be lower."""
    return Atoms("Cu3", positions=[[0, 0, 0], [2.8, 0, 0], [5.6, 0, 0]])


def test_the_gradient_is_that_of_finite_differences_of_the_converged_relaxation(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    """Free, with fixed atoms, and open: held at one atom a cluster may turn about it, held at two about their line."""
    starts = [vacancy(make_alloy), cluster(), vacancy(make_alloy, 2), cluster(), cluster()]
    if not isinstance(potential, MorsePotential):
        starts = starts[:3]  # the other ways to hold a cluster are the same for every model
    problem = Problem.of(potential, starts, {2: [0], 3: [1], 4: [0, 1]})
    assert_gradient_of_finite_differences(potential, problem.from_where_it_ends(potential))


@MACE_BY_NIGHT
def test_with_the_cell_the_gradient_is_that_of_finite_differences_from_the_start(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    starts = [make_alloy((1, 1, 1), seed=2), make_alloy((1, 1, 1), seed=3)]
    problem = Problem.of(potential, starts, {1: [0]}, with_cell=True)
    assert_gradient_of_finite_differences(potential, problem, step=1.5e-4)


@MACE_BY_NIGHT
def test_a_wire_may_turn_about_itself_and_a_slab_may_not_tilt(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    slab = make_alloy((1, 1, 1), seed=3)
    slab.pbc = [True, True, False]
    wire = Atoms("CuAlCu", positions=[[0, 0, 0], [0.3, 1.9, 1.6], [1.7, 0.2, 1.5]])
    wire.set_cell([0, 0, 3.2])
    wire.pbc = [False, False, True]
    problem = Problem.of(potential, [slab, wire]).from_where_it_ends(potential)
    modes = rigid_motions(Coordinates.of(problem.graph), problem.graph.positions_n3)
    assert modes[:, : len(slab)].flatten(1).any(dim=1).sum() == 3
    assert modes[:, len(slab) :].flatten(1).any(dim=1).sum() == 4
    assert_gradient_of_finite_differences(potential, problem)


@pytest.mark.parametrize("with_cell", [False, True])
@MACE_BY_NIGHT
def test_the_gradient_is_that_of_back_propagation_through_a_long_descent(
    potential: Potential, make_alloy: Callable[..., Atoms], with_cell: bool
) -> None:
    starts = [make_alloy((1, 1, 1), 0.03, 2), make_alloy((1, 1, 1), 0.03, 3)]
    if not with_cell:
        starts = [vacancy(make_alloy, seed, rattle=0.03) for seed in (2, 3)]
    problem = Problem.of(potential, starts, {1: [0]}, with_cell=with_cell)
    fmax = 1e-8 if isinstance(potential, MorsePotential) else 1e-11  # random weights have soft modes
    problem.options |= {
        "fmax": fmax,
        "max_stress": 0.1 * fmax,
        "max_steps": 5000,
        "map": Descent(0.08, momentum=0.9),
    }
    implicit, _ = problem.relax(potential)
    steps = int(implicit.num_steps_b.max())
    end = unroll(
        potential,
        problem.graph,
        Descent(0.08, momentum=0.9),
        steps,
        movable_n=~problem.fixed_n,
        with_cell=with_cell,
    )
    assert steps > 50
    expected = gradient_of(problem.loss(end), potential)
    found = gradient_of(problem.loss(implicit), potential)
    assert float(expected.norm()) > 1e-2
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_of_a_cluster_that_turns_on_its_way_the_shape_has_the_gradient_of_the_descent(
    morse: MorsePotential,
) -> None:
    """How far it turns is a matter of the way, and of no loss that compares shapes."""
    problem = Problem.of(morse, [cluster()])

    def shape(end: Unrolled) -> Tensor:
        return (torch.pdist(end.positions_n3) - torch.pdist(problem.target_n3)).square().sum()

    end = unroll(morse, problem.graph, Descent(0.08, momentum=0.9), 450)
    expected = gradient_of(shape(end), morse)
    found = gradient_of(shape(problem.relax(morse)[0]), morse)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", ["runs out of steps", "diverges", "is a saddle", "falls into two parts"])
def test_a_structure_that_is_no_minimum_is_named_and_the_others_keep_their_gradient(
    morse: MorsePotential, make_alloy: Callable[..., Atoms], bad: str
) -> None:
    good, steps = vacancy(make_alloy, rattle=0.02), 500
    if bad == "runs out of steps":
        other, steps = vacancy(make_alloy, rattle=0.4), 25
    elif bad == "diverges":
        other = make_alloy((1, 1, 1))
        other.positions[1] = other.positions[0] + [1e-3, 0, 0]
        with torch.no_grad():
            morse.log_depth += 5.0
    elif bad == "is a saddle":
        other = line()
    else:
        other = Atoms("Cu4", positions=[[0, 0, 0], [2.7, 0, 0], [20, 0, 0], [20, 2.7, 0]])
    together = Problem.of(morse, [good, other])
    together.options |= {"fmax": 1e-6, "max_steps": steps}
    alone = replace(
        together,
        graph=together.graph.take([0]),
        target_n3=together.target_n3[: len(good)],
        fixed_n=together.fixed_n[: len(good)],
    )
    expected = gradient_of(alone.loss(alone.relax(morse)[0]), morse)
    end, report = together.relax(morse)
    found = gradient_of(together.loss(end), morse)
    assert bool(end.valid_b[0])
    assert torch.isfinite(found).all()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    if bad in ("runs out of steps", "diverges"):
        assert not bool(end.valid_b[1])
        assert not bool(end.converged_b[1])
        assert report.left_out == {}
    else:
        assert end.valid_b.all()
        assert list(report.left_out) == [1]
        assert "no minimum" in report.left_out[1]


def test_along_the_symmetry_of_a_saddle_the_gradient_is_the_one_of_a_relaxation_that_keeps_it(
    morse: MorsePotential,
) -> None:
    """What falls off the saddle is not asked for by this loss."""
    problem = Problem.of(morse, [line()])
    problem.target_n3 = torch.tensor([[0.0, 0, 0], [2.5, 0, 0], [5.6, 0, 0]], dtype=torch.float64)
    assert_gradient_of_finite_differences(morse, problem)


def test_a_system_that_is_not_solved_in_time_is_named_too(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    problem = Problem.of(morse, [vacancy(make_alloy)])
    problem.options["solver"] = Solver(max_iterations=2)
    end, report = problem.relax(morse)
    assert not gradient_of(problem.loss(end), morse).any()
    assert "not solved after 2 iterations" in report.left_out[0]


def test_where_nothing_is_a_minimum_there_is_no_gradient_and_no_error(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    problem = Problem.of(morse, [vacancy(make_alloy)])
    problem.options["max_steps"] = 2
    end, report = problem.relax(morse)
    assert not end.valid_b.any()
    assert not end.positions_n3.requires_grad
    assert report == ImplicitReport()


@MACE_BY_NIGHT
def test_a_model_in_single_precision_gets_a_gradient_in_single_precision_that_is_exact(
    potential: Potential, make_alloy: Callable[..., Atoms]
) -> None:
    """Solved in float64: forces in float32 are too rough for a Hessian near zero force."""
    single: Any = copy.deepcopy(as_module(potential)).float()
    double: Any = copy.deepcopy(single).double()
    starts = [vacancy(make_alloy)]
    gradients = []
    for model in (single, double):
        problem = Problem.of(model, starts)
        end, report = problem.relax(model)
        assert end.positions_n3.dtype == dtype_of(model)
        assert report.left_out == {}
        gradients.append(gradient_of(problem.loss(end), model))
    assert gradients[0].dtype == torch.float32
    error = float((gradients[0].double() - gradients[1]).norm() / gradients[1].norm())
    assert error < 1e-5


def test_what_the_relaxation_itself_goes_through_is_not_kept(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    graph = build_graph([vacancy(make_alloy)], morse.cutoff)
    with torch.no_grad():
        for last in (None, 2):
            assert not unroll(morse, graph, Descent(), 5, last=last).positions_n3.requires_grad
    assert unroll(morse, graph, Descent(), 5, last=2).positions_n3.requires_grad


def test_rigid_motions_are_those_that_leave_the_energy_alone(morse: MorsePotential) -> None:
    """How many there are, for every way to hold a cluster; and each is in the kernel of the Hessian."""
    end, _ = Problem.of(morse, [cluster()]).relax(morse)
    graph = build_graph([cluster()], morse.cutoff).with_positions(end.positions_n3.detach())
    for fixed, count in (([], 6), ([0], 3), ([0, 1], 1), ([0, 1, 2], 0), ([0, 1, 2, 3], 0)):
        movable = torch.tensor([number not in fixed for number in range(4)])
        coordinates = Coordinates.of(graph, movable_n=movable)
        rows = coordinates.first_rows().clone().requires_grad_(True)
        modes = rigid_motions(coordinates, rows)
        found = modes[modes.flatten(1).any(dim=1)]
        assert len(found) == count
        torch.testing.assert_close(found.flatten(1) @ found.flatten(1).T, torch.eye(count).double())
        assert found[:, ~movable].abs().sum() < 1e-10
        forces = coordinates.forces(
            morse, rows, coordinates.neighbours(morse.cutoff).listed, create_graph=True
        )
        for mode in found:
            (product,) = torch.autograd.grad(forces, rows, mode, retain_graph=True)
            assert float(coordinates.free(product).abs().max()) < 1e-8
    dimer = build_graph([Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.5]])], morse.cutoff)
    modes = rigid_motions(Coordinates.of(dimer), dimer.positions_n3)
    assert modes.flatten(1).any(dim=1).sum() == 5

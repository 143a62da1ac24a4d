"""The gradient of a relaxed structure without the way to it: implicit differentiation at the minimum.

At a minimum F(X*, theta) = 0, hence dX*/dtheta = H^-1 dF/dtheta with H = -dF/dX, and for any loss L(X*)

    dL/dtheta = w^T dF/dtheta,   H w = dL/dX*        (implicit function theorem; one linear system, no unroll)

The system is solved by conjugate gradients with Hessian-vector products, all structures at once; memory and time do not
depend on how long the relaxation was. It holds where X* is a true minimum: forces zero, H positive definite but for the
rigid motions, which are projected out (descent from a given start does not move along them). A structure for which that is
not so is found out and left out: one that has not converged before the loss is formed, one with a direction of negative
curvature, or too flat to solve, when the gradient passes.

Shape suffixes: n atoms of the whole batch, b structures, r rows of `coordinates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcft.models.graph import Graph
from hpcft.models.protocol import Potential, as_module, dtype_of
from hpcft.relaxation.coordinates import Coordinates
from hpcft.relaxation.engines import float64_twin
from hpcft.relaxation.maps import Fire, RelaxationMap
from hpcft.relaxation.unroll import Stop, Unrolled, unroll

# Curvature below which a direction is no longer that of a minimum, eV/Å^2. Real vibrations are above 0.1.
_FLAT = 1e-6
# Part of the whole below which a motion is none.
_SMALL = 1e-6


@dataclass
class ImplicitReport:
    """What became of the linear systems, known once the gradient has passed.

    `left_out` names the structures (numbers in the batch) whose gradient was set to zero, and why.
    """

    num_iterations: int = 0
    left_out: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Solver:
    """Conjugate gradients until the residual is `tolerance` of the right-hand side, in at most `max_iterations`."""

    tolerance: float = 1e-8
    max_iterations: int = 500


def relaxed_implicitly(
    potential: Potential,
    graph: Graph,
    *,
    fmax: float = 1e-4,
    max_stress: float = 6e-6,
    max_steps: int = 2000,
    map: RelaxationMap | None = None,
    solver: Solver | None = None,
    movable_n: Tensor | None = None,
    with_cell: bool = False,
) -> tuple[Unrolled, ImplicitReport]:
    """Relax a batch to its minima (FIRE unless another `map` is named), with their gradient in the model's parameters.

    Computed in float64, whatever the model's precision; positions and cells come back in the model's. Structures that are
    not below `fmax` (eV/Å) and `max_stress` (eV/Å^3) after `max_steps` are not `valid_b`. There is no gradient with respect
    to the start: a minimum does not depend on it.
    """
    dtype, solver = dtype_of(potential), solver or Solver()
    twin = float64_twin(potential)
    graph = graph.to(graph.structure_n.device, torch.float64)
    with torch.no_grad():
        end = unroll(
            twin,
            graph.with_positions(graph.positions_n3.detach()),
            map or Fire(),
            max_steps,
            stop=Stop(fmax=fmax, max_stress=max_stress),
            movable_n=movable_n,
            with_cell=with_cell,
        )
    report = ImplicitReport()
    valid_b = end.valid_b & end.converged_b
    positions, cells = end.positions_n3.detach(), end.cell_b33.detach()
    chosen = torch.nonzero(valid_b).ravel().tolist()
    if chosen:
        coordinates = Coordinates.of(graph, movable_n=movable_n, with_cell=with_cell)
        all_rows = coordinates.rows_at(positions, cells)
        where = torch.nonzero(coordinates.rows_of(chosen)).ravel()
        parameters = [p for p in as_module(potential).parameters() if p.requires_grad]
        problem = _Problem(twin, coordinates.take(chosen), all_rows[where], chosen, solver, report)
        rows = _AtMinimum.apply(problem, *parameters)  # type: ignore[no-untyped-call]
        positions, cells = coordinates.positions_and_cells(all_rows.index_copy(0, where, rows))
    unrolled = Unrolled(positions.to(dtype), cells.to(dtype), end.num_steps_b, end.converged_b, valid_b)
    return unrolled, report


@dataclass(frozen=True)
class _Problem:
    twin: Potential
    coordinates: Coordinates
    rows: Tensor
    names: list[int]
    solver: Solver
    report: ImplicitReport


class _AtMinimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, *parameters: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.save_for_backward(*parameters)  # so that autograd refuses weights that were changed meanwhile
        return problem.rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        assert ctx.saved_tensors is not None
        coordinates, twin = problem.coordinates, problem.twin
        rows = problem.rows.detach().clone().requires_grad_(True)
        listed = coordinates.list_at(rows, coordinates.neighbours(twin.cutoff))
        forces = coordinates.forces(twin, rows, listed, create_graph=True)

        def hessian_times(vectors: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(forces, rows, -vectors, retain_graph=True)
            return coordinates.free(product)

        rigid = rigid_motions(coordinates, problem.rows)
        solution = _conjugate_gradients(problem, hessian_times, coordinates.free(cotangent), rigid)
        parameters = [p for p in as_module(twin).parameters() if p.requires_grad]
        gradients = torch.autograd.grad(forces, parameters, solution, allow_unused=True)
        return None, *(
            None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


def _conjugate_gradients(problem: _Problem, hessian_times: Any, right: Tensor, rigid: Tensor) -> Tensor:
    """H w = right for each structure by itself; zero for those where it cannot be solved (they are reported)."""
    coordinates, report = problem.coordinates, problem.report
    s = coordinates.structure_r

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return coordinates.per_structure((a * b).sum(-1))

    def project(vectors: Tensor) -> Tensor:
        for mode in rigid:
            vectors = vectors - dot(mode, vectors)[s, None] * mode
        return vectors

    residual = project(right)
    solution, direction = torch.zeros_like(residual), residual.clone()
    squared = dot(residual, residual)
    enough = squared * problem.solver.tolerance**2
    open_b = squared > 0
    for _ in range(problem.solver.max_iterations):
        if not bool(open_b.any()):
            break
        report.num_iterations += 1
        image = project(hessian_times(direction))
        curvature = dot(direction, image)
        bad = open_b & ~(curvature > _FLAT * dot(direction, direction))
        for b in torch.nonzero(bad).ravel().tolist():
            report.left_out[problem.names[b]] = (
                "it is no minimum: there is a direction of negative or no curvature"
            )
        open_b = open_b & ~bad
        solution = torch.where(bad[s, None], 0.0, solution)
        length = torch.where(open_b, squared / curvature, 0.0)
        solution = solution + length[s, None] * direction
        residual = residual - length[s, None] * image
        after = dot(residual, residual)
        turn = torch.where(open_b, after / squared, 0.0)
        direction = torch.where(open_b[s, None], residual + turn[s, None] * direction, 0.0)
        squared = torch.where(open_b, after, squared)
        open_b = open_b & (squared > enough)
    for b in torch.nonzero(open_b).ravel().tolist():
        report.left_out[problem.names[b]] = (
            f"its linear system is not solved after {problem.solver.max_iterations} iterations: it is very flat"
        )
    return torch.where(open_b[s, None], 0.0, solution)


def rigid_motions(coordinates: Coordinates, rows_r3: Tensor) -> Tensor:
    """Orthonormal motions of each structure as a whole that leave its energy alone, [6, r, 3] (zeros where fewer).

    Translations, and rotations about every axis about which nothing repeats; with fixed atoms those that leave them
    where they are, such as turning about one or two of them.
    """
    modes = rows_r3.new_zeros(6, len(rows_r3), 3)
    start, atom_rows = coordinates.start, torch.nonzero(~coordinates.is_cell_r).ravel()
    for b in range(coordinates.num_structures):
        mine = start.structure_n == b
        rows = atom_rows[mine]
        positions = rows_r3[rows].detach()
        candidates = _translations_and_rotations(
            positions - positions.mean(dim=0), start.periodic_b3[b], start.cell_b33[b]
        )
        kept = _orthonormal(_holding(candidates, ~coordinates.movable_n[mine]).flatten(1))
        modes[: len(kept), rows] = kept.reshape(len(kept), len(rows), 3)
    return modes


def _translations_and_rotations(positions: Tensor, periodic: Tensor, cell: Tensor) -> Tensor:
    axes = torch.eye(3, dtype=positions.dtype, device=positions.device)
    vectors = cell[periodic]
    if len(vectors) == 0:
        turning = axes
    elif len(vectors) == 1:  # a wire turns about itself
        turning = vectors / vectors.norm()
    else:
        turning = axes[:0]
    modes = [axis.expand_as(positions) for axis in axes]
    modes += [torch.linalg.cross(axis.expand_as(positions), positions, dim=-1) for axis in turning]
    return torch.stack(modes)


def _holding(motions: Tensor, fixed_n: Tensor) -> Tensor:
    """Those combinations of the motions, [m, n, 3], in which the fixed atoms rest."""
    if not bool(fixed_n.any()):
        return motions
    of_fixed = motions[:, fixed_n].flatten(1)
    squared, combinations = torch.linalg.eigh(of_fixed @ of_fixed.T)
    still = combinations[:, squared < (_SMALL * motions.norm()) ** 2]
    held: Tensor = torch.einsum("mk,mni->kni", still, motions)
    return held


def _orthonormal(vectors: Tensor) -> Tensor:
    """A basis of what the rows of `vectors` span: fewer than there are where one is none, as for a dimer about its axis."""
    if len(vectors) == 0:
        return vectors
    _, values, right = torch.linalg.svd(vectors, full_matrices=False)
    basis: Tensor = right[values > _SMALL * values.max().clamp_min(_SMALL)]
    return basis

"""How the gradient comes back through the forces of one relaxation step. All engines give the same answer.

All else that a step does (step sizes, momentum, what is cut short) is a few numbers per atom, and stays in autograd's
graph as it is. The forces are what costs memory, so only they differ:

    plain               autograd keeps the graph of every step: memory grows with their number
    checkpoint          torch.utils.checkpoint: the graph is built again when the gradient passes, one step at a time
    adjoint             the same, and of the forward pass only the rows are kept: memory hardly grows
    finite-difference   VJP of the forces by central differences of first derivatives, in float64:

        lambda^T dF/d(X, theta) = -d/d(X, theta) [E(X + h lambda) - E(X - h lambda)] / 2h  +  O(h^2)

The last two take the structures of a batch a few at a time on a CPU: what one step needs at once sets the peak of the
memory, and a smaller working set is also the faster one.

Shape suffixes: b structures, r rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hpcft.errors import UserError
from hpcft.models.graph import Graph
from hpcft.models.protocol import Potential, as_module, dtype_of
from hpcft.relaxation.coordinates import Coordinates

# Largest displacement of a finite difference in Å. Over MACE and Morse the error falls as its square from 1e-4 at 3e-3 Å
# to 5e-9 here; rounding begins to show below 1e-5.
_DISPLACEMENT = 2e-5
# The error at which it is no longer trusted.
MAX_DIFFERENCE_ERROR = 1e-4
# So many edges, or else one structure, are recomputed at once on a CPU.
_EDGES_AT_ONCE = 2000

Forces = Callable[[Coordinates, Tensor, Graph], Tensor]


@dataclass
class Accuracy:
    """What finite differences were found to be worth, against one exact step of each unroll."""

    largest_error: float = 0.0
    num_checks: int = 0
    fell_back: bool = False


@dataclass
class Engine:
    """`forces(coordinates, rows, listed)` with a gradient in the rows and in the parameters of the potential."""

    forces: Forces
    accuracy: Accuracy = field(default_factory=Accuracy)


def make_engine(name: str, potential: Potential) -> Engine:
    """The engine of that name for one unroll; ValueError for one that does not exist."""
    if name not in ENGINES:
        raise ValueError(f"there is no gradient engine '{name}'; choose one of {', '.join(ENGINES)}")
    return ENGINES[name](potential)


def _plain(potential: Potential) -> Engine:
    def forces(coordinates: Coordinates, rows: Tensor, listed: Graph) -> Tensor:
        return _exact(potential, coordinates, rows, listed)

    return Engine(forces)


def _checkpointed(potential: Potential) -> Engine:
    # Non-reentrant: the reentrant kind fails here, or is silently wrong under DDP. One step each: a segment of
    # several steps uses more memory than none, because of the double backward.
    def forces(coordinates: Coordinates, rows: Tensor, listed: Graph) -> Tensor:
        if not torch.is_grad_enabled():
            return _exact(potential, coordinates, rows, listed)

        def once(rows: Tensor) -> Tensor:
            return _exact(potential, coordinates, rows, listed)

        return cast(Tensor, checkpoint(once, rows, use_reentrant=False, preserve_rng_state=False))

    return Engine(forces)


def _adjoint(potential: Potential) -> Engine:
    return Engine(_recomputed(potential, _exact_vjp))


def _finite_difference(potential: Potential) -> Engine:
    twin = float64_twin(potential)
    accuracy = Accuracy()

    def vjp(call: _Call, rows: Tensor, cotangent: Tensor) -> list[Tensor | None]:
        if accuracy.fell_back:
            return _exact_vjp(call, rows, cotangent)
        found = _difference_vjp(twin, call, rows, cotangent)
        if accuracy.num_checks:
            return found
        accuracy.num_checks += 1
        exact = _exact_vjp(call.of(twin), rows.double(), cotangent.double())
        accuracy.largest_error = max(accuracy.largest_error, _relative_error(found, exact))
        accuracy.fell_back = accuracy.largest_error > MAX_DIFFERENCE_ERROR
        return [None if g is None else g.to(rows.dtype) for g in exact]

    return Engine(_recomputed(potential, vjp), accuracy)


ENGINES: dict[str, Callable[[Potential], Engine]] = {
    "plain": _plain,
    "checkpoint": _checkpointed,
    "adjoint": _adjoint,
    "finite-difference": _finite_difference,
}


def require_twice_differentiable(potential: Potential, graph: Graph) -> None:
    """UserError for a model through whose forces no gradient comes back, tried on `graph`: training through a relaxation
    would be silently of no effect."""
    coordinates = Coordinates.of(graph)
    may_be_zero = not bool((graph.num_atoms_b > 1).any()) or len(graph.senders_e) == 0
    rows = coordinates.first_rows().detach()
    call = _Call(potential, coordinates, coordinates.neighbours(potential.cutoff).listed)
    try:
        through = _exact_vjp(call, rows, torch.ones_like(rows).cumsum(0))
        is_zero = through[0] is None or not bool(through[0].any())
        why = "its second derivative is zero" if is_zero and not may_be_zero else ""
    except RuntimeError as error:
        why = str(error).split("\n")[0]
    if why:
        raise UserError(
            f"the forces of the {potential.architecture} model cannot be differentiated, so no relaxation can be trained "
            f"through it: its energy is not twice differentiable in the positions ({why}). Use a model that is neither "
            "compiled nor accelerated nor detached from its inputs."
        )


def _exact(potential: Potential, coordinates: Coordinates, rows: Tensor, listed: Graph) -> Tensor:
    return coordinates.forces(potential, rows, listed, create_graph=torch.is_grad_enabled())


@dataclass(frozen=True)
class _Call:
    """One evaluation of the forces, but for the rows."""

    potential: Potential
    coordinates: Coordinates
    listed: Graph

    def parameters(self) -> list[Tensor]:
        return [p for p in as_module(self.potential).parameters() if p.requires_grad]

    def of(self, potential: Potential) -> _Call:
        """The same for another potential, in its precision."""
        dtype, device = dtype_of(potential), self.listed.positions_n3.device
        return _Call(potential, self.coordinates.to(dtype), self.listed.to(device, dtype))

    def parts(self) -> Iterator[tuple[Tensor | slice, _Call]]:
        """Which rows ([r] bool), and the call for these alone; everything at once where it is not large, or on a GPU."""
        groups = self._groups()
        if len(groups) == 1:
            yield slice(None), self
            return
        for group in groups:
            part = _Call(self.potential, self.coordinates.take(group), self.listed.take(group))
            yield self.coordinates.rows_of(group), part

    def _groups(self) -> list[list[int]]:
        num_structures, structure_n = self.coordinates.num_structures, self.listed.structure_n
        if structure_n.device.type != "cpu":
            return [list(range(num_structures))]
        num_edges_b = torch.bincount(structure_n[self.listed.senders_e], minlength=num_structures)
        groups: list[list[int]] = []
        room = 0
        for b, num_edges in enumerate(num_edges_b.tolist()):
            if not groups or num_edges > room:
                groups.append([])
                room = _EDGES_AT_ONCE
            groups[-1].append(b)
            room -= num_edges
        return groups


Vjp = Callable[[_Call, Tensor, Tensor], Sequence[Tensor | None]]


class _Recomputed(torch.autograd.Function):
    """The forces, of which only the rows are kept till the gradient passes.

    The parameters are inputs of the function, so their gradients reach DDP's hooks like any other's. They are saved, at no
    cost, so that autograd refuses a gradient whose weights were changed meanwhile.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, vjp: Vjp, rows: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.vjp = call, vjp
        ctx.save_for_backward(rows, *parameters)
        forces, rows = torch.empty_like(rows), rows.detach()
        for here, part in call.parts():
            forces[here] = part.coordinates.forces(part.potential, rows[here], part.listed)
        return forces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        rows, *_ = ctx.saved_tensors
        return None, None, *ctx.vjp(ctx.call, rows, cotangent)


def _recomputed(potential: Potential, vjp: Vjp) -> Forces:
    def forces(coordinates: Coordinates, rows: Tensor, listed: Graph) -> Tensor:
        call = _Call(potential, coordinates, listed)
        result = _Recomputed.apply(call, vjp, rows, *call.parameters())  # type: ignore[no-untyped-call]
        return cast(Tensor, result)

    return forces


def _exact_vjp(call: _Call, rows: Tensor, cotangent: Tensor) -> list[Tensor | None]:
    return _sum_of_parts(_exact_vjp_at_once, call, rows, cotangent)


def _difference_vjp(twin: Potential, call: _Call, rows: Tensor, cotangent: Tensor) -> list[Tensor | None]:
    found = _sum_of_parts(_difference_vjp_at_once, call.of(twin), rows.double(), cotangent.double())
    return [None if g is None else g.to(rows.dtype) for g in found]


def _sum_of_parts(vjp: Vjp, call: _Call, rows: Tensor, cotangent: Tensor) -> list[Tensor | None]:
    gradient = torch.zeros_like(rows)
    sums: list[Tensor | None] = [None] * len(call.parameters())
    for here, part in call.parts():
        of_rows, *of_parameters = vjp(part, rows[here], cotangent[here])
        if of_rows is not None:
            gradient[here] = of_rows
        sums = _sums(sums, of_parameters)
    return [gradient, *sums]


def _exact_vjp_at_once(call: _Call, rows: Tensor, cotangent: Tensor) -> Sequence[Tensor | None]:
    with torch.enable_grad():
        rows = rows.detach().requires_grad_(True)
        forces = _exact(call.potential, call.coordinates, rows, call.listed)
    return torch.autograd.grad(forces, [rows, *call.parameters()], cotangent, allow_unused=True)


def _difference_vjp_at_once(call: _Call, rows: Tensor, cotangent: Tensor) -> Sequence[Tensor | None]:
    """Each structure is displaced by as much, whatever the length of its cotangent."""
    coordinates, potential, parameters = call.coordinates, call.potential, call.parameters()
    direction = coordinates.free(cotangent)
    length_r = direction.norm(dim=-1)
    zeros = length_r.new_zeros(coordinates.num_structures)
    length_b = zeros.scatter_reduce(0, coordinates.structure_r, length_r, "amax")
    weight_b = length_b / (2 * _DISPLACEMENT)
    unit = direction / length_b.clamp_min(1e-300)[coordinates.structure_r, None]
    sums: list[Tensor | None] = [None] * (1 + len(parameters))
    for sign in (1.0, -1.0):
        with torch.enable_grad():
            at = (rows.detach() + sign * _DISPLACEMENT * unit).requires_grad_(True)
            energies_b = potential.energies(coordinates.graph_at(at, call.listed, potential.cutoff))
            weighted = (-sign * weight_b * energies_b).sum()
            gradients = torch.autograd.grad(weighted, [at, *parameters], allow_unused=True)
        sums = _sums(sums, gradients)
    if sums[0] is not None:
        sums[0] = coordinates.free(sums[0])
    return sums


def _sums(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of two gradients; None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


# A copy of a MACE takes as long as some relaxation steps: TorchScript compiles its first calls again.
_TWINS: WeakKeyDictionary[torch.nn.Module, torch.nn.Module] = WeakKeyDictionary()


def float64_twin(potential: Potential) -> Potential:
    """The potential itself if it is in double precision, or else a copy that is, with the weights of this moment.

    One copy serves for the life of the potential: a new one would forget what TorchScript has compiled.
    """
    if dtype_of(potential) == torch.float64:
        return potential
    module = as_module(potential)
    twin = _TWINS.get(module)
    if twin is None or not _bring_up_to_date(twin, module):
        twin = _TWINS[module] = copy.deepcopy(module).double()
    return cast(Potential, twin)


def _bring_up_to_date(twin: torch.nn.Module, module: torch.nn.Module) -> bool:
    """False where it is no longer the same kind of model, or on another device."""
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (twin, module))
    kinds = [{name: (t.shape, t.device) for name, t in tensors.items()} for tensors in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return False
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.requires_grad_(theirs[name].requires_grad)
            tensor.copy_(theirs[name])
    return True


def _relative_error(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Of the whole gradient, in its norm; where nothing is expected, nothing may be found."""
    difference = norm = 0.0
    for a, b in zip(found, exact, strict=True):
        if a is not None and b is not None:
            difference += float(((a.double() - b.double()) ** 2).sum())
            norm += float((b.double() ** 2).sum())
    return (difference / norm) ** 0.5 if norm > 0 else 0.0

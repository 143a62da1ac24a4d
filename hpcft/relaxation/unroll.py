"""A relaxation as one differentiable function: k steps of a map from start to end (Dramko et al., arXiv 2512.01067).

    X(t+1) = X(t) + step(F(X(t)))        back-propagation through all steps (BPTT), or through the last m of them

A structure that has come to rest stops costing anything; when it stops is not differentiated. One that diverges is taken
out before it can spoil a gradient.

Shape suffixes: n atoms of the whole batch, b structures, r rows of `coordinates`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcft.models.graph import Graph
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Potential
from hpcft.relaxation.coordinates import Coordinates
from hpcft.relaxation.engines import Accuracy, Engine, make_engine
from hpcft.relaxation.maps import RelaxationMap, State

# No relaxation worth learning from meets such forces, eV/Å; with them a map is on its way to infinity.
DIVERGED_FORCE = 1e3


@dataclass(frozen=True)
class Stop:
    """When a structure is at rest: its largest force below `fmax` (eV/Å) and, where the cell moves, its largest stress
    component below `max_stress` (eV/Å^3); or no atom moved further than `displacement` (Å) in its last step."""

    fmax: float | None = None
    max_stress: float = 6e-4  # 0.1 GPa
    displacement: float | None = None

    def __post_init__(self) -> None:
        for name in ("fmax", "max_stress", "displacement"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Stop: {name} is {value}; it must be positive")

    def by_forces(self, coordinates: Coordinates, rows_r3: Tensor, forces_r3: Tensor) -> Tensor:
        """Which structures are at rest, [b] bool."""
        if self.fmax is None:
            return torch.zeros_like(coordinates.scale_b, dtype=torch.bool)
        at_rest = coordinates.largest_force(rows_r3, forces_r3) < self.fmax
        return at_rest & (coordinates.largest_stress(rows_r3, forces_r3) < self.max_stress)

    def by_displacement(self, coordinates: Coordinates, step_r3: Tensor) -> Tensor:
        """Which structures have come to rest with this step, [b] bool."""
        if self.displacement is None:
            return torch.zeros_like(coordinates.scale_b, dtype=torch.bool)
        lengths = step_r3.norm(dim=-1)
        zeros = lengths.new_zeros(coordinates.num_structures)
        longest: Tensor = zeros.scatter_reduce(0, coordinates.structure_r, lengths, "amax")
        return longest < self.displacement


@dataclass(frozen=True)
class Unrolled:
    """Where the relaxations ended: positions [n, 3] and cells [b, 3, 3] in Å, differentiable in the parameters of the
    potential, the learnable parts of the map, and the start.

    `num_steps_b` taken; `converged_b`: at rest by the `Stop`; `valid_b`: False for a structure whose gradient is not to be
    had (it diverged, or is no minimum), which must be left out of a loss: its positions are those of the start, or where
    it was found, without a gradient.
    """

    positions_n3: Tensor
    cell_b33: Tensor
    num_steps_b: Tensor
    converged_b: Tensor
    valid_b: Tensor
    accuracy: Accuracy = field(default_factory=Accuracy)


def unroll(
    potential: Potential,
    graph: Graph,
    map: RelaxationMap,
    steps: int,
    *,
    engine: str = "adjoint",
    stop: Stop | None = None,
    last: int | None = None,
    movable_n: Tensor | None = None,
    with_cell: bool = False,
) -> Unrolled:
    """Relax a batch for `steps` steps of `map` and keep what its gradient needs.

    The neighbour list follows the atoms, which may come into the cutoff and leave it. With `last`, only the last so many
    steps of each structure are differentiated (truncated BPTT). Fixed atoms are those that are not `movable_n` ([n] bool);
    `with_cell` relaxes the cells too. Engines: see `engines`; for one without an unroll, see `implicit`. Under
    `torch.no_grad()` nothing is kept for a gradient.
    Raises ValueError for fewer than one step, an engine that does not exist, or a cell that cannot relax.
    """
    if steps < 1:
        raise ValueError(f"a relaxation of {steps} steps goes nowhere; steps must be at least 1")
    if last is not None and last < 1:
        raise ValueError(f"last is {last}; at least one step must be differentiated")
    coordinates = Coordinates.of(graph, movable_n=movable_n, with_cell=with_cell)
    run = _Run(potential, make_engine(engine, potential), map, stop or Stop(), steps)
    valid = list(range(graph.num_structures))
    found = run.through(coordinates, valid, last)
    while found is None:  # one of them diverged: again without it
        valid = [b for b in valid if b not in run.diverged]
        found = run.through(coordinates, valid, last)
    return _assemble(coordinates, found, valid, run)


@dataclass
class _Piece:
    """Structures that ended at the same step, by their numbers in the whole batch."""

    structures: list[int]
    rows: Tensor
    num_steps: int
    converged: bool


class _Moving:
    """The structures that still move, and where they are."""

    def __init__(self, coordinates: Coordinates, structures: list[int], cutoff: float) -> None:
        self.structures = structures
        whole = len(structures) == coordinates.num_structures
        self.coordinates = coordinates if whole else coordinates.take(structures)
        self.rows = self.coordinates.first_rows()
        self.state = State()
        self.neighbours: VerletList = self.coordinates.neighbours(cutoff)

    def take_out(self, leaving: Sequence[bool]) -> tuple[list[int], Tensor]:
        """Numbers and rows of those that leave; the others go on."""
        going = [b for b, leaves in enumerate(leaving) if leaves]
        staying = [b for b, leaves in enumerate(leaving) if not leaves]
        gone = [self.structures[b] for b in going]
        mask = self.coordinates.rows_of(staying)
        rows = self.rows[~mask]
        self.rows = self.rows[mask]
        index = torch.as_tensor(staying, dtype=torch.int64, device=mask.device)
        self.state = self.state.take(mask, index)
        self.structures = [self.structures[b] for b in staying]
        if staying:
            self.coordinates = self.coordinates.take(staying)
            self.neighbours.keep(staying)
        return gone, rows


class _Run:
    def __init__(
        self, potential: Potential, engine: Engine, map: RelaxationMap, stop: Stop, steps: int
    ) -> None:
        self.potential, self.engine, self.map, self.stop, self.steps = potential, engine, map, stop, steps
        self.diverged: set[int] = set()

    def through(
        self, coordinates: Coordinates, structures: list[int], last: int | None
    ) -> list[_Piece] | None:
        """The ends of these structures; None when one of them has diverged (it is in `diverged` then)."""
        if not structures:
            return []
        moving = _Moving(coordinates, structures, self.potential.cutoff)
        moving.state = self.map.start(moving.coordinates)
        if last is None or last >= self.steps or not torch.is_grad_enabled():
            return self._go(moving, self.steps)
        with torch.no_grad():
            trace = _Trace()
            pieces = self._go(moving, self.steps, trace)
        if pieces is None:
            return None
        return [self._again(coordinates, piece, last, trace) for piece in pieces]

    def _go(self, moving: _Moving, steps: int, trace: _Trace | None = None) -> list[_Piece] | None:
        pieces: list[_Piece] = []
        for step in range(steps):
            if not moving.structures:
                break
            if trace is not None:
                trace.note(moving)
            listed = moving.coordinates.list_at(moving.rows, moving.neighbours)
            forces = self.engine.forces(moving.coordinates, moving.rows, listed)
            at_rest = self.stop.by_forces(moving.coordinates, moving.rows.detach(), forces.detach())
            bad = _diverged(moving, forces)
            displacement, moving.state = self.map.step(moving.coordinates, forces, moving.state)
            displacement = moving.coordinates.free(displacement)
            stays = at_rest[moving.coordinates.structure_r, None]
            moving.rows = torch.where(stays, moving.rows, moving.rows + displacement)
            arrived = ~at_rest & self.stop.by_displacement(moving.coordinates, displacement.detach())
            # Read together: each time that a GPU is asked, it runs out of work.
            lost, rested, came = torch.stack([bad, at_rest, arrived]).tolist()
            if any(lost):
                self.diverged |= {b for b, is_lost in zip(moving.structures, lost, strict=True) if is_lost}
                return None
            pieces += _leave(moving, rested, came, step)
        if moving.structures:
            pieces.append(_Piece(moving.structures, moving.rows, steps, False))
        return pieces

    def _again(self, coordinates: Coordinates, piece: _Piece, last: int, trace: _Trace) -> _Piece:
        """The last steps of structures that end together, once more and differentiably."""
        first = max(0, piece.num_steps - last)
        if first == piece.num_steps:
            return piece
        moving = _Moving(coordinates, piece.structures, self.potential.cutoff)
        trace.put_back(moving, first)
        unstopped = _Run(self.potential, self.engine, self.map, Stop(), self.steps)
        again = unstopped._go(moving, piece.num_steps - first)
        assert again is not None  # it did not diverge the first time
        return _Piece(piece.structures, again[0].rows, piece.num_steps, piece.converged)


class _Trace:
    """Rows and state of everything at every step, without graphs: what truncated BPTT goes back to."""

    def __init__(self) -> None:
        self.moments: list[tuple[list[int], Tensor, Tensor, State]] = []

    def note(self, moving: _Moving) -> None:
        self.moments.append(
            (moving.structures, moving.coordinates.structure_r, moving.rows.detach(), moving.state.detached())
        )

    def put_back(self, moving: _Moving, step: int) -> None:
        """Bring these structures to where they were before `step`."""
        structures, structure_r, rows, state = self.moments[step]
        index = torch.tensor([structures.index(b) for b in moving.structures], device=rows.device)
        mask = torch.isin(structure_r, index)
        moving.rows, moving.state = rows[mask], state.take(mask, index)


def _diverged(moving: _Moving, forces: Tensor) -> Tensor:
    """Which structures are on their way to infinity, [b] bool."""
    largest = moving.coordinates.largest(forces.detach())
    # The comparison is false also where it is not a number.
    return ~(largest < DIVERGED_FORCE) | moving.coordinates.collapsed(moving.rows.detach())


def _leave(moving: _Moving, at_rest: Sequence[bool], arrived: Sequence[bool], step: int) -> list[_Piece]:
    """Take out what has stopped before (`at_rest`) or with (`arrived`) this step."""
    pieces = []
    if any(at_rest):
        arrived = [came for came, rested in zip(arrived, at_rest, strict=True) if not rested]
        gone, rows = moving.take_out(at_rest)
        pieces.append(_Piece(gone, rows, step, True))
    if any(arrived):
        gone, rows = moving.take_out(arrived)
        pieces.append(_Piece(gone, rows, step + 1, True))
    return pieces


def _assemble(coordinates: Coordinates, pieces: list[_Piece], valid: list[int], run: _Run) -> Unrolled:
    device = coordinates.structure_r.device
    num_steps_b = torch.zeros(coordinates.num_structures, dtype=torch.int64, device=device)
    converged_b = torch.zeros(coordinates.num_structures, dtype=torch.bool, device=device)
    valid_b = torch.zeros_like(converged_b)
    valid_b[valid] = True
    rows = coordinates.first_rows().detach()
    for piece in pieces:
        where = torch.nonzero(coordinates.rows_of(piece.structures)).ravel()
        rows = rows.index_copy(0, where, piece.rows)
        num_steps_b[piece.structures] = piece.num_steps
        converged_b[piece.structures] = piece.converged
    positions_n3, cell_b33 = coordinates.positions_and_cells(rows)
    return Unrolled(positions_n3, cell_b33, num_steps_b, converged_b, valid_b, run.engine.accuracy)

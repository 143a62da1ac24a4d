"""L-BFGS as a map (Liu and Nocedal, Math. Program. 45, 503, 1989), each structure of the batch with its own memory.

For relaxing, not for training through: use the maps of `maps` there. Shape suffixes: b structures, r rows, m memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcft.relaxation.coordinates import Coordinates
from hpcft.relaxation.maps import State

# A pair of step and change of force is kept when its curvature is at least this (eV/Å^2).
_LEAST_CURVATURE = 1e-3


@dataclass(frozen=True)
class Lbfgs:
    """Steps along -H^-1 dE/dX without a line search, as in ASE; a structure's step is scaled when an atom would move
    further than `max_step` (Å). `curvature` (eV/Å^2) is the guess before anything is known."""

    memory: int = 12
    curvature: float = 40.0
    max_step: float = 0.2

    def start(self, coordinates: Coordinates) -> State:
        num_rows, num_structures = len(coordinates.structure_r), coordinates.num_structures
        zero = coordinates.scale_b.new_zeros
        return State(
            {
                "steps": zero(num_rows, self.memory, 3),
                "changes": zero(num_rows, self.memory, 3),
                "step": zero(num_rows, 3),
                "forces": zero(num_rows, 3),
            },
            {"weight": zero(num_structures, self.memory), "curvature": zero(num_structures) + self.curvature},
        )

    def step(self, coordinates: Coordinates, forces_r3: Tensor, state: State) -> tuple[Tensor, State]:
        forces_r3 = forces_r3.detach()
        state = self._remember(coordinates, forces_r3, state)
        step = self._solve(coordinates, forces_r3, state)
        length = step.norm(dim=-1)
        longest = length.new_zeros(coordinates.num_structures).scatter_reduce(
            0, coordinates.structure_r, length, "amax"
        )
        step = step * (self.max_step / longest.clamp_min(1e-12)).clamp_max(1.0)[coordinates.structure_r, None]
        return step, State({**state.rows, "step": step, "forces": forces_r3}, state.structures)

    def _remember(self, coordinates: Coordinates, forces_r3: Tensor, state: State) -> State:
        """The newest pair comes first; it counts only where its curvature is positive."""
        step, change = state.rows["step"], state.rows["forces"] - forces_r3
        product = coordinates.per_structure((step * change).sum(-1))
        squared = coordinates.per_structure((step**2).sum(-1))
        good = product > _LEAST_CURVATURE * squared
        weight = torch.where(good, 1.0 / product.where(good, torch.ones_like(product)), 0.0)
        steep = coordinates.per_structure((change**2).sum(-1)) / product.where(good, torch.ones_like(product))
        keep = good[coordinates.structure_r, None]

        def push(memory: Tensor, newest: Tensor, keep: Tensor) -> Tensor:
            pushed = torch.cat([newest[:, None], memory[:, :-1]], dim=1)
            shape = (-1,) + (1,) * (memory.ndim - 1)
            return torch.where(keep.reshape(shape), pushed, memory)

        return State(
            {
                "steps": push(state.rows["steps"], step, keep),
                "changes": push(state.rows["changes"], change, keep),
            },
            {
                "weight": push(state.structures["weight"], weight, good),
                "curvature": torch.where(good, steep, state.structures["curvature"]),
            },
        )

    def _solve(self, coordinates: Coordinates, forces_r3: Tensor, state: State) -> Tensor:
        """The two-loop recursion, for all structures at once."""
        s, weight = coordinates.structure_r, state.structures["weight"]
        steps, changes = state.rows["steps"], state.rows["changes"]
        direction, factors = forces_r3, []
        for m in range(self.memory):
            factor = weight[:, m] * coordinates.per_structure((steps[:, m] * direction).sum(-1))
            direction = direction - factor[s, None] * changes[:, m]
            factors.append(factor)
        direction = direction / state.structures["curvature"][s, None]
        for m in reversed(range(self.memory)):
            other = weight[:, m] * coordinates.per_structure((changes[:, m] * direction).sum(-1))
            direction = direction + (factors[m] - other)[s, None] * steps[:, m]
        # Where nothing but uphill is left of it, the forces themselves show the way.
        uphill = coordinates.per_structure((direction * forces_r3).sum(-1)) <= 0
        return torch.where(uphill[s, None], forces_r3 / self.curvature, direction)

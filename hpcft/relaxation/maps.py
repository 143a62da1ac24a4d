"""The maps that are iterated: gradient descent (arXiv 2512.01067), heavy ball (Polyak 1964) and FIRE (Bitzek et al. 2006).

A map turns the forces on the rows of a batch (see `coordinates`) into their next displacement. All arithmetic can be
differentiated; switches (FIRE's, and the cut of a step that is too long) are constants for the gradient.

Shape suffixes: b structures, r rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hpcft.relaxation.coordinates import Coordinates

# Under square roots, so that they have a derivative where a velocity is zero.
_TINY = 1e-30


@dataclass(frozen=True)
class State:
    """What a map remembers from step to step: tensors with a row for each row, and with one for each structure."""

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    structures: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor, structures: Tensor) -> State:
        """The part that these rows ([r] bool) and structures (indices) have."""
        return State(
            {name: values[rows] for name, values in self.rows.items()},
            {name: values[structures] for name, values in self.structures.items()},
        )

    def detached(self) -> State:
        return State(
            {name: values.detach() for name, values in self.rows.items()},
            {name: values.detach() for name, values in self.structures.items()},
        )

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """One batch out of several."""
        first = states[0]
        return State(
            {name: torch.cat([state.rows[name] for state in states]) for name in first.rows},
            {name: torch.cat([state.structures[name] for state in states]) for name in first.structures},
        )


class RelaxationMap(Protocol):
    """One step of an iterated relaxation."""

    def start(self, coordinates: Coordinates) -> State:
        """The state before the first step."""

    def step(self, coordinates: Coordinates, forces_r3: Tensor, state: State) -> tuple[Tensor, State]:
        """Displacement of each row, [r, 3] Å, and the state after it."""


class StepSize(torch.nn.Module):
    """eta in Å^2/eV: one number, or one for each element, learnable (both were tried in arXiv 2512.01067).

    Kept as a logarithm, so that learning cannot make it negative. A strain moves with the mean over the elements.
    Raises ValueError unless `initial` is positive and finite.
    """

    def __init__(self, initial: float, elements: Sequence[int] = ()) -> None:
        super().__init__()
        if not (initial > 0 and math.isfinite(initial)):
            raise ValueError(f"the step size is {initial}; it must be positive (Å^2/eV)")
        self.elements = tuple(sorted(set(elements)))
        self.log_eta = torch.nn.Parameter(torch.full((max(1, len(self.elements)),), math.log(initial)))
        # Of the rows seen last: those of a relaxation are the same in all its steps.
        self._latest: tuple[Tensor, Tensor] | None = None

    def values(self) -> dict[str, list[float]]:
        """Elements and step sizes as plain numbers; see `from_values`."""
        return {
            "elements": [float(z) for z in self.elements],
            "step_sizes": self.log_eta.detach().exp().tolist(),
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Sequence[float]]) -> StepSize:
        """What has given these `values`."""
        found = cls(1.0, [int(z) for z in values["elements"]])
        with torch.no_grad():
            found.log_eta.copy_(torch.tensor(values["step_sizes"]).log())
        return found

    def forward(self, numbers_r: Tensor) -> Tensor:
        """eta of each row, [r, 1], by its atomic number (0: a strain)."""
        if not self.elements:
            return self.log_eta.exp().expand(len(numbers_r))[:, None]
        if self._latest is None or self._latest[0] is not numbers_r:
            self._latest = numbers_r, self._index_of(numbers_r)
        index = self._latest[1]
        log_eta = torch.where(numbers_r == 0, self.log_eta.mean(), self.log_eta[index])
        return log_eta.exp()[:, None]

    def _index_of(self, numbers_r: Tensor) -> Tensor:
        known = torch.tensor(self.elements, device=numbers_r.device)
        index = torch.searchsorted(known, numbers_r).clamp_max(len(known) - 1)
        if not bool(((known[index] == numbers_r) | (numbers_r == 0)).all()):
            raise ValueError(f"the step size has a value for the elements {self.elements} only")
        return index


@dataclass(frozen=True)
class Descent:
    """v' = momentum v + eta F, X' = X + v': gradient descent (the paper's map), or heavy ball with a momentum.

    `step_size` eta in Å^2/eV, a number or a learnable `StepSize`; no row moves further than `max_step` (Å) in one step.
    Raises ValueError for a step size or momentum with which nothing converges.
    """

    step_size: float | StepSize = 0.05
    momentum: float = 0.0
    max_step: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.step_size, StepSize) and not self.step_size > 0:
            raise ValueError(f"the step size is {self.step_size}; it must be positive (Å^2/eV)")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"the momentum is {self.momentum}; it must be at least 0 and less than 1")
        _check_max_step(self.max_step)

    def start(self, coordinates: Coordinates) -> State:
        return State({"velocity": _zeros(coordinates)} if self.momentum else {})

    def step(self, coordinates: Coordinates, forces_r3: Tensor, state: State) -> tuple[Tensor, State]:
        eta: float | Tensor
        if isinstance(self.step_size, StepSize):
            eta = self.step_size(coordinates.numbers_r).to(forces_r3.dtype)
        else:
            eta = self.step_size
        velocity = eta * forces_r3
        if self.momentum:
            velocity = self.momentum * state.rows["velocity"] + velocity
        velocity = _limited(velocity, self.max_step)
        return velocity, State({"velocity": velocity} if self.momentum else {})


@dataclass(frozen=True)
class Fire:
    """FIRE (Bitzek et al., PRL 97, 170201, 2006): the velocity turns towards the force, and stops where it leads uphill.

    Time steps are in units where mass is one; no row moves further than `max_step` (Å) in one step.
    """

    first_timestep: float = 0.1
    largest_timestep: float = 0.4
    max_step: float = 0.2
    grow: float = 1.1
    shrink: float = 0.5
    alpha: float = 0.1
    alpha_decay: float = 0.99
    patience: int = 5

    def __post_init__(self) -> None:
        _check_max_step(self.max_step)

    def start(self, coordinates: Coordinates) -> State:
        ones = coordinates.scale_b.new_ones(coordinates.num_structures)
        return State(
            {"velocity": _zeros(coordinates)},
            {
                "timestep": self.first_timestep * ones,
                "alpha": self.alpha * ones,
                "downhill": torch.zeros_like(ones),
            },
        )

    def step(self, coordinates: Coordinates, forces_r3: Tensor, state: State) -> tuple[Tensor, State]:
        s, velocity = coordinates.structure_r, state.rows["velocity"]
        timestep, alpha, downhill = (state.structures[name] for name in ("timestep", "alpha", "downhill"))
        with torch.no_grad():
            down = coordinates.per_structure((forces_r3 * velocity).sum(-1)) > 0
        speed = torch.sqrt(coordinates.per_structure((velocity**2).sum(-1)) + _TINY)
        norm = torch.sqrt(coordinates.per_structure((forces_r3**2).sum(-1)) + _TINY)
        mixed = (1 - alpha)[s, None] * velocity + (alpha * speed / norm)[s, None] * forces_r3
        velocity = torch.where(down[s, None], mixed, torch.zeros_like(mixed))
        patient = down & (downhill > self.patience)
        grown = (timestep * self.grow).clamp_max(self.largest_timestep)
        timestep = torch.where(patient, grown, torch.where(down, timestep, timestep * self.shrink))
        fresh = torch.full_like(alpha, self.alpha)
        alpha = torch.where(patient, alpha * self.alpha_decay, torch.where(down, alpha, fresh))
        downhill = torch.where(down, downhill + 1, torch.zeros_like(downhill))
        velocity = velocity + timestep[s, None] * forces_r3
        step = _limited(timestep[s, None] * velocity, self.max_step)
        return step, State(
            {"velocity": velocity}, {"timestep": timestep, "alpha": alpha, "downhill": downhill}
        )


def _zeros(coordinates: Coordinates) -> Tensor:
    return coordinates.scale_b.new_zeros(len(coordinates.structure_r), 3)


def _limited(step_r3: Tensor, max_step: float) -> Tensor:
    """No row longer than `max_step`, in its own direction."""
    length = torch.sqrt((step_r3**2).sum(-1, keepdim=True) + _TINY)
    return step_r3 * torch.clamp(max_step / length, max=1.0)


def _check_max_step(max_step: float) -> None:
    if not max_step > 0:
        raise ValueError(f"the longest step is {max_step} Å; it must be positive")

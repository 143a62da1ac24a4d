"""The relaxation map X(t+1) = X(t) + eta F(X(t)), differentiable from end to end (arXiv 2512.01067).

Back-propagation through k steps (BPTT) would keep k graphs. The engines `checkpoint` and `adjoint` keep the
positions of each step and compute its graph again when the gradient passes through it; all give one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hpcft.models.graph import Graph, rebuild_edges
from hpcft.models.protocol import Potential, as_module, evaluate

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Engine = Callable[[Step, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MapSettings:
    """A relaxation map: plain gradient descent (momentum 0, the paper's frame) or heavy ball.

    `step_size` eta in Å^2/eV; `max_step` in Å is the longest way of one atom in one step.
    """

    steps: int = 20
    step_size: float = 0.05
    momentum: float = 0.0
    max_step: float = 0.2


def _make_step(potential: Potential, graph: Graph, settings: MapSettings) -> Step:
    def step(positions_n3: Tensor, velocity_n3: Tensor) -> tuple[Tensor, Tensor]:
        here = rebuild_edges(graph.with_positions(positions_n3), potential.cutoff)
        forces_n3 = evaluate(potential, here, create_graph=torch.is_grad_enabled()).forces_n3
        velocity_n3 = settings.momentum * velocity_n3 + settings.step_size * forces_n3
        length = torch.sqrt((velocity_n3**2).sum(-1, keepdim=True) + 1e-30)
        velocity_n3 = velocity_n3 * torch.clamp(settings.max_step / length, max=1.0)
        return positions_n3 + velocity_n3, velocity_n3

    return step


def _plain(
    step: Step, positions: Tensor, velocity: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return step(positions, velocity)


class _Recomputed(torch.autograd.Function):
    """One step that keeps its inputs only; its graph is built when the gradient passes through it.

    The parameters are inputs of the function, so their gradients reach DDP's hooks like any other's.
    """

    @staticmethod
    def forward(
        ctx: Any, step: Step, positions: Tensor, velocity: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.step, ctx.parameters = step, parameters
        ctx.save_for_backward(positions, velocity)
        return step(positions.detach(), velocity.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_(True) for tensor in ctx.saved_tensors]
            outputs = ctx.step(*inputs)
        wanted = [*inputs, *ctx.parameters]
        return None, *torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)


def _checkpointed(
    step: Step, positions: Tensor, velocity: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    # Non-reentrant: the reentrant kind fails here, or is silently wrong under DDP. One step each: a segment of
    # several steps uses more memory than none, because of the double backward. It still keeps, of every step,
    # what the forces' own gradient left unused: `adjoint` is flatter.
    result = checkpoint(step, positions, velocity, use_reentrant=False, preserve_rng_state=False)
    return cast("tuple[Tensor, Tensor]", result)


def _adjoint(
    step: Step, positions: Tensor, velocity: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    result = _Recomputed.apply(step, positions, velocity, *parameters)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", result)


ENGINES: dict[str, Engine] = {"plain": _plain, "checkpoint": _checkpointed, "adjoint": _adjoint}


def unroll(potential: Potential, graph: Graph, settings: MapSettings, engine: str = "adjoint") -> Tensor:
    """Positions after `settings.steps` steps, [n, 3] Å, differentiable in the model's parameters and the start.

    The neighbour list is built again at every step, so that atoms may come into and leave the cutoff.
    Raises ValueError for an engine that does not exist.
    """
    if engine not in ENGINES:
        raise ValueError(f"there is no gradient engine '{engine}'; choose one of {', '.join(ENGINES)}")
    advance = ENGINES[engine]
    step = _make_step(potential, graph, settings)
    positions = graph.positions_n3
    velocity = torch.zeros_like(positions)
    parameters = [p for p in as_module(potential).parameters() if p.requires_grad]
    with torch.enable_grad():
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_(True)
        for _ in range(settings.steps):
            positions, velocity = advance(step, positions, velocity, parameters)
    return positions

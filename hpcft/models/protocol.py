"""What hpcft asks of an architecture, and what it derives from that alone: forces and stress.

Shape suffixes: n atoms of the whole batch, b structures, d descriptor components.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from hpcft.models.graph import Graph


@runtime_checkable
class Potential(Protocol):
    """A trainable potential-energy surface. Implementations are `torch.nn.Module`s."""

    architecture: str

    @property
    def cutoff(self) -> float:
        """Longest edge (Å) that has an effect."""

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the model knows."""

    def energies(self, graph: Graph) -> Tensor:
        """Total energy of each structure, [b], eV; differentiable twice with respect to positions and cell."""

    def descriptors(self, graph: Graph) -> Tensor:
        """Rotation-invariant features of each atom, [n, d], without gradient."""

    def shift_energies(self, shifts: Mapping[int, float]) -> None:
        """Add so many eV to the energy of each atom of an element, by atomic number, for good."""

    def configuration(self) -> Mapping[str, Any]:
        """JSON-able settings from which `hpcft.models.files` builds the model again."""


def as_module(potential: Potential) -> torch.nn.Module:
    """The same object as a module, for parameters, dtype and device."""
    return cast(torch.nn.Module, potential)


def dtype_of(potential: Potential) -> torch.dtype:
    return next(p.dtype for p in as_module(potential).parameters() if p.is_floating_point())


def device_of(potential: Potential) -> torch.device:
    return next(as_module(potential).parameters()).device


@contextlib.contextmanager
def frozen(potential: Potential) -> Iterator[None]:
    """With weights that want no gradient: measured over MACE, forces take up to twice as long where they do, wanted or not."""
    wanting = [p for p in as_module(potential).parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Evaluation:
    """Energies [b] eV; forces [n, 3] eV/Å; stress [b, 3, 3] eV/Å^3, positive under tension as in ASE.

    The stress of a structure without a volume (a molecule with no cell) is zero.
    """

    energies_b: Tensor
    forces_n3: Tensor
    stress_b33: Tensor | None = None


def evaluate(
    potential: Potential, graph: Graph, *, stress: bool = False, create_graph: bool = False
) -> Evaluation:
    """Energy, forces and (on demand) stress; with `create_graph` all of them can be differentiated again.

    Positions that already carry a graph (an unrolled relaxation) keep it. Stress is dE/d(strain) over the
    volume, with the strain applied to positions and cell alike.
    """
    with torch.enable_grad():
        positions = graph.positions_n3
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_(True)
        strained, strain = graph.with_positions(positions), None
        if stress:
            strained, strain = _with_strain(strained)
        energies_b = potential.energies(strained)
        inputs = [positions] if strain is None else [positions, strain]
        gradients = torch.autograd.grad(
            energies_b.sum(), inputs, create_graph=create_graph, allow_unused=True
        )
    forces_n3 = -gradients[0] if gradients[0] is not None else torch.zeros_like(positions)
    stress_b33 = None
    if strain is not None:
        virial = gradients[1] if gradients[1] is not None else torch.zeros_like(strain)
        volume_b = torch.linalg.det(graph.cell_b33).abs()
        # Without a cell no stress, and no NaN that a mask could not take out of the loss's gradient.
        volume_b = torch.where(volume_b > 0, volume_b, torch.inf)
        stress_b33 = 0.5 * (virial + virial.transpose(1, 2)) / volume_b[:, None, None]
    if not create_graph:
        energies_b, forces_n3 = energies_b.detach(), forces_n3.detach()
        stress_b33 = None if stress_b33 is None else stress_b33.detach()
    return Evaluation(energies_b, forces_n3, stress_b33)


def _with_strain(graph: Graph) -> tuple[Graph, Tensor]:
    strain = torch.zeros_like(graph.cell_b33, requires_grad=True)
    symmetric = 0.5 * (strain + strain.transpose(1, 2))
    moved = graph.positions_n3 + torch.einsum("ni,nij->nj", graph.positions_n3, symmetric[graph.structure_n])
    cell = graph.cell_b33 + graph.cell_b33 @ symmetric
    return replace(graph, positions_n3=moved, cell_b33=cell), strain

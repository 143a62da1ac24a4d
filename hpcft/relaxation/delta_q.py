"""How far apart two structures are: Delta Q (Dramko et al., arXiv 2512.01067), RMSD, and the distance of their cells.

Shape suffixes: n atoms of the whole batch, b structures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from ase.data import atomic_masses
from ase.geometry import find_mic
from torch import Tensor

from hpcft.models.graph import Graph

# Keeps the square root differentiable where two structures coincide; in amu Å^2.
_FLOOR = 1e-12


def minimum_image(vectors_n3: Tensor, graph: Graph) -> Tensor:
    """The shortest periodic image of each vector, exact in skewed cells too (`ase.geometry.find_mic`).

    The choice of image is a constant for the gradient.
    """
    vectors = vectors_n3.detach().cpu().double().numpy()
    cells = graph.cell_b33.detach().cpu().double().numpy()
    periodic = graph.periodic_b3.cpu().numpy()
    structure = graph.structure_n.cpu().numpy()
    shifts = np.zeros_like(vectors)
    for b in np.flatnonzero(periodic.any(axis=1)):
        mine = structure == b
        shifts[mine] = find_mic(vectors[mine], cells[b], periodic[b])[0] - vectors[mine]
    return vectors_n3 + torch.as_tensor(shifts, dtype=vectors_n3.dtype, device=vectors_n3.device)


def displacements(
    final_n3: Tensor,
    target_n3: Tensor,
    graph: Graph,
    *,
    final_cell_b33: Tensor | None = None,
    anchored_b: Tensor | None = None,
) -> Tensor:
    """From each atom of `final_n3` to its nearest image in `target_n3`, [n, 3] Å.

    Where all three directions are periodic the common drift of the centre of mass is taken off: it has no physical meaning
    there, unless the structure is `anchored_b` ([b] bool) by fixed atoms. `graph` supplies the elements (their masses), the
    assignment of atoms to structures, and the cells of the target. Where the final structures have cells of their own,
    `final_cell_b33`, atoms are compared at equal fractions of the cell, in the target's: what the cells themselves differ
    by is `cell_distance`. A cell that spans no volume cannot relax and does not count.
    """
    if final_cell_b33 is not None:
        change_b33 = _change(final_cell_b33, graph.cell_b33)
        final_n3 = torch.einsum("ni,nij->nj", final_n3, change_b33[graph.structure_n])
    difference_n3 = minimum_image(target_n3 - final_n3, graph)
    mass_n = _masses(graph, final_n3)
    drift_b3 = _per_structure(mass_n[:, None] * difference_n3, graph) / _per_structure(mass_n, graph)[:, None]
    free_b = graph.periodic_b3.all(dim=1)
    if anchored_b is not None:
        free_b = free_b & ~anchored_b
    return difference_n3 - (drift_b3 * free_b[:, None])[graph.structure_n]


def delta_q(
    final_n3: Tensor,
    target_n3: Tensor,
    graph: Graph,
    *,
    final_cell_b33: Tensor | None = None,
    anchored_b: Tensor | None = None,
) -> Tensor:
    """Delta Q = sqrt(sum_j m_j |X*_j - X_j|^2) of each structure, [b], amu^1/2 Å (for the arguments see `displacements`)."""
    difference_n3 = displacements(
        final_n3, target_n3, graph, final_cell_b33=final_cell_b33, anchored_b=anchored_b
    )
    mass_n = _masses(graph, final_n3)
    return torch.sqrt(_per_structure(mass_n * (difference_n3**2).sum(-1), graph) + _FLOOR)


def rmsd(
    final_n3: Tensor,
    target_n3: Tensor,
    graph: Graph,
    *,
    final_cell_b33: Tensor | None = None,
    anchored_b: Tensor | None = None,
) -> Tensor:
    """Root of the mean squared displacement over the atoms of each structure, [b], Å."""
    difference_n3 = displacements(
        final_n3, target_n3, graph, final_cell_b33=final_cell_b33, anchored_b=anchored_b
    )
    mean_b = _per_structure((difference_n3**2).sum(-1), graph) / graph.num_atoms_b
    return torch.sqrt(mean_b + _FLOOR)


def cell_distance(final_cell_b33: Tensor, graph: Graph) -> Tensor:
    """sqrt(M) (V/N)^(1/3) |e|, [b] amu^1/2 Å: what the strain between two cells is worth in units of Delta Q.

    e is the symmetric strain that leads from the target's cell (of `graph`) to the final one, |e| its Frobenius norm, M the
    mass and (V/N)^(1/3) the distance of neighbours: each atom counts with what it moves against its neighbours.
    """
    target_b33 = graph.cell_b33
    change_b33 = _change(target_b33, final_cell_b33)
    # Right Cauchy-Green tensor: no rotation of the cell counts.
    squared_b33 = change_b33 @ change_b33.transpose(1, 2)
    identity = torch.eye(3, dtype=target_b33.dtype, device=target_b33.device)
    strain_b33 = 0.5 * (squared_b33 - identity)
    volume_b = torch.linalg.det(target_b33).abs()
    spacing_b = (volume_b / graph.num_atoms_b) ** (1 / 3)
    mass_b = _per_structure(_masses(graph, final_cell_b33), graph)
    return torch.sqrt(mass_b * spacing_b**2 * (strain_b33**2).sum((1, 2)) + _FLOOR)


def with_cells(graph: Graph, cell_b33: Tensor) -> Graph:
    """The same structures in these cells: the graph of the targets, where those have cells of their own."""
    return replace(graph, cell_b33=cell_b33)


def _change(before_b33: Tensor, after_b33: Tensor) -> Tensor:
    """c with after = before c; one where a cell spans no volume."""
    volume_b = torch.linalg.det(before_b33.detach()).abs()
    whole_b11 = ((volume_b > 0) & (torch.linalg.det(after_b33.detach()).abs() > 0))[:, None, None]
    identity = torch.eye(3, dtype=before_b33.dtype, device=before_b33.device)
    before_b33 = torch.where(whole_b11, before_b33, identity)
    change_b33: Tensor = torch.linalg.solve(before_b33, torch.where(whole_b11, after_b33, identity))
    return change_b33


def _masses(graph: Graph, like: Tensor) -> Tensor:
    return torch.as_tensor(atomic_masses, dtype=like.dtype, device=like.device)[graph.numbers_n]


def _per_structure(values: Tensor, graph: Graph) -> Tensor:
    zeros = values.new_zeros(graph.num_structures, *values.shape[1:])
    return zeros.index_add(0, graph.structure_n, values)

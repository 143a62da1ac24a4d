"""Delta Q, the mass-weighted distance between two structures (Dramko et al., arXiv 2512.01067).

Shape suffixes: n atoms of the whole batch, b structures.
"""

from __future__ import annotations

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


def delta_q(final_n3: Tensor, target_n3: Tensor, graph: Graph) -> Tensor:
    """Delta Q = sqrt(sum_j m_j |X*_j - X_j|^2) of each structure, [b], amu^1/2 Å.

    Distances are to the nearest periodic image. Where all three directions are periodic the common drift of
    the centre of mass is removed first: it has no physical meaning there. `graph` supplies masses (by
    element), cells and the assignment of atoms to structures.
    """
    masses = torch.as_tensor(atomic_masses, dtype=final_n3.dtype, device=final_n3.device)
    mass_n = masses[graph.numbers_n]
    difference = minimum_image(target_n3 - final_n3, graph)

    def per_structure(values: Tensor) -> Tensor:
        shape = (graph.num_structures, *values.shape[1:])
        return torch.zeros(shape, dtype=values.dtype, device=values.device).index_add(
            0, graph.structure_n, values
        )

    drift_b3 = per_structure(mass_n[:, None] * difference) / per_structure(mass_n)[:, None]
    drift_b3 = drift_b3 * graph.periodic_b3.all(dim=1, keepdim=True)
    difference = difference - drift_b3[graph.structure_n]
    return torch.sqrt(per_structure(mass_n * (difference**2).sum(-1)) + _FLOOR)

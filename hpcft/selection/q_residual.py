"""Q-residual: how far an atom is from the principal-component space of what the model has learned from.

Shape suffixes: n atoms of the whole batch, b structures, d descriptor components, k principal components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.graph import Graph, build_graph
from hpcft.models.protocol import Potential, device_of, dtype_of

Q_RESIDUAL = "q_residual"
"""The name under which it is observed, and stops a replica."""

# Of the variance of the reference's descriptors: what its principal components must explain.
EXPLAINED = 0.99
# Descriptors are in float32 as a rule. Below this share of the variance a residual is rounding.
_ROUNDING = 1e-6
_ATOMS_AT_ONCE = 2000


@dataclass(frozen=True)
class PrincipalSpace:
    """The principal components of reference descriptors that explain 99 % of their variance.

    Q = |x - m - P P^T (x - m)|^2 of an atom's descriptor x, with the reference's mean m (arXiv 2603.10159; in chemometrics the
    squared prediction error). Its unit is the largest Q of the reference's own atoms, as that of descriptors differs from model
    to model: above 1 an atom is farther out than all that the model has learned from.
    """

    mean_d: Tensor
    components_dk: Tensor
    unit: float
    num_atoms: int

    @property
    def told(self) -> str:
        """What it is made of, in a line."""
        num_all, num_kept = self.components_dk.shape
        return (
            f"Q-residual: {num_kept} of {num_all} principal components of {self.num_atoms} atoms; "
            f"1 is the largest of theirs, {self.unit:.3g}"
        )

    def residuals_n(self, features_nd: Tensor) -> Tensor:
        """Of each atom, in this space's unit."""
        return _squared_rest(features_nd, self.mean_d, self.components_dk) / self.unit

    def largest_b(self, features_nd: Tensor, graph: Graph) -> np.ndarray:
        """Of the atom of each structure that is farthest out: one strange place counts in a structure of any size."""
        residuals_n = self.residuals_n(features_nd)
        zeros = torch.zeros(graph.num_structures, dtype=residuals_n.dtype, device=residuals_n.device)
        return np.asarray(zeros.scatter_reduce(0, graph.structure_n, residuals_n, "amax").cpu().numpy())


def principal_space(features_nd: Tensor) -> PrincipalSpace:
    """Of the descriptors of all reference atoms."""
    features_nd = features_nd.double()
    mean_d = features_nd.mean(0)
    centred_nd = features_nd - mean_d
    variances_d, vectors_dd = torch.linalg.eigh(centred_nd.T @ centred_nd / len(centred_nd))
    falling_d = variances_d.flip(0).clamp(min=0)
    total = float(falling_d.sum())
    num_kept = int((falling_d.cumsum(0) < EXPLAINED * total).sum()) + 1 if total > 0 else 0
    components_dk = vectors_dd.flip(1)[:, :num_kept]
    largest = float(_squared_rest(features_nd, mean_d, components_dk).max())
    # Where all reference atoms are alike (a perfect crystal) or few, nothing is left over but rounding.
    floor = _ROUNDING * (total + float((mean_d**2).sum()))
    return PrincipalSpace(mean_d, components_dk, max(largest, floor), len(features_nd))


def space_of_structures(potential: Potential, structures: Sequence[Atoms]) -> PrincipalSpace:
    """Of structures' atoms, by the model's descriptors; UserError if there are none, or the model does not know an element."""
    if not sum(len(atoms) for atoms in structures):
        raise UserError(
            "there is no atom to make the space of the Q-residual from; name a file of structures that the model was "
            "trained on"
        )
    for number, atoms in enumerate(structures):
        if unknown := sorted(set(map(int, atoms.numbers)) - set(potential.elements)):
            names = ", ".join(chemical_symbols[z] for z in unknown)
            raise UserError(
                f"structure {number} of the reference of the Q-residual holds {names}, which the model does not know; "
                "leave it out, or name what the model was trained on"
            )
    features = []
    for batch in _batches(structures):
        graph = build_graph(batch, potential.cutoff, dtype=dtype_of(potential), device=device_of(potential))
        features.append(potential.descriptors(graph))
    return principal_space(torch.cat(features))


def q_observer(potential: Potential, space: PrincipalSpace) -> Callable[[Graph], dict[str, np.ndarray]]:
    """What molecular dynamics writes down with each frame, by the model that the space is of."""
    return lambda graph: {Q_RESIDUAL: space.largest_b(potential.descriptors(graph), graph)}


def _batches(structures: Sequence[Atoms]) -> list[list[Atoms]]:
    batches: list[list[Atoms]] = []
    num_atoms = _ATOMS_AT_ONCE
    for atoms in structures:
        if num_atoms + len(atoms) > _ATOMS_AT_ONCE:
            batches.append([])
            num_atoms = 0
        batches[-1].append(atoms)
        num_atoms += len(atoms)
    return batches


def _squared_rest(features_nd: Tensor, mean_d: Tensor, components_dk: Tensor) -> Tensor:
    centred_nd = features_nd.double() - mean_d
    return ((centred_nd - centred_nd @ components_dk @ components_dk.T) ** 2).sum(-1)

"""Several models as one: the energies of all, the forces of one or of their mean, and how far they disagree.

Shape suffixes: n atoms of the whole batch, b structures, m members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.graph import Graph
from hpcft.models.protocol import Potential, as_module, evaluate

# What `Committee.observe` returns.
SPREAD = "force_spread"
ENERGIES = "committee_energies"


class Committee(torch.nn.Module):
    """A potential whose energy is that of the first member, or the mean of all; UserError unless all know the same elements."""

    architecture = "committee"

    def __init__(self, members: Sequence[Potential], *, mean: bool = False) -> None:
        super().__init__()
        if len(members) < 2:
            raise UserError("a committee needs two models or more")
        if len({member.elements for member in members}) > 1:
            raise UserError("the models of a committee must know the same elements, in the same order")
        self.members = torch.nn.ModuleList([as_module(member) for member in members])
        self._members, self._mean = list(members), mean

    @property
    def cutoff(self) -> float:
        return max(member.cutoff for member in self._members)

    @property
    def elements(self) -> tuple[int, ...]:
        return self._members[0].elements

    def energies(self, graph: Graph) -> Tensor:
        if not self._mean:
            return self._members[0].energies(graph)
        return torch.stack([member.energies(graph) for member in self._members]).mean(0)

    def descriptors(self, graph: Graph) -> Tensor:
        return self._members[0].descriptors(graph)

    def shift_energies(self, shifts: Mapping[int, float]) -> None:
        for member in self._members:
            member.shift_energies(shifts)

    def configuration(self) -> Mapping[str, Any]:
        raise UserError("a committee is not saved as one model; save its members")

    def observe(self, graph: Graph) -> dict[str, np.ndarray]:
        """Energies [b, m] in eV, and the spread of the forces [b] in eV/Å.

        The spread is the largest standard deviation of an atom's force over the members, max_i sqrt(<|F_i - <F_i>|^2>) (Zhang
        et al., Phys. Rev. Materials 3, 023804, 2019).
        """
        results = [evaluate(member, graph) for member in self._members]
        forces_mn3 = torch.stack([result.forces_n3 for result in results])
        deviation_n = ((forces_mn3 - forces_mn3.mean(0)) ** 2).sum(-1).mean(0).sqrt()
        zeros = torch.zeros(graph.num_structures, dtype=deviation_n.dtype, device=deviation_n.device)
        spread_b = zeros.scatter_reduce(0, graph.structure_n, deviation_n, "amax")
        energies_bm = torch.stack([result.energies_b for result in results], 1)
        return {
            SPREAD: spread_b.cpu().double().numpy(),
            ENERGIES: energies_bm.cpu().double().numpy(),
        }

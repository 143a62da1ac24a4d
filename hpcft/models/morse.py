"""A learnable Morse pair potential: small, smooth, and without angular terms.

It shares nothing with MACE but the protocol. Use it where a run is about the machinery and not the chemistry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.graph import Graph


class MorsePotential(torch.nn.Module):
    """E = sum over pairs of D ((1 - exp(-a (r - r0)))^2 - 1) f(r), mixed per element, plus an energy per atom.

    D in eV, a in 1/Å, r0 in Å; f is a cosine cutoff. Pair parameters are means of the two elements'.
    """

    architecture = "morse"
    _element_index: Tensor

    def __init__(
        self,
        elements: Sequence[int],
        cutoff: float = 5.0,
        depth: float = 0.3,
        width: float = 1.4,
        length: float = 2.8,
    ) -> None:
        super().__init__()
        self._configuration = {
            "elements": list(elements),
            "cutoff": cutoff,
            "depth": depth,
            "width": width,
            "length": length,
        }
        count = len(elements)
        index = torch.full((max(elements) + 1,), -1, dtype=torch.int64)
        index[torch.tensor(list(elements))] = torch.arange(count)
        self.register_buffer("_element_index", index, persistent=False)
        # Of the atoms seen last: those of a run are the same in all its steps.
        self._latest: tuple[Tensor, Tensor] | None = None
        self.log_depth = torch.nn.Parameter(torch.full((count,), math.log(depth)))
        self.log_width = torch.nn.Parameter(torch.full((count,), math.log(width)))
        self.length = torch.nn.Parameter(torch.full((count,), length))
        self.atomic_energy = torch.nn.Parameter(torch.zeros(count))

    @property
    def cutoff(self) -> float:
        return float(self._configuration["cutoff"])  # type: ignore[arg-type]

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(self._configuration["elements"])  # type: ignore[arg-type]

    def energies(self, graph: Graph) -> Tensor:
        element_n = self._elements_of(graph.numbers_n)
        atomic_n = self.atomic_energy[element_n] + self._pair_sums(graph, element_n)
        return torch.zeros(graph.num_structures, dtype=atomic_n.dtype, device=atomic_n.device).index_add(
            0, graph.structure_n, atomic_n
        )

    def _elements_of(self, numbers_n: Tensor) -> Tensor:
        """Which of the model's elements each atom is; looked at once, as a GPU has to be waited for."""
        if self._latest is None or self._latest[0] is not numbers_n:
            element_n = self._element_index[numbers_n]
            if bool((element_n < 0).any()):  # -1 would silently be the last element
                raise UserError(
                    f"a structure holds an element that the model does not know; it knows {self.elements}"
                )
            self._latest = numbers_n, element_n
        return self._latest[1]

    def _pair_sums(self, graph: Graph, element_n: Tensor) -> Tensor:
        r = torch.linalg.vector_norm(graph.vectors_e3, dim=-1)
        a, b = element_n[graph.senders_e], element_n[graph.receivers_e]
        depth = torch.exp(0.5 * (self.log_depth[a] + self.log_depth[b]))
        width = torch.exp(0.5 * (self.log_width[a] + self.log_width[b]))
        length = 0.5 * (self.length[a] + self.length[b])
        well = (1.0 - torch.exp(-width * (r - length))) ** 2 - 1.0
        smooth = 0.5 * (torch.cos(math.pi * r / self.cutoff) + 1.0) * (r < self.cutoff)
        pair_e = 0.5 * depth * well * smooth
        return torch.zeros_like(element_n, dtype=pair_e.dtype).index_add(0, graph.senders_e, pair_e)

    def descriptors(self, graph: Graph) -> Tensor:
        """Element one-hot and Gaussian counts of the neighbours by distance, [n, d]."""
        with torch.no_grad():
            r = torch.linalg.vector_norm(graph.vectors_e3, dim=-1)
            centres = torch.linspace(1.5, self.cutoff, 12, dtype=r.dtype, device=r.device)
            shell_e = torch.exp(-(((r[:, None] - centres) / 0.4) ** 2))
            n = graph.numbers_n.shape[0]
            shells = torch.zeros(n, 12, dtype=r.dtype, device=r.device).index_add(0, graph.senders_e, shell_e)
            onehot = torch.nn.functional.one_hot(self._element_index[graph.numbers_n], len(self.elements))
            return torch.cat([onehot.to(r.dtype), shells], dim=1)

    def shift_energies(self, shifts: Mapping[int, float]) -> None:
        with torch.no_grad():
            for number, shift in shifts.items():
                self.atomic_energy[self.elements.index(number)] += shift

    def configuration(self) -> Mapping[str, Any]:
        return dict(self._configuration)

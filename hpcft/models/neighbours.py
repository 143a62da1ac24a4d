"""A neighbour list with a skin, built again only when an atom may have come into the cutoff unseen.

Shape suffixes: n atoms of the whole batch, b structures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from ase import Atoms
from torch import Tensor

from hpcft.models.graph import Graph, build_graph, rebuild_edges


class VerletList:
    """Edges within `cutoff` + `skin` (Å) of where the atoms were, cut down to `cutoff` for where they are."""

    def __init__(
        self,
        structures: Sequence[Atoms] | Graph,
        cutoff: float,
        *,
        skin: float = 1.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cutoff, self.skin = cutoff, skin
        if isinstance(structures, Graph):
            listed = rebuild_edges(_detached(structures), cutoff + skin)
        else:
            listed = build_graph(structures, cutoff + skin, dtype=dtype, device=device)
        self.listed = listed.with_known_shifts()
        self.num_builds = 1

    def graph_at(self, positions_n3: Tensor | None, cell_b33: Tensor | None = None) -> Graph:
        """The graph at `positions_n3` (unwrapped, [n, 3] Å) and `cell_b33` (default: as it was), or where the list was built.

        Positions and cells keep their gradient.
        """
        if positions_n3 is None:
            return self.listed.within(self.cutoff)
        here = self.listed.with_positions(positions_n3)
        if cell_b33 is not None:
            here = replace(here, cell_b33=cell_b33)
        if not self._is_complete_at(here):
            self.listed = rebuild_edges(_detached(here), self.cutoff + self.skin).with_known_shifts()
            self.num_builds += 1
        return here.with_edges_of(self.listed).within(self.cutoff)

    def keep(self, structures: Sequence[int]) -> None:
        """Forget all other structures."""
        self.listed = self.listed.take(structures).with_known_shifts()

    def _is_complete_at(self, here: Graph) -> bool:
        """Whether no pair outside the list can be within the cutoff; False where anything is not finite.

        A pair that is not listed was further apart than cutoff + skin. The change of the cell shrinks that by at most
        its smallest singular value, and the atoms' own moves, measured against the cell, by twice the largest.
        """
        with torch.no_grad():
            if here.cell_b33 is self.listed.cell_b33:
                moved = (here.positions_n3 - self.listed.positions_n3).norm(dim=-1).max()
                return bool(
                    moved < 0.5 * self.skin
                )  # also where a replica is no longer finite: the others go on
            deformation_b33 = torch.linalg.solve(self.listed.cell_b33, here.cell_b33)
            affine = torch.einsum("ni,nij->nj", self.listed.positions_n3, deformation_b33[here.structure_n])
            moved_n = (here.positions_n3 - affine).norm(dim=-1)
            shrink_n = torch.linalg.svdvals(deformation_b33)[:, -1][here.structure_n]
            return bool(((self.cutoff + self.skin) * shrink_n - 2 * moved_n > self.cutoff).all())


def _detached(graph: Graph) -> Graph:
    return replace(graph, positions_n3=graph.positions_n3.detach(), cell_b33=graph.cell_b33.detach())

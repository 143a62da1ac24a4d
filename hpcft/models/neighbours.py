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
        here = self._at(positions_n3, cell_b33)
        if self.listed.positions_n3.device.type == "cpu":
            return here.with_edges_of(self.list_at(positions_n3, cell_b33)).within(self.cutoff)
        # Cutting the list down waits for the GPU in any case; the test is read afterwards, when its result is there.
        is_complete = self._is_complete_at(here)
        found = here.with_edges_of(self.listed).within(self.cutoff)
        return found if bool(is_complete) else here.with_edges_of(self._built_at(here)).within(self.cutoff)

    def list_at(self, positions_n3: Tensor, cell_b33: Tensor | None = None) -> Graph:
        """The list itself, skin and all, complete for these positions and cells; it is never changed, only replaced."""
        here = self._at(positions_n3, cell_b33)
        return self.listed if bool(self._is_complete_at(here)) else self._built_at(here)

    def _at(self, positions_n3: Tensor, cell_b33: Tensor | None) -> Graph:
        here = self.listed.with_positions(positions_n3)
        return here if cell_b33 is None else replace(here, cell_b33=cell_b33)

    def _built_at(self, here: Graph) -> Graph:
        self.listed = rebuild_edges(_detached(here), self.cutoff + self.skin).with_known_shifts()
        self.num_builds += 1
        return self.listed

    def keep(self, structures: Sequence[int]) -> None:
        """Forget all other structures."""
        self.listed = self.listed.take(structures).with_known_shifts()

    def _is_complete_at(self, here: Graph) -> Tensor:
        """Whether no pair outside the list can be within the cutoff; False where anything is not finite.

        A pair that is not listed was further apart than cutoff + skin. The change of the cell shrinks that by at most
        its smallest singular value, and the atoms' own moves, measured against the cell, by twice the largest.
        """
        with torch.no_grad():
            if here.cell_b33 is self.listed.cell_b33:
                moved = (here.positions_n3 - self.listed.positions_n3).norm(dim=-1).max()
                # Also where a replica is no longer finite: the others go on.
                is_complete: Tensor = moved < 0.5 * self.skin
                return is_complete
            # Unchecked, as the check would wait for the GPU: a cell without volume gives what is not finite.
            deformation_b33, _ = torch.linalg.solve_ex(self.listed.cell_b33, here.cell_b33)
            affine = torch.einsum("ni,nij->nj", self.listed.positions_n3, deformation_b33[here.structure_n])
            moved_n = (here.positions_n3 - affine).norm(dim=-1)
            shrink_n = torch.linalg.svdvals(deformation_b33)[:, -1][here.structure_n]
            is_complete = ((self.cutoff + self.skin) * shrink_n - 2 * moved_n > self.cutoff).all()
            return is_complete


def _detached(graph: Graph) -> Graph:
    return replace(graph, positions_n3=graph.positions_n3.detach(), cell_b33=graph.cell_b33.detach())

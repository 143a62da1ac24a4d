"""A neighbour list with a skin, built again only when an atom has moved half of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase import Atoms
from torch import Tensor

from hpcft.models.graph import Graph, build_graph, rebuild_edges


class VerletList:
    """Edges within `cutoff` + `skin` (Å) of where the atoms were, cut down to `cutoff` for where they are."""

    def __init__(
        self,
        structures: Sequence[Atoms],
        cutoff: float,
        *,
        skin: float = 1.0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.cutoff, self.skin = cutoff, skin
        self._listed = build_graph(structures, cutoff + skin, dtype=dtype, device=device)
        self.num_builds = 1

    def graph_at(self, positions_n3: Tensor | None) -> Graph:
        """The graph at `positions_n3` (unwrapped, [n, 3] Å), or where the list was built."""
        if positions_n3 is None:
            return self._listed.within(self.cutoff)
        moved = (positions_n3 - self._listed.positions_n3).norm(dim=-1).max()
        if not bool(moved < 0.5 * self.skin):  # also where a replica is no longer finite: the others go on
            self._listed = rebuild_edges(self._listed.with_positions(positions_n3), self.cutoff + self.skin)
            self.num_builds += 1
        return self._listed.with_positions(positions_n3).within(self.cutoff)

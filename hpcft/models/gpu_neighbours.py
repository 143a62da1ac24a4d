"""Neighbour lists where the atoms are: all structures of a batch in one search on the GPU, by nvalchemi-toolkit-ops.

An extra (`pip install hpcft[gpu]`); without it the atoms go to the processor and matscipy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hpcft.models.graph import Graph

# Its cells are binned by volume, which one without any has not.
_SMALLEST_VOLUME = 1e-6


@functools.cache
def library() -> Callable[..., Any] | None:
    """nvalchemi-toolkit-ops' `neighbor_list`; None where it is not installed, or does not fit the installed torch."""
    try:
        import warp

        warp.config.quiet = True  # it greets on standard output, which may be a table's or a program's
        from nvalchemiops.torch.neighbors import neighbor_list
    except (ImportError, AttributeError):
        return None
    found: Callable[..., Any] = neighbor_list
    return found


def edges_where_they_are(graph: Graph, cutoff: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Senders, receivers and cell shifts of all pairs within `cutoff` (Å), on the graph's own device.

    None where this is not the way: without the library, for a structure that lacks a cell vector, and where a position is not
    finite (the search would bin it anywhere).
    """
    search = library()
    if search is None:
        return None
    positions_n3, cell_b33 = graph.positions_n3.detach(), graph.cell_b33.detach()
    has_volume = torch.linalg.det(cell_b33).abs() > _SMALLEST_VOLUME
    if not bool(has_volume.all() & torch.isfinite(positions_n3).all()):
        return None
    counts_b = graph.num_atoms_b
    arguments = {
        "cell": cell_b33,
        "pbc": graph.periodic_b3,
        "batch_idx": graph.structure_n.int(),
        "batch_ptr": torch.cat([counts_b.new_zeros(1), counts_b.cumsum(0)]).int(),
        "return_neighbor_list": True,
        # Named, as it is right for every size; the others are for large cells in float32.
        "method": "batch_cell_list",
    }
    try:
        pairs, _, shifts = search(positions_n3, cutoff, **arguments)
    except _too_many_neighbours() as error:  # denser than it has guessed; the error says how dense
        most = int(error.num_neighbors)  # type: ignore[attr-defined]
        pairs, _, shifts = search(positions_n3, cutoff, max_neighbors=most, **arguments)
    return pairs[0].long(), pairs[1].long(), shifts.to(positions_n3.dtype)


def _too_many_neighbours() -> type[Exception]:
    from nvalchemiops.torch.neighbors import NeighborOverflowError

    found: type[Exception] = NeighborOverflowError
    return found

"""How many atoms a GPU's free memory takes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase import Atoms

from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate

# Of the free memory; neighbour lists with their skin, and fragmentation, need the rest.
_SHARE = 0.7


def atoms_that_fit(potential: Potential, structures: Sequence[Atoms], *, stress: bool = False) -> int | None:
    """Measured on the structure with the most atoms; None on the CPU, where batches gain nothing and memory is large."""
    device = device_of(potential)
    if device.type != "cuda" or not structures:
        return None
    largest = max(structures, key=len)
    graph = build_graph([largest], potential.cutoff, dtype=dtype_of(potential), device=device)
    evaluate(potential, graph, stress=stress)  # what is allocated once and for all
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    evaluate(potential, graph, stress=stress)
    torch.cuda.synchronize(device)
    per_atom = (torch.cuda.max_memory_allocated(device) - before) / len(largest)
    free, _ = torch.cuda.mem_get_info(device)
    return max(len(largest), int(_SHARE * free / max(per_atom, 1.0)))

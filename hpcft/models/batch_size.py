"""How many atoms a GPU's free memory takes at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms

from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate

# Of the free memory; neighbour lists with their skin, cells that shrink, and fragmentation need the rest.
_SHARE = 0.7
# Measured together: of a few atoms alone, what is allocated in whole blocks would seem to be needed for each.
_MEASURED_ATOMS = 1000
_ATOMS_ON_CPU = 2000


def atoms_that_fit(potential: Potential, structures: Sequence[Atoms], *, stress: bool = False) -> int | None:
    """Measured on copies of the structure with the most atoms for its volume; None on the CPU, where batches gain nothing and
    memory is large."""
    device = device_of(potential)
    if device.type != "cuda" or not structures:
        return None
    largest, densest = max(structures, key=len), max(structures, key=_density)
    measured = [densest] * max(1, _MEASURED_ATOMS // len(densest))
    graph = build_graph(measured, potential.cutoff, dtype=dtype_of(potential), device=device)
    evaluate(potential, graph, stress=stress)  # what is allocated once and for all
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    evaluate(potential, graph, stress=stress)
    torch.cuda.synchronize(device)
    per_atom = (torch.cuda.max_memory_allocated(device) - before) / len(graph.numbers_n)
    free, _ = torch.cuda.mem_get_info(device)
    # What this process holds and does not use is free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(len(largest), int(_SHARE * free / max(per_atom, 1.0)))


def atoms_together(potential: Potential, structures: Sequence[Atoms], *, stress: bool = False) -> int:
    """The same, with an answer for the CPU too: enough that what a batch costs by itself does not count."""
    return atoms_that_fit(potential, structures, stress=stress) or _ATOMS_ON_CPU


def _density(atoms: Atoms) -> float:
    """Atoms in a cubic Å, which neighbours and so memory grow with; of what has no volume, the least."""
    volume = abs(float(np.linalg.det(atoms.cell.array)))
    return len(atoms) / volume if volume > 0 else 0.0

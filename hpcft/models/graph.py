"""A batch of structures as one graph of tensors, and its neighbour list.

Shape suffixes: n atoms of the whole batch, b structures, e edges. Positions in Å.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from ase import Atoms
from matscipy.neighbours import neighbour_list
from torch import Tensor

from hpcft.models.gpu_neighbours import edges_where_they_are

# Side of the box of a neighbour search where nothing repeats, in cutoffs.
_LARGEST_BOX = 40.0


@dataclass(frozen=True)
class EdgeVectors:
    """Vectors of edges, worked out once: they hold where a graph has these very tensors, and none that wants a gradient."""

    cell_b33: Tensor
    shifts_e3: Tensor
    shift_vectors_e3: Tensor
    positions_n3: Tensor | None = None
    vectors_e3: Tensor | None = None


@dataclass(frozen=True)
class Graph:
    """Structures with their edges; an edge points from `senders_e` to `receivers_e`, shifted by whole cells.

    The vector of an edge is r[receiver] - r[sender] + shift @ cell, as in MACE.
    """

    positions_n3: Tensor
    numbers_n: Tensor
    structure_n: Tensor
    cell_b33: Tensor
    periodic_b3: Tensor
    senders_e: Tensor
    receivers_e: Tensor
    shifts_e3: Tensor
    known: EdgeVectors | None = field(default=None, repr=False, compare=False)

    @property
    def num_structures(self) -> int:
        return int(self.cell_b33.shape[0])

    @property
    def num_atoms_b(self) -> Tensor:
        # Not by bincount, for whose result a GPU and the processor wait for each other twice.
        zeros = torch.zeros(self.num_structures, dtype=torch.int64, device=self.structure_n.device)
        return zeros.index_add(0, self.structure_n, torch.ones_like(self.structure_n))

    @property
    def num_bytes(self) -> int:
        return int(sum(tensor.nbytes for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """All that it consists of, by name."""
        return {name: value for name, value in vars(self).items() if name != "known"}

    @property
    def shift_vectors_e3(self) -> Tensor:
        """Cell translation of each edge in Å."""
        if (known := self._known_shifts()) is not None:
            return known.shift_vectors_e3
        cell_e33 = self.cell_b33[self.structure_n[self.senders_e]]
        return torch.einsum("ei,eij->ej", self.shifts_e3, cell_e33)

    @property
    def vectors_e3(self) -> Tensor:
        known = self._known_shifts()
        if known is not None and known.vectors_e3 is not None and known.positions_n3 is self.positions_n3:
            return known.vectors_e3
        difference = self.positions_n3[self.receivers_e] - self.positions_n3[self.senders_e]
        return difference + self.shift_vectors_e3

    def _known_shifts(self) -> EdgeVectors | None:
        known = self.known
        if known is None or known.cell_b33 is not self.cell_b33 or known.shifts_e3 is not self.shifts_e3:
            return None
        return None if self.cell_b33.requires_grad else known

    def with_known_shifts(self) -> Graph:
        """The same graph, which works the cell translations of its edges out once and for all."""
        with torch.no_grad():
            return replace(self, known=EdgeVectors(self.cell_b33, self.shifts_e3, self.shift_vectors_e3))

    def with_positions(self, positions_n3: Tensor) -> Graph:
        return replace(self, positions_n3=positions_n3)

    def with_edges_of(self, other: Graph) -> Graph:
        return replace(
            self,
            senders_e=other.senders_e,
            receivers_e=other.receivers_e,
            shifts_e3=other.shifts_e3,
            known=other.known,
        )

    def within(self, cutoff: float) -> Graph:
        """The same graph without the edges longer than `cutoff` (Å): what a skin added is taken away again."""
        with torch.no_grad():
            shift_vectors_e3, vectors_e3 = self.shift_vectors_e3, self.vectors_e3
            kept = ((vectors_e3**2).sum(-1) < cutoff**2).nonzero().squeeze(-1)
            shifts_e3 = self.shifts_e3[kept]
            known = EdgeVectors(self.cell_b33, shifts_e3, shift_vectors_e3[kept])
            if not self.positions_n3.requires_grad:
                known = replace(known, positions_n3=self.positions_n3, vectors_e3=vectors_e3[kept])
        return replace(
            self,
            senders_e=self.senders_e[kept],
            receivers_e=self.receivers_e[kept],
            shifts_e3=shifts_e3,
            known=known,
        )

    def take(self, structures: Sequence[int]) -> Graph:
        """The batch of these structures alone, in their order here (`structures` ascending)."""
        index = torch.as_tensor(list(structures), dtype=torch.int64, device=self.structure_n.device)
        number_b = torch.full((self.num_structures,), -1, dtype=torch.int64, device=index.device)
        number_b[index] = torch.arange(len(index), device=index.device)
        atoms = number_b[self.structure_n] >= 0
        number_n = torch.cumsum(atoms, 0) - 1
        edges = atoms[self.senders_e]
        return Graph(
            positions_n3=self.positions_n3[atoms],
            numbers_n=self.numbers_n[atoms],
            structure_n=number_b[self.structure_n[atoms]],
            cell_b33=self.cell_b33[index],
            periodic_b3=self.periodic_b3[index],
            senders_e=number_n[self.senders_e[edges]],
            receivers_e=number_n[self.receivers_e[edges]],
            shifts_e3=self.shifts_e3[edges],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Graph:
        """Move all tensors; `dtype` applies to the floating-point ones. To a GPU they go while the processor works on."""
        moved = {name: moved_to(device, tensor, dtype) for name, tensor in self.tensors().items()}
        return replace(self, **moved, known=None)


def moved_to(device: torch.device | str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device; `dtype` applies to a floating-point one. To a GPU it goes while the processor works on."""
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if torch.device(device).type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device=device, dtype=kind)
    # Torch keeps pinned memory until the copy from it has ended, whoever lets go of it before.
    return tensor.to(kind).pin_memory().to(device, non_blocking=True)


def find_edges(
    positions: np.ndarray, cell: np.ndarray, periodic: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ordered pairs (i, j, cell shift) closer than `cutoff` (Å); an atom may see its own images.

    A structure with a non-finite position has no pairs: the search would spend seconds on it.
    """
    if not np.isfinite(positions).all():
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3))
    full_cell = np.array(cell, dtype=float)
    open_directions = [axis for axis in range(3) if not full_cell[axis].any()]
    if open_directions:
        full_cell = _fill_open_directions(full_cell, positions, cutoff)
    senders, receivers, shifts = neighbour_list(
        "ijS", positions=np.ascontiguousarray(positions), cell=full_cell, pbc=periodic, cutoff=cutoff
    )
    return senders.astype(np.int64), receivers.astype(np.int64), shifts.astype(np.float64)


def _fill_open_directions(cell: np.ndarray, positions: np.ndarray, cutoff: float) -> np.ndarray:
    """Give missing cell vectors a length; the neighbour search needs a box even where nothing repeats.

    Its bins fill that box, so it is bounded: an atom that has flown off would cost gigabytes. Those outside
    of it are found all the same, in the outermost bins.
    """
    from ase.geometry import complete_cell

    extent = min(float(np.ptp(positions, axis=0).max()), _LARGEST_BOX * cutoff) + 2.0 * cutoff + 1.0
    filled = complete_cell(cell)
    for axis in range(3):
        if not cell[axis].any():
            filled[axis] *= extent / np.linalg.norm(filled[axis])
    return np.asarray(filled)


def build_graph(
    structures: Sequence[Atoms],
    cutoff: float,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Graph:
    """Batch `structures` with the neighbour list of `cutoff` (Å)."""
    offsets = np.concatenate([[0], np.cumsum([len(atoms) for atoms in structures])]).astype(np.int64)
    edges = [find_edges(atoms.get_positions(), atoms.cell.array, atoms.pbc, cutoff) for atoms in structures]
    senders = np.concatenate([e[0] + o for e, o in zip(edges, offsets, strict=False)])
    receivers = np.concatenate([e[1] + o for e, o in zip(edges, offsets, strict=False)])
    shifts = np.concatenate([e[2] for e in edges])
    structure = np.repeat(np.arange(len(structures)), np.diff(offsets))
    graph = Graph(
        positions_n3=torch.from_numpy(np.concatenate([a.get_positions() for a in structures])),
        numbers_n=torch.from_numpy(np.concatenate([a.numbers for a in structures]).astype(np.int64)),
        structure_n=torch.from_numpy(structure.astype(np.int64)),
        cell_b33=torch.from_numpy(np.stack([np.asarray(a.cell.array, dtype=float) for a in structures])),
        periodic_b3=torch.from_numpy(np.stack([np.asarray(a.pbc, dtype=bool) for a in structures])),
        senders_e=torch.from_numpy(senders),
        receivers_e=torch.from_numpy(receivers),
        shifts_e3=torch.from_numpy(shifts.reshape(-1, 3)),
    )
    return graph.to(device, dtype)


def rebuild_edges(graph: Graph, cutoff: float) -> Graph:
    """The same structures with a new neighbour list for where the atoms are now (positions keep their gradient)."""
    if graph.positions_n3.is_cuda and (found := edges_where_they_are(graph, cutoff)) is not None:
        return replace(graph, senders_e=found[0], receivers_e=found[1], shifts_e3=found[2])
    positions = graph.positions_n3.detach().to("cpu", torch.float64).numpy()
    cells = graph.cell_b33.detach().to("cpu", torch.float64).numpy()
    periodic = graph.periodic_b3.cpu().numpy()
    counts = graph.num_atoms_b.cpu().numpy()
    offsets = np.concatenate([[0], np.cumsum(counts)])
    edges = [
        find_edges(positions[offsets[b] : offsets[b + 1]], cells[b], periodic[b], cutoff)
        for b in range(len(counts))
    ]
    device = graph.positions_n3.device
    senders = np.concatenate([e[0] + o for e, o in zip(edges, offsets, strict=False)])
    receivers = np.concatenate([e[1] + o for e, o in zip(edges, offsets, strict=False)])
    shifts = np.concatenate([e[2] for e in edges]).reshape(-1, 3)
    return replace(
        graph,
        senders_e=moved_to(device, torch.from_numpy(senders)),
        receivers_e=moved_to(device, torch.from_numpy(receivers)),
        shifts_e3=moved_to(device, torch.from_numpy(shifts), graph.positions_n3.dtype),
    )


def concatenate(graphs: Sequence[Graph]) -> Graph:
    """One batch out of several; the atoms and structures of each follow those of the one before."""
    atoms = np.cumsum([0] + [g.positions_n3.shape[0] for g in graphs])
    counts = np.cumsum([0] + [g.num_structures for g in graphs])
    return Graph(
        positions_n3=torch.cat([g.positions_n3 for g in graphs]),
        numbers_n=torch.cat([g.numbers_n for g in graphs]),
        structure_n=torch.cat([g.structure_n + int(c) for g, c in zip(graphs, counts, strict=False)]),
        cell_b33=torch.cat([g.cell_b33 for g in graphs]),
        periodic_b3=torch.cat([g.periodic_b3 for g in graphs]),
        senders_e=torch.cat([g.senders_e + int(a) for g, a in zip(graphs, atoms, strict=False)]),
        receivers_e=torch.cat([g.receivers_e + int(a) for g, a in zip(graphs, atoms, strict=False)]),
        shifts_e3=torch.cat([g.shifts_e3 for g in graphs]),
    )

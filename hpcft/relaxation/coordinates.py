"""What a relaxation moves, as one list of rows: the atoms of each structure, and the three rows of its strain.

Written like this a map need not know whether the cell moves too (as in ASE's UnitCellFilter, after Tadmor et al.,
PRB 59, 235, 1999). With q the position that an atom would have in the cell of the start, e the symmetric strain:

    x = q (1 + e),   cell = cell_start (1 + e),   row of the strain = s e,   s = sqrt(N) (V / N)^(1/3)

The length s makes the curvature along a strain like that along an atom's position, whatever the size of the cell,
so that one step size serves both. A row moves in Å, and its force -dE/d(row) is in eV/Å.

Shape suffixes: n atoms of the whole batch, b structures, r rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hpcft.models.graph import Graph, concatenate
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Potential, frozen

# Neighbour lists are kept until an atom has moved half of this (Å).
SKIN = 0.6


@dataclass(frozen=True)
class Coordinates:
    """The rows of a batch; `start` holds its cells and, for the atoms, where the relaxation begins."""

    start: Graph
    movable_n: Tensor
    with_cell: bool
    structure_r: Tensor
    is_cell_r: Tensor
    scale_b: Tensor
    """s, the length by which a strain is multiplied, Å."""
    periodic_b33: Tensor
    """Projector on the space that the periodic cell vectors span: only there is a cell strained."""

    @classmethod
    def of(cls, graph: Graph, *, movable_n: Tensor | None = None, with_cell: bool = False) -> Coordinates:
        """All atoms that are `movable_n` ([n] bool; default: all), and the cells if `with_cell`.

        A fixed atom keeps its place in the cell. Only periodic directions are strained. Raises ValueError for a cell that
        is to relax and has no volume.
        """
        device, num_atoms_b = graph.structure_n.device, graph.num_atoms_b
        if movable_n is None:
            movable_n = torch.ones_like(graph.structure_n, dtype=torch.bool)
        volume_b = torch.linalg.det(graph.cell_b33.detach()).abs()
        if with_cell and not bool(((volume_b > 0) & graph.periodic_b3.any(dim=1)).all()):
            raise ValueError(
                "the cell of a structure is to relax, but it is not periodic or its cell vectors span no volume; give it a "
                "cell, or relax it at fixed cell"
            )
        mean_b = torch.where(volume_b > 0, volume_b / num_atoms_b, torch.ones_like(volume_b))
        every_b = torch.arange(graph.num_structures, device=device)
        structure_r, is_cell_r = graph.structure_n, torch.zeros_like(graph.structure_n, dtype=torch.bool)
        if with_cell:
            both = torch.cat([graph.structure_n, every_b.repeat_interleave(3)])
            order = torch.argsort(both, stable=True)
            structure_r, is_cell_r = both[order], order >= len(graph.structure_n)
        scale_b = num_atoms_b.to(mean_b.dtype).sqrt() * mean_b ** (1 / 3)
        periodic_b33 = _projectors(graph) if with_cell else torch.zeros_like(graph.cell_b33)
        return cls(graph, movable_n, with_cell, structure_r, is_cell_r, scale_b, periodic_b33)

    @property
    def num_structures(self) -> int:
        return self.start.num_structures

    # Once and for all, and rows by number: a GPU has to be waited for to read a tensor, or to index by a mask.

    @cached_property
    def _rows_of_atoms(self) -> Tensor:
        """[n] row of each atom."""
        return torch.nonzero(~self.is_cell_r).ravel()

    @cached_property
    def _rows_of_cells(self) -> Tensor:
        """[3 b] rows of the strains."""
        return torch.nonzero(self.is_cell_r).ravel()

    @cached_property
    def _movable_r1(self) -> Tensor | None:
        """Which rows are free to move; None: all."""
        if bool(self.movable_n.all()):
            return None
        return torch.ones_like(self.is_cell_r).index_copy(0, self._rows_of_atoms, self.movable_n)[:, None]

    @cached_property
    def numbers_r(self) -> Tensor:
        """Atomic number of each row's atom, 0 for the rows of a strain, [r]."""
        return torch.zeros_like(self.structure_r).index_copy(0, self._rows_of_atoms, self.start.numbers_n)

    def first_rows(self) -> Tensor:
        """The rows of the start, [r, 3] Å; the atoms' keep their gradient."""
        positions = self.start.positions_n3
        if not self.with_cell:
            return positions
        zeros = positions.new_zeros(len(self.structure_r), 3)
        return zeros.index_put((self._rows_of_atoms,), positions)

    def positions_and_cells(self, rows_r3: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, 3] and cells [b, 3, 3] in Å, differentiable in the rows."""
        if not self.with_cell:
            return rows_r3, self.start.cell_b33
        strain_b33 = self._strains(rows_r3)
        positions = rows_r3[self._rows_of_atoms]
        positions = positions + torch.einsum("ni,nij->nj", positions, strain_b33[self.start.structure_n])
        return positions, self.start.cell_b33 + self.start.cell_b33 @ strain_b33

    def _strains(self, rows_r3: Tensor) -> Tensor:
        raw_b33 = rows_r3[self._rows_of_cells].reshape(-1, 3, 3) / self.scale_b[:, None, None]
        return self.periodic_b33 @ (0.5 * (raw_b33 + raw_b33.transpose(1, 2))) @ self.periodic_b33

    def rows_at(self, positions_n3: Tensor, cell_b33: Tensor) -> Tensor:
        """The rows where a relaxation from this start is at these positions and cells: inverse of `positions_and_cells`."""
        if not self.with_cell:
            return positions_n3
        change_b33 = torch.linalg.solve(self.start.cell_b33, cell_b33)
        strain_b33 = change_b33 - torch.eye(3, dtype=change_b33.dtype, device=change_b33.device)
        back_n33 = torch.linalg.inv(change_b33)[self.start.structure_n]
        rows = positions_n3.new_zeros(len(self.structure_r), 3)
        rows[self._rows_of_atoms] = torch.einsum("ni,nij->nj", positions_n3, back_n33)
        rows[self._rows_of_cells] = (strain_b33 * self.scale_b[:, None, None]).reshape(-1, 3)
        return rows

    def graph_at(self, rows_r3: Tensor, listed: Graph, cutoff: float) -> Graph:
        """The graph at these rows with the edges of `listed` that are within the cutoff."""
        positions_n3, cell_b33 = self.positions_and_cells(rows_r3)
        here = replace(self.start, positions_n3=positions_n3, cell_b33=cell_b33)
        return here.with_edges_of(listed).within(cutoff)

    def neighbours(self, cutoff: float) -> VerletList:
        """A neighbour list that is complete at the start."""
        return VerletList(self.start, cutoff, skin=SKIN)

    def list_at(self, rows_r3: Tensor, neighbours: VerletList) -> Graph:
        """The list with its skin, complete at these rows; the list itself never changes, so that one can keep it."""
        with torch.no_grad():
            positions_n3, cell_b33 = self.positions_and_cells(rows_r3.detach())
            return neighbours.list_at(positions_n3, cell_b33 if self.with_cell else None)

    def forces(
        self, potential: Potential, rows_r3: Tensor, listed: Graph, *, create_graph: bool = False
    ) -> Tensor:
        """-dE/d(row), [r, 3] eV/Å, zero for what is fixed; with `create_graph` it can be differentiated again."""
        return self.energies_and_forces(potential, rows_r3, listed, create_graph=create_graph)[1]

    def energies_and_forces(
        self, potential: Potential, rows_r3: Tensor, listed: Graph, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Energies [b] in eV, and `forces`."""
        with torch.enable_grad(), contextlib.nullcontext() if create_graph else frozen(potential):
            if not rows_r3.requires_grad:
                rows_r3 = rows_r3.detach().requires_grad_(True)
            energies_b = potential.energies(self.graph_at(rows_r3, listed, potential.cutoff))
            (gradient,) = torch.autograd.grad(
                energies_b.sum(), rows_r3, create_graph=create_graph, allow_unused=True
            )
            # There is none where no two atoms are near each other.
            forces = -self.free(rows_r3 * 0.0 if gradient is None else gradient)
        return (energies_b, forces) if create_graph else (energies_b.detach(), forces.detach())

    def free(self, values_r3: Tensor) -> Tensor:
        """The same with zeros for fixed atoms."""
        return values_r3 if self._movable_r1 is None else values_r3 * self._movable_r1

    def per_structure(self, values_r: Tensor) -> Tensor:
        """Sums over the rows of each structure, [b]."""
        zeros: Tensor = values_r.new_zeros(self.num_structures)
        return zeros.index_add(0, self.structure_r, values_r)

    def largest(self, vectors_r3: Tensor) -> Tensor:
        """Length of the longest vector of an atom in each structure, [b]; not finite where one is not."""
        lengths = vectors_r3.norm(dim=-1).masked_fill(self.is_cell_r, 0.0)
        zeros: Tensor = lengths.new_zeros(self.num_structures)
        return zeros.scatter_reduce(0, self.structure_r, lengths, "amax")

    def forces_on_atoms(self, rows_r3: Tensor, forces_r3: Tensor) -> Tensor:
        """Forces at the atoms' real places, [n, 3] eV/Å, out of those on the rows; zero for fixed atoms."""
        if not self.with_cell:
            return forces_r3
        identity = torch.eye(3, dtype=rows_r3.dtype, device=rows_r3.device)
        inverse_b33, _ = torch.linalg.inv_ex(
            identity + self._strains(rows_r3)
        )  # a check would wait for a GPU
        return torch.einsum("ni,nij->nj", forces_r3[self._rows_of_atoms], inverse_b33[self.start.structure_n])

    def largest_force(self, rows_r3: Tensor, forces_r3: Tensor) -> Tensor:
        """Largest force on an atom of each structure, [b] eV/Å; not finite where one is not."""
        lengths = self.forces_on_atoms(rows_r3, forces_r3).norm(dim=-1)
        zeros: Tensor = lengths.new_zeros(self.num_structures)
        return zeros.scatter_reduce(0, self.start.structure_n, lengths, "amax")

    def largest_stress(self, rows_r3: Tensor, forces_r3: Tensor) -> Tensor:
        """Largest component of the stress of each structure, [b] eV/Å^3; zero where the cell is fixed.

        With c = 1 + e and G = dE/de, the stress S / V solves c^-1 S + S c^-1 = 2 G: simple where c is diagonal.
        """
        if not self.with_cell:
            return forces_r3.new_zeros(self.num_structures)
        forces_b33 = forces_r3[self._rows_of_cells].reshape(-1, 3, 3)
        identity = torch.eye(3, dtype=rows_r3.dtype, device=rows_r3.device)
        lengths_b3, axes_b33 = torch.linalg.eigh(identity + self._strains(rows_r3))
        inverse_b3 = 1 / lengths_b3
        along_b33 = axes_b33.transpose(1, 2) @ forces_b33 @ axes_b33
        along_b33 = 2 * along_b33 / (inverse_b3[:, :, None] + inverse_b3[:, None, :])
        virial_b33 = axes_b33 @ along_b33 @ axes_b33.transpose(1, 2) * self.scale_b[:, None, None]
        volume_b = torch.linalg.det(self.start.cell_b33).abs() * lengths_b3.prod(dim=1).abs()
        stress_b: Tensor = virial_b33.abs().amax(dim=(1, 2)) / volume_b
        return stress_b

    def joined(self, other: Coordinates) -> Coordinates:
        """These structures and, after them, the other ones."""
        return Coordinates.of(
            concatenate([self.start, other.start]),
            movable_n=torch.cat([self.movable_n, other.movable_n]),
            with_cell=self.with_cell,
        )

    def collapsed(self, rows_r3: Tensor) -> Tensor:
        """Which cells have shrunk to less than half in some direction, [b] bool.

        No crystal does; but with a model that pulls a cell together the neighbours would soon fill all memory.
        """
        if not self.with_cell:
            return torch.zeros_like(self.scale_b, dtype=torch.bool)
        smallest_b: Tensor = torch.linalg.eigvalsh(self._strains(rows_r3))[:, 0]
        return smallest_b < -0.5

    def take(self, structures: Sequence[int]) -> Coordinates:
        """These structures alone (ascending)."""
        atoms = torch.isin(self.start.structure_n, self._index(structures))
        return Coordinates.of(
            self.start.take(structures), movable_n=self.movable_n[atoms], with_cell=self.with_cell
        )

    def to(self, dtype: torch.dtype) -> Coordinates:
        """The same in another precision."""
        if self.scale_b.dtype == dtype:
            return self
        return replace(
            self,
            start=self.start.to(self.start.structure_n.device, dtype),
            scale_b=self.scale_b.to(dtype),
            periodic_b33=self.periodic_b33.to(dtype),
        )

    def rows_of(self, structures: Sequence[int]) -> Tensor:
        """Which rows belong to these structures, [r] bool."""
        return torch.isin(self.structure_r, self._index(structures))

    def _index(self, structures: Sequence[int]) -> Tensor:
        return torch.as_tensor(list(structures), dtype=torch.int64, device=self.structure_r.device)


def _projectors(graph: Graph) -> Tensor:
    """V^+ V of the periodic cell vectors V; exactly one where all three are periodic."""
    vectors_b33 = graph.cell_b33.detach() * graph.periodic_b3[:, :, None]
    identity_b33 = torch.eye(3, dtype=vectors_b33.dtype, device=vectors_b33.device).expand_as(vectors_b33)
    whole_b = graph.periodic_b3.all(dim=1)
    return torch.where(whole_b[:, None, None], identity_b33, torch.linalg.pinv(vectors_b33) @ vectors_b33)

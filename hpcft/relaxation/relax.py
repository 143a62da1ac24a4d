"""Batched relaxation of many structures, for use: what has converged leaves the batch, and the next one takes its place.

Shape suffixes: b structures, r rows of `coordinates`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.graph import concatenate, moved_to
from hpcft.models.neighbours import VerletList
from hpcft.models.protocol import Potential, device_of, dtype_of
from hpcft.relaxation.coordinates import SKIN, Coordinates
from hpcft.relaxation.lbfgs import Lbfgs
from hpcft.relaxation.maps import Fire, RelaxationMap, State

OPTIMISERS: dict[str, Callable[[], RelaxationMap]] = {"fire": Fire, "lbfgs": Lbfgs}


@dataclass(frozen=True)
class Relaxed:
    """The end of one relaxation: structure, energy (eV), largest force (eV/Å), steps taken, whether it converged.

    `energy_start` in eV; `max_stress`, the largest component (eV/Å^3), is 0 where the cell did not move; `forces` [n, 3]
    (eV/Å) are those of the end, zero on fixed atoms.
    """

    atoms: Atoms
    energy: float
    max_force: float
    num_steps: int
    converged: bool
    energy_start: float = float("nan")
    max_stress: float = 0.0
    forces: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))


def relax(
    potential: Potential,
    structures: Sequence[Atoms],
    *,
    fmax: float = 0.01,
    max_steps: int = 500,
    optimiser: str | RelaxationMap = "fire",
    with_cell: bool = False,
    max_stress: float = 6e-4,
    max_atoms: int | None = None,
    on_done: Callable[[int, Relaxed], None] | None = None,
) -> list[Relaxed]:
    """Relax structures together until the largest force on each is below `fmax` (eV/Å), and its stress below `max_stress`
    (eV/Å^3) where the cell relaxes too (`with_cell`).

    At most `max_atoms` atoms are in the batch at once (default: all). Fixed atoms (ASE's FixAtoms) stay; UserError for
    another constraint, ValueError for an optimiser that does not exist. `on_done` is told the number and the result of each
    structure when it ends. A structure whose forces are not finite, or whose cell collapses, ends at once. What a GPU's memory
    does not take starts again in smaller batches; torch.OutOfMemoryError for a structure that does not fit alone.
    """
    if isinstance(optimiser, str):
        if optimiser not in OPTIMISERS:
            raise ValueError(f"there is no optimiser '{optimiser}'; choose one of {', '.join(OPTIMISERS)}")
        optimiser = OPTIMISERS[optimiser]()
    fixed = [fixed_atoms(atoms, f"structure {index}") for index, atoms in enumerate(structures)]
    batch = _Batch(potential, structures, fixed, optimiser, with_cell)
    results: dict[int, Relaxed] = {}
    waiting = list(range(len(structures)))
    while waiting or batch.numbers:
        coming = _that_fit(waiting, structures, batch.num_atoms, max_atoms)
        waiting = waiting[len(coming) :]
        batch.admit(coming)
        ended: list[tuple[int, Relaxed]] | None = None
        try:
            ended = batch.step(fmax, max_stress, max_steps)
        except torch.OutOfMemoryError:
            if len(batch.numbers) == 1:
                raise
        if ended is None:  # out here, where the error keeps no memory any more
            max_atoms = batch.num_atoms // 2
            waiting = [*batch.give_back(max_atoms), *waiting]
            continue
        for number, relaxed in ended:
            results[number] = relaxed
            if on_done is not None:
                on_done(number, relaxed)
    return [results[number] for number in range(len(structures))]


def _that_fit(
    waiting: Sequence[int], structures: Sequence[Atoms], num_atoms: int, max_atoms: int | None
) -> list[int]:
    """The next structures, as many as there is room for; one at least where nothing is in the batch."""
    coming: list[int] = []
    for number in waiting:
        num_atoms += len(structures[number])
        if (
            max_atoms is not None
            and num_atoms > max_atoms
            and (coming or num_atoms > len(structures[number]))
        ):
            break
        coming.append(number)
    return coming


class _Batch:
    """The structures that are being relaxed, and where they are."""

    def __init__(
        self,
        potential: Potential,
        structures: Sequence[Atoms],
        fixed: Sequence[np.ndarray],
        map: RelaxationMap,
        with_cell: bool,
    ) -> None:
        self.potential, self.map, self.with_cell = potential, map, with_cell
        self.structures, self.fixed = structures, fixed
        self.numbers: list[int] = []
        self.num_steps: list[int] = []
        self.energies_start: list[float] = []
        self.coordinates: Coordinates
        self.neighbours: VerletList
        self.rows: Tensor
        self.state: State

    @property
    def num_atoms(self) -> int:
        return sum(len(self.structures[number]) for number in self.numbers)

    def admit(self, coming: Sequence[int]) -> None:
        """Let structures in, at the end of the batch; only their neighbours are looked for."""
        if not coming:
            return
        chosen = [self.structures[number] for number in coming]
        dtype, device = dtype_of(self.potential), device_of(self.potential)
        neighbours = VerletList(chosen, self.potential.cutoff, skin=SKIN, dtype=dtype, device=device)
        movable = moved_to(device, torch.from_numpy(np.concatenate([~self.fixed[n] for n in coming])))
        new = Coordinates.of(neighbours.listed, movable_n=movable, with_cell=self.with_cell)
        rows, state = new.first_rows(), self.map.start(new)
        if self.numbers:
            rows, state = torch.cat([self.rows, rows]), State.join([self.state, state])
            new = self.coordinates.joined(new)
            neighbours.listed = concatenate([self.neighbours.listed, neighbours.listed])
        self.numbers += coming
        self.num_steps += [0] * len(coming)
        self.energies_start += [float("nan")] * len(coming)
        self.coordinates, self.rows, self.state, self.neighbours = new, rows, state, neighbours

    def give_back(self, max_atoms: int) -> list[int]:
        """Let go of all beyond so many atoms, but for the first structure; returns their numbers."""
        ends = np.cumsum([len(self.structures[number]) for number in self.numbers])
        num_staying = max(1, int(np.searchsorted(ends, max_atoms, side="right")))
        going = self.numbers[num_staying:]
        self._keep(list(range(num_staying)))
        return going

    def step(self, fmax: float, max_stress: float, max_steps: int) -> list[tuple[int, Relaxed]]:
        """One step of all; those that end here leave with their results."""
        coordinates = self.coordinates
        listed = coordinates.list_at(self.rows, self.neighbours)
        energies_b, forces = coordinates.energies_and_forces(self.potential, self.rows, listed)
        force_b = coordinates.largest_force(self.rows, forces)
        stress_b = coordinates.largest_stress(self.rows, forces)
        converged_b = (force_b < fmax) & (stress_b < max_stress)
        lost_b = ~(force_b + stress_b).isfinite() | coordinates.collapsed(self.rows)
        ends_b = converged_b | lost_b
        # Read together, in double precision: each time that a GPU is asked, it runs out of work.
        read = torch.stack([one.double() for one in (energies_b, force_b, stress_b, converged_b, ends_b)])
        energies, largest, stresses, converged, ends = read.tolist()
        self.energies_start = [
            energy if num_steps == 0 else before
            for energy, num_steps, before in zip(energies, self.num_steps, self.energies_start, strict=True)
        ]
        done = [
            bool(over) or num_steps >= max_steps for over, num_steps in zip(ends, self.num_steps, strict=True)
        ]
        finished = []
        if any(done):
            moved, cells, forces_n3 = self._where_they_are(forces)
            structure_n = np.repeat(np.arange(len(done)), [len(self.structures[n]) for n in self.numbers])
            for b in np.flatnonzero(done).tolist():
                mine = structure_n == b
                relaxed = Relaxed(
                    self._atoms(b, moved[mine], cells[b]),
                    energies[b],
                    largest[b],
                    self.num_steps[b],
                    bool(converged[b]),
                    self.energies_start[b],
                    stresses[b],
                    forces_n3[mine],
                )
                finished.append((self.numbers[b], relaxed))
        displacement, self.state = self.map.step(coordinates, forces, self.state)
        self.rows = self.rows + coordinates.free(displacement)
        self.num_steps = [number + 1 for number in self.num_steps]
        if any(done):
            self._keep([b for b, over in enumerate(done) if not over])
        return finished

    def _where_they_are(self, forces: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What atoms have moved by [n, 3], cells [b, 3, 3], and forces on atoms [n, 3], of the whole batch at once."""
        positions, cells = self.coordinates.positions_and_cells(self.rows)
        moved = positions - self.coordinates.start.positions_n3
        forces_n3 = self.coordinates.forces_on_atoms(self.rows, forces)
        found = [tensor.detach().cpu().double().numpy() for tensor in (moved, cells, forces_n3)]
        return found[0], found[1], found[2]

    def _keep(self, staying: list[int]) -> None:
        mask = self.coordinates.rows_of(staying)
        index = torch.as_tensor(staying, dtype=torch.int64, device=mask.device)
        self.rows, self.state = self.rows[mask], self.state.take(mask, index)
        self.numbers = [self.numbers[b] for b in staying]
        self.num_steps = [self.num_steps[b] for b in staying]
        self.energies_start = [self.energies_start[b] for b in staying]
        if staying:
            self.coordinates = self.coordinates.take(staying)
            self.neighbours.keep(staying)

    def _atoms(self, b: int, moved: np.ndarray, cell: np.ndarray) -> Atoms:
        """With what it moved by, so that what has not moved keeps every bit in single precision too."""
        atoms: Atoms = self.structures[self.numbers[b]].copy()
        constraints, atoms.constraints = atoms.constraints, []
        if self.with_cell and self.num_steps[b]:
            atoms.set_cell(cell)
        atoms.positions += moved
        atoms.set_constraint(constraints)
        return atoms


def fixed_atoms(atoms: Atoms, name: str) -> np.ndarray:
    """Which atoms FixAtoms holds, [n] bool."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise UserError(
                f"{name} ({atoms.get_chemical_formula()}) has the constraint {type(constraint).__name__}; only fixed atoms "
                "(FixAtoms) can be kept in a batched relaxation: remove it, or relax this structure with ASE"
            )
        fixed[constraint.index] = True
    return fixed

"""Batched relaxation of many structures with FIRE (Bitzek et al., PRL 97, 170201, 2006), at fixed cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from hpcft.models.graph import Graph, build_graph
from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate

# The constants of the paper; the time step is in units where mass is one, step lengths in Å.
_START, _LARGEST, _GROW, _SHRINK = 0.1, 0.4, 1.1, 0.5
_ALPHA, _ALPHA_DECAY, _PATIENCE, _MAX_STEP = 0.1, 0.99, 5, 0.2


@dataclass(frozen=True)
class Relaxed:
    """The end of one relaxation: structure, energy (eV), largest force (eV/Å), steps taken, whether it converged."""

    atoms: Atoms
    energy: float
    max_force: float
    num_steps: int
    converged: bool


@dataclass
class _Fire:
    """Per-structure state of the FIRE integrator; v in Å per unit time."""

    velocity_n3: Tensor
    timestep_b: Tensor
    alpha_b: Tensor
    downhill_b: Tensor

    @classmethod
    def start(cls, graph: Graph) -> _Fire:
        ones = torch.ones(graph.num_structures, dtype=graph.cell_b33.dtype, device=graph.cell_b33.device)
        zeros = torch.zeros_like(graph.positions_n3)
        return cls(zeros, _START * ones, _ALPHA * ones, torch.zeros_like(ones))

    def displacement(self, graph: Graph, forces_n3: Tensor) -> Tensor:
        """One FIRE step: mixes velocity towards the force, stops structures that go uphill."""
        s = graph.structure_n

        def per_structure(values_n: Tensor) -> Tensor:
            return torch.zeros_like(self.alpha_b).index_add(0, s, values_n)

        power_b = per_structure((forces_n3 * self.velocity_n3).sum(-1))
        down = power_b > 0
        speed_b = per_structure((self.velocity_n3**2).sum(-1)).sqrt()
        norm_b = per_structure((forces_n3**2).sum(-1)).sqrt().clamp_min(1e-12)
        mixed = (1 - self.alpha_b)[s, None] * self.velocity_n3 + (self.alpha_b * speed_b / norm_b)[
            s, None
        ] * forces_n3
        self.velocity_n3 = torch.where(down[s, None], mixed, torch.zeros_like(mixed))
        patient = down & (self.downhill_b > _PATIENCE)
        grown = (self.timestep_b * _GROW).clamp_max(_LARGEST)
        self.timestep_b = torch.where(
            patient, grown, torch.where(down, self.timestep_b, self.timestep_b * _SHRINK)
        )
        fresh = torch.full_like(self.alpha_b, _ALPHA)
        self.alpha_b = torch.where(
            patient, self.alpha_b * _ALPHA_DECAY, torch.where(down, self.alpha_b, fresh)
        )
        self.downhill_b = torch.where(down, self.downhill_b + 1, torch.zeros_like(self.downhill_b))
        self.velocity_n3 = self.velocity_n3 + self.timestep_b[s, None] * forces_n3
        step = self.timestep_b[s, None] * self.velocity_n3
        length = step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        limited: Tensor = step * (_MAX_STEP / length).clamp_max(1.0)
        return limited


def relax(
    potential: Potential, structures: Sequence[Atoms], *, fmax: float = 0.01, max_steps: int = 500
) -> list[Relaxed]:
    """Relax all structures together; one that has converged (largest force below `fmax`, eV/Å) costs nothing more."""
    dtype, device = dtype_of(potential), device_of(potential)
    results: list[Relaxed | None] = [None] * len(structures)
    active = list(range(len(structures)))
    current = [atoms.copy() for atoms in structures]
    fire: _Fire | None = None
    for step in range(max_steps + 1):
        if not active:
            break
        graph = build_graph([current[i] for i in active], potential.cutoff, dtype=dtype, device=device)
        fire = fire or _Fire.start(graph)
        evaluation = evaluate(potential, graph)
        largest_b = _largest_force(graph, evaluation.forces_n3)
        done = [
            b
            for b in range(len(active))
            if largest_b[b] < fmax or step == max_steps or not np.isfinite(largest_b[b])
        ]
        for b in done:
            results[active[b]] = Relaxed(
                current[active[b]],
                float(evaluation.energies_b[b]),
                float(largest_b[b]),
                step,
                bool(largest_b[b] < fmax),
            )
        displacement = fire.displacement(graph, evaluation.forces_n3).cpu().double().numpy()
        for b, i in enumerate(active):
            if b not in done:
                mine = (graph.structure_n == b).cpu().numpy()
                current[i].positions = current[i].positions + displacement[mine]
        if done:
            fire = _keep(fire, graph, [b for b in range(len(active)) if b not in done])
            active = [i for b, i in enumerate(active) if b not in done]
    return [result for result in results if result is not None]


def _largest_force(graph: Graph, forces_n3: Tensor) -> np.ndarray:
    norm_n = forces_n3.norm(dim=-1)
    largest = torch.zeros(graph.num_structures, dtype=norm_n.dtype, device=norm_n.device)
    return np.asarray(largest.scatter_reduce(0, graph.structure_n, norm_n, "amax").cpu())


def _keep(fire: _Fire, graph: Graph, keep: list[int]) -> _Fire:
    index = torch.tensor(keep, dtype=torch.int64, device=graph.structure_n.device)
    atoms = torch.isin(graph.structure_n, index)
    return _Fire(fire.velocity_n3[atoms], fire.timestep_b[index], fire.alpha_b[index], fire.downhill_b[index])

"""The training objective: one module whose forward is the whole loss, so that DDP sees one forward.

DDP around the potential alone gives silently wrong gradients once a relaxation is unrolled through it; here
the unroll happens inside the wrapped module. DDP averages over ranks, so each term is divided by its count
over all ranks and multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, as_module, device_of, dtype_of, evaluate
from hpcft.relaxation import MapSettings, delta_q, unroll
from hpcft.training.data import Batch, RelaxationPair


@dataclass(frozen=True)
class Weights:
    """Factors of the squared errors: energy per atom (eV/atom)^2, forces (eV/Å)^2, stress (eV/Å^3)^2."""

    energy: float = 1.0
    forces: float = 1.0
    stress: float = 0.0


@dataclass(frozen=True)
class Counts:
    """How much a term holds over all ranks."""

    structures: int
    atoms: int


@dataclass(frozen=True)
class LabelledTerm:
    batch: Batch | None
    counts: Counts
    weight: float = 1.0
    name: str = "labels"


@dataclass(frozen=True)
class RelaxationTerm:
    """BPTT: Delta Q of the unrolled relaxation's end against the reference's (arXiv 2512.01067)."""

    pairs: Sequence[RelaxationPair]
    count: int
    weight: float
    map: MapSettings = field(default_factory=MapSettings)
    engine: str = "adjoint"


class Objective(torch.nn.Module):
    """forward(terms) -> loss and its parts, each already scaled so that the mean over ranks is the global value."""

    def __init__(self, potential: Potential, weights: Weights, world_size: int = 1) -> None:
        super().__init__()
        self.potential = as_module(potential)
        self._potential = potential
        self.weights = weights
        self.world_size = world_size

    def forward(
        self, labelled: Sequence[LabelledTerm], relaxation: RelaxationTerm | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        # Every parameter takes part even where this rank's share of the batch is empty: DDP waits for it.
        zero = torch.stack([p.sum() for p in self.potential.parameters()]).sum()
        total = 0.0 * zero
        for term in labelled:
            for name, value in self._labelled(term).items():
                parts[f"{term.name}/{name}"] = value.detach()
                total = total + term.weight * getattr(self.weights, name) * value
        if relaxation is not None:
            value = self._relaxation(relaxation)
            parts["relaxation/delta_q"] = value.detach()
            total = total + relaxation.weight * value
        return total, parts

    def _labelled(self, term: LabelledTerm) -> dict[str, Tensor]:
        if term.batch is None:
            nothing = torch.zeros((), dtype=dtype_of(self._potential), device=device_of(self._potential))
            return {"energy": nothing, "forces": nothing, "stress": nothing}
        graph, labels = term.batch.graph, term.batch.labels
        result = evaluate(self._potential, graph, stress=self.weights.stress > 0, create_graph=True)
        energy = (((result.energies_b - labels.energies_b) / graph.num_atoms_b) ** 2).sum()
        forces = ((result.forces_n3 - labels.forces_n3) ** 2).sum()
        stress = torch.zeros_like(energy)
        if result.stress_b33 is not None:
            difference = (result.stress_b33 - labels.stress_b33) * labels.stress_known_b[:, None, None]
            stress = (difference**2).sum()
        scale, counts = float(self.world_size), term.counts
        return {
            "energy": energy * scale / counts.structures,
            "forces": forces * scale / (3 * counts.atoms),
            "stress": stress * scale / (9 * counts.structures),
        }

    def _relaxation(self, term: RelaxationTerm) -> Tensor:
        dtype, device = dtype_of(self._potential), device_of(self._potential)
        if not term.pairs:
            return torch.zeros((), dtype=dtype, device=device)
        graph = build_graph([p.start for p in term.pairs], self._potential.cutoff, dtype=dtype, device=device)
        targets = torch.cat([torch.as_tensor(p.relaxed.get_positions()) for p in term.pairs])
        final_n3 = unroll(self._potential, graph, term.map, term.engine)
        distance_b = delta_q(final_n3, targets.to(device, dtype), graph)
        return distance_b.sum() * float(self.world_size) / term.count

"""The training objective: one module whose forward is the whole loss, so that DDP sees one forward.

DDP around the potential alone gives silently wrong gradients once a relaxation is unrolled through it; here
the unroll happens inside the wrapped module. DDP averages over ranks, so each term is divided by its count
over all ranks and multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hpcft.models.graph import Graph, build_graph
from hpcft.models.protocol import Evaluation, Potential, as_module, device_of, dtype_of, evaluate
from hpcft.relaxation import (
    Descent,
    ImplicitReport,
    Lbfgs,
    RelaxationMap,
    RelaxationPair,
    Solver,
    StepSize,
    Stop,
    Unrolled,
    cell_distance,
    delta_q,
    fixed_atoms,
    relaxed_implicitly,
    unroll,
    with_cells,
)
from hpcft.training.data import Batch, Labels
from hpcft.training.schedule import Scheduled, value_at


@dataclass(frozen=True)
class Weights:
    """Factors of the squared errors: energy per atom (eV/atom)^2, forces (eV/Å)^2, stress (eV/Å^3)^2."""

    energy: Scheduled = 1.0
    forces: Scheduled = 1.0
    stress: Scheduled = 0.0

    def at(self, epoch: float) -> Weights:
        """As plain numbers, at this time."""
        return Weights(*(value_at(w, epoch) for w in (self.energy, self.forces, self.stress)))


@dataclass(frozen=True)
class Huber:
    """Where each error stops to count squared and goes on linearly: energy eV/atom, forces eV/Å, stress eV/Å^3.

    x^2 up to delta, then delta (2 |x| - delta): twice Huber's loss (Ann. Math. Statist. 35, 73, 1964), so that small errors
    count as without it.
    """

    energy: float = 0.01
    forces: float = 0.1
    stress: float = 0.01


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
class Unrolling:
    """How a relaxation is followed and differentiated (see `hpcft.relaxation.unroll`).

    `engine` may also be `implicit`: the gradient at the converged minimum, for which steps and map do not matter. The minimum is
    found by L-BFGS to `minimum_fmax` (eV/Å), the linear system solved to `solver`'s tolerance.
    """

    map: RelaxationMap = field(default_factory=Descent)
    engine: str = "adjoint"
    stop: Stop | None = None
    last: int | None = None
    with_cell: bool = False
    minimum_fmax: float = 1e-3
    solver: Solver = field(default_factory=lambda: Solver(tolerance=1e-4))

    @property
    def step_size(self) -> StepSize | None:
        """The learnable step size, if there is one."""
        found = getattr(self.map, "step_size", None)
        return found if isinstance(found, StepSize) else None


@dataclass(frozen=True)
class RelaxationTerm:
    """Delta Q of the end of the model's own relaxation against the reference's (arXiv 2512.01067).

    Where the cell relaxes too, the distance of the cells is added. `count` is over all ranks.
    """

    pairs: Sequence[RelaxationPair]
    count: int
    weight: float
    steps: int
    unrolling: Unrolling = field(default_factory=Unrolling)


class Objective(torch.nn.Module):
    """forward(terms) -> loss and its parts, each already scaled so that the mean over ranks is the global value.

    `replay`: the potential on the head that replay data are compared with, if that is another.
    """

    def __init__(
        self,
        potential: Potential,
        weights: Weights,
        world_size: int = 1,
        step_size: StepSize | None = None,
        huber: Huber | None = None,
        replay: Potential | None = None,
    ) -> None:
        super().__init__()
        self.potential = as_module(potential)
        self._potential = potential
        self.replay = as_module(replay or potential)  # the parameters that it shares are counted once
        self.step_size = step_size  # as a part of this module, so that DDP knows its parameters
        self.weights = weights
        self.world_size = world_size
        self.huber = huber
        self._implicit: tuple[ImplicitReport, float] | None = None

    def count_left_out(self, parts: dict[str, Tensor]) -> None:
        """Add to what was dropped those structures that only the backward pass has found to be no minimum."""
        if self._implicit is not None:
            report, scale = self._implicit
            parts["relaxation/dropped"] = parts["relaxation/dropped"] + len(report.left_out) * scale

    def forward(
        self, labelled: Sequence[LabelledTerm], relaxation: RelaxationTerm | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        self._implicit = None
        # Every parameter takes part even where this rank's share of the batch is empty: DDP waits for it.
        zero = torch.stack([p.sum() for p in self.parameters()]).sum()
        total = 0.0 * zero
        weighted = [term for term in labelled if term.weight * sum(vars(self.weights.at(0)).values()) > 0]
        for term in weighted:
            for name, value in self._labelled(term).items():
                parts[f"{term.name}/{name}"] = value.detach()
                total = total + term.weight * value_at(getattr(self.weights, name), 0) * value
        if relaxation is not None:
            value, numbers = self._relaxation(relaxation)
            parts |= numbers
            total = total + relaxation.weight * value
        return total, parts

    def _labelled(self, term: LabelledTerm) -> dict[str, Tensor]:
        if term.batch is None:
            nothing = torch.zeros((), dtype=dtype_of(self._potential), device=device_of(self._potential))
            return {"energy": nothing, "forces": nothing, "stress": nothing}
        graph, labels = term.batch.graph, term.batch.labels
        potential = cast(Potential, self.replay) if term.name == "replay" else self._potential
        result = evaluate(potential, graph, stress=value_at(self.weights.stress, 0) > 0, create_graph=True)
        sums = summed_errors(result, graph, labels, self.huber)
        scale, counts = float(self.world_size), term.counts
        return {
            "energy": sums["energy"] * scale / counts.structures,
            "forces": sums["forces"] * scale / (3 * counts.atoms),
            "stress": sums["stress"] * scale / (9 * counts.structures),
        }

    def _relaxation(self, term: RelaxationTerm) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the global batch; structures that diverged, or are no minimum, count as nothing and are counted."""
        dtype, device = dtype_of(self._potential), device_of(self._potential)
        scale = float(self.world_size) / term.count
        loss = torch.zeros((), dtype=dtype, device=device)
        num_steps = num_dropped = 0
        if term.pairs:
            end, distance_b = self._distances(term)
            loss = distance_b[end.valid_b].sum() * scale
            num_steps, num_dropped = int(end.num_steps_b.sum()), int((~end.valid_b).sum())
        return loss, {
            "relaxation/delta_q": loss.detach(),
            "relaxation/steps": torch.tensor(num_steps * scale, dtype=dtype, device=device),
            "relaxation/dropped": torch.tensor(num_dropped * scale, dtype=dtype, device=device),
        }

    def _distances(self, term: RelaxationTerm) -> tuple[Unrolled, Tensor]:
        dtype, device = dtype_of(self._potential), device_of(self._potential)
        how, starts = term.unrolling, [pair.start for pair in term.pairs]
        graph = build_graph(starts, self._potential.cutoff, dtype=dtype, device=device)
        fixed = [torch.from_numpy(fixed_atoms(atoms, "a start structure")) for atoms in starts]
        anchored_b = torch.stack([f.any() for f in fixed]).to(device)
        movable_n = ~torch.cat(fixed).to(device)
        if how.engine == "implicit":
            end, report = relaxed_implicitly(
                self._potential,
                graph,
                fmax=how.minimum_fmax,
                max_stress=0.06 * how.minimum_fmax,
                map=Lbfgs(),
                solver=how.solver,
                movable_n=movable_n,
                with_cell=how.with_cell,
            )
            self._implicit = report, float(self.world_size) / term.count
        else:
            end = unroll(
                self._potential,
                graph,
                how.map,
                term.steps,
                engine=how.engine,
                stop=how.stop,
                last=how.last,
                movable_n=movable_n,
                with_cell=how.with_cell,
            )
        relaxed = [pair.relaxed for pair in term.pairs]
        target_n3 = torch.cat([torch.as_tensor(atoms.get_positions()) for atoms in relaxed]).to(device, dtype)
        if not how.with_cell:
            return end, delta_q(end.positions_n3, target_n3, graph, anchored_b=anchored_b)
        cells = torch.stack([torch.as_tensor(atoms.cell.array) for atoms in relaxed]).to(device, dtype)
        target = with_cells(graph, cells)
        distance_b = delta_q(
            end.positions_n3, target_n3, target, final_cell_b33=end.cell_b33, anchored_b=anchored_b
        )
        return end, distance_b + cell_distance(end.cell_b33, target)


def summed_errors(
    result: Evaluation, graph: Graph, labels: Labels, huber: Huber | None = None
) -> dict[str, Tensor]:
    """Sums over a batch of squared (or Huber's) errors, each weighted as its structure is; stress only where it is known."""
    energy_weight_b, forces_weight_b, stress_weight_b = labels.weights_b3.unbind(1)
    energy_b = (result.energies_b - labels.energies_b) / graph.num_atoms_b
    forces_n3 = result.forces_n3 - labels.forces_n3
    sums = {
        "energy": (energy_weight_b * _counted(energy_b, huber.energy if huber else None)).sum(),
        "forces": (
            forces_weight_b[graph.structure_n, None] * _counted(forces_n3, huber.forces if huber else None)
        ).sum(),
        "stress": torch.zeros_like(result.energies_b.sum()),
    }
    if result.stress_b33 is not None:
        known_b11 = (stress_weight_b * labels.stress_known_b)[:, None, None]
        stress_b33 = result.stress_b33 - labels.stress_b33
        sums["stress"] = (known_b11 * _counted(stress_b33, huber.stress if huber else None)).sum()
    return sums


def _counted(errors: Tensor, delta: float | None) -> Tensor:
    if delta is None:
        return errors**2
    zero = torch.zeros_like(errors)
    return 2 * torch.nn.functional.huber_loss(errors, zero, reduction="none", delta=delta)

"""How far a model is off on labelled structures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from ase import Atoms
from torch import Tensor

from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate, frozen
from hpcft.training.data import Batch, LabelledSet, share
from hpcft.training.loss import Huber, Weights, summed_errors
from hpcft.training.rank import Rank
from hpcft.training.schedule import value_at

# Structures that are evaluated together.
_TOGETHER = 8


def measure(potential: Potential, structures: Sequence[Atoms]) -> dict[str, float]:
    """Energy MAE (meV/atom), force MAE (meV/Å) and force slope on labelled structures."""
    found = errors_of(potential, LabelledSet(structures, potential.cutoff, dtype_of(potential)))
    return {name: found[name] for name in ("energy_mae_meV_per_atom", "force_mae_meV_per_A", "force_slope")}


def errors_of(
    potential: Potential,
    data: LabelledSet,
    rank: Rank | None = None,
    *,
    weights: Weights | None = None,
    huber: Huber | None = None,
    together: int = _TOGETHER,
) -> dict[str, float]:
    """Errors on all of `data`, the same on every rank, which share the work: MAE of energy (meV/atom) and forces (meV/Å),
    slope of the forces, stress MAE (meV/Å^3) where the loss has a stress, and the `loss` itself under `weights`.
    """
    rank, weights = rank or Rank(), weights or Weights()
    stress = value_at(weights.stress, 0) > 0
    mine = share(data.num_atoms_each(range(len(data))), rank.rank, rank.world_size)
    total = torch.zeros(len(_SUMS), dtype=torch.float64, device=device_of(potential))
    with frozen(potential):
        for first in range(0, len(mine), together):
            batch = data.batch(mine[first : first + together], device_of(potential))
            total += _sums(potential, batch, stress, huber)
    if rank.world_size > 1:
        dist.all_reduce(total)
    s = dict(zip(_SUMS, total.tolist(), strict=True))
    structures, atoms = len(data), data.num_atoms(range(len(data)))
    parts = {
        "energy": s["energy"] / structures,
        "forces": s["forces"] / (3 * atoms),
        "stress": s["stress"] / (9 * structures),
    }
    found = {
        "loss": sum(value_at(getattr(weights, name), 0) * value for name, value in parts.items()),
        "energy_mae_meV_per_atom": 1e3 * s["abs_energy"] / structures,
        "force_mae_meV_per_A": 1e3 * s["abs_forces"] / (3 * atoms),
        "force_slope": s["predicted_x_reference"] / s["reference_squared"]
        if s["reference_squared"]
        else float("nan"),
    }
    if stress and s["num_stress"]:
        found["stress_mae_meV_per_A3"] = 1e3 * s["abs_stress"] / (9 * s["num_stress"])
    return found


_SUMS = (
    "energy",
    "forces",
    "stress",
    "abs_energy",
    "abs_forces",
    "abs_stress",
    "num_stress",
    "predicted_x_reference",
    "reference_squared",
)


def _sums(potential: Potential, batch: Batch, stress: bool, huber: Huber | None) -> Tensor:
    graph, labels = batch.graph, batch.labels
    result = evaluate(potential, graph, stress=stress)
    sums = {name: value.double() for name, value in summed_errors(result, graph, labels, huber).items()}
    predicted, reference = result.forces_n3.double(), labels.forces_n3.double()
    energy_b = ((result.energies_b - labels.energies_b) / graph.num_atoms_b).double()
    zero = energy_b.new_zeros(())
    sums |= {
        "abs_energy": energy_b.abs().sum(),
        "abs_forces": (predicted - reference).abs().sum(),
        "abs_stress": zero,
        "num_stress": labels.stress_known_b.double().sum(),
        "predicted_x_reference": (predicted * reference).sum(),
        "reference_squared": (reference**2).sum(),
    }
    if result.stress_b33 is not None:
        difference = (result.stress_b33 - labels.stress_b33) * labels.stress_known_b[:, None, None]
        sums["abs_stress"] = difference.double().abs().sum()
    return torch.stack([sums[name] for name in _SUMS])

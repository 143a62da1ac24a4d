"""How far a model is off on labelled structures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate
from hpcft.training.data import LabelledSet


def measure(potential: Potential, structures: Sequence[Atoms]) -> dict[str, float]:
    """Energy MAE (meV/atom), force MAE (meV/Å) and force slope on labelled structures."""
    data = LabelledSet(structures, potential.cutoff, dtype_of(potential))
    predicted, reference, energy_errors = [], [], []
    for index in range(len(data)):
        batch = data.batch([index], device_of(potential))
        result = evaluate(potential, batch.graph)
        error = (result.energies_b - batch.labels.energies_b) / batch.graph.num_atoms_b
        energy_errors.append(abs(float(error[0])))
        predicted.append(result.forces_n3.cpu().double().numpy().ravel())
        reference.append(batch.labels.forces_n3.cpu().double().numpy().ravel())
    p, r = np.concatenate(predicted), np.concatenate(reference)
    return {
        "energy_mae_meV_per_atom": 1e3 * float(np.mean(energy_errors)),
        "force_mae_meV_per_A": 1e3 * float(np.abs(p - r).mean()),
        "force_slope": float(p @ r / (r @ r)),
    }

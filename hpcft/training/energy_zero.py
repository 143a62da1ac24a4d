"""The zero of energy: a reference whose isolated atoms have other energies than the foundation's.

Such a difference is linear in the composition. Left to the training it would take most of it (tens of eV/atom between
pseudopotentials), though a least-squares fit finds it at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from scipy.optimize import least_squares

from hpcft.errors import UserError
from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, device_of, dtype_of

# Residuals (eV/atom) beyond this count ever less: frames that the model understands least must not set the zero.
_SCALE = 0.05
# Pull of each element towards the mean shift, for compositions that do not tell elements apart.
_RIDGE = 1e-3
_TOGETHER = 8


def fitted_shifts(potential: Potential, structures: Sequence[Atoms]) -> dict[int, float]:
    """By atomic number, what to add to the model's energy of each atom (eV) to come near REF_energy.

    Robust (Cauchy's loss of the error per atom). Elements that no structure holds keep their energy. Where the compositions
    do not tell elements apart (one composition only), all shift alike.
    """
    model_energies: list[float] = []
    for first in range(0, len(structures), _TOGETHER):
        some = list(structures[first : first + _TOGETHER])
        graph = build_graph(some, potential.cutoff, dtype=dtype_of(potential), device=device_of(potential))
        model_energies += potential.energies(graph).detach().double().cpu().tolist()
    num_atoms = np.array([len(atoms) for atoms in structures])
    reference = np.array([float(atoms.info["REF_energy"]) for atoms in structures])
    wanted = (reference - np.array(model_energies)) / num_atoms
    numbers = sorted({int(number) for atoms in structures for number in atoms.numbers})
    shares = np.array([[(atoms.numbers == n).mean() for n in numbers] for atoms in structures])
    common = float(np.median(wanted))
    pull = _RIDGE * len(structures) ** 0.5

    def residuals(shifts: np.ndarray) -> np.ndarray:
        return np.concatenate([shares @ shifts - wanted, pull * (shifts - common)])

    shifts = np.full(len(numbers), common)
    for loss in ("soft_l1", "cauchy"):  # the second forgets wild frames, but needs to start near the answer
        shifts = least_squares(residuals, shifts, loss=loss, f_scale=_SCALE).x
    return {number: float(shift) for number, shift in zip(numbers, shifts, strict=True)}


def shifts_to(potential: Potential, isolated: Mapping[str, float]) -> dict[int, float]:
    """By atomic number, from the model's energy of an isolated atom to the reference's (eV, by symbol).

    UserError unless every element named is known to the model.
    """
    shifts = {}
    for symbol, energy in isolated.items():
        number = chemical_symbols.index(symbol)
        if number not in potential.elements:
            raise UserError(f"train.energy_zero names {symbol}, which the model does not know; take it out")
        graph = build_graph(
            [Atoms(symbol)], potential.cutoff, dtype=dtype_of(potential), device=device_of(potential)
        )
        shifts[number] = float(energy) - float(potential.energies(graph).detach()[0])
    return shifts


def shifted(structures: Sequence[Atoms], shifts: Mapping[int, float]) -> list[Atoms]:
    """Copies whose REF_energy has the zero that a model has after `shift_energies(shifts)`."""
    found = []
    for atoms in structures:
        atoms = atoms.copy()
        atoms.info["REF_energy"] = float(atoms.info["REF_energy"]) + sum(
            shift * int((atoms.numbers == number).sum()) for number, shift in shifts.items()
        )
        found.append(atoms)
    return found

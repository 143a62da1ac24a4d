"""Reference energies, forces, stresses and relaxations, checked before anyone may learn from them.

Units: eV, Å; stress in eV/Å³ with ASE's sign (positive under tension), Voigt order xx yy zz yz xz xy.
Shape suffixes: n atoms, 3 directions, 6 Voigt components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from numpy.typing import NDArray

from hpcft.errors import LabelError
from hpcft.labelling.causes import calculator_errors
from hpcft.labelling.item import plain_structure
from hpcft.labelling.sanity import symmetric_voigt

Array = NDArray[np.float64]
EnergyKind = Literal["free_energy", "energy"]

# A net force above both bounds is no rounding: an external field, an applied constraint, or forces of another
# structure.
_NET_FORCE_SHARE = 0.05  # of the summed magnitudes
_NET_FORCE_PER_ATOM = 0.01  # eV/Å


@dataclass(frozen=True, eq=False)
class Label:
    """What a single-point gave.

    `energy_kind` is 'free_energy' where that is the energy the forces derive from, and 'energy' where the
    code offers nothing else. `stress_6` is None where the code has none or nothing is periodic.
    """

    energy: float
    energy_kind: EnergyKind
    forces_n3: Array
    stress_6: Array | None


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Where a structure went: by `relaxed.positions - start.positions` at fixed cell, as nothing is wrapped.

    Unless `converged`, `relaxed` is merely the last structure and no target for anything.
    """

    start: Atoms
    relaxed: Atoms
    energy_start: float
    energy_relaxed: float
    energy_kind: EnergyKind
    num_steps: int
    converged: bool
    max_force: float


def compute_label(atoms: Atoms, calculator: Any) -> Label:
    """Energy, forces and stress from one reference calculation; LabelError if they are missing or impossible.

    Constraints of `atoms` do not act on the forces. `calculator` may be any ASE calculator; it is asked for
    all at once.
    """
    structure = plain_structure(atoms)
    check_geometry(structure)
    with calculator_errors(calculator):
        results = _calculate(structure, calculator)
        _refuse_unconverged(calculator)
    energy, kind = _energy(results)
    forces_n3 = _array(results, "forces", (len(structure), 3))
    stress_6 = None if results.get("stress") is None else _voigt(results["stress"])
    check_finite(energy, forces_n3, stress_6)
    check_net_force(forces_n3)
    return Label(energy, kind, forces_n3, stress_6)


def relax(
    atoms: Atoms,
    calculator: Any,
    fmax: float,
    max_steps: int,
    *,
    with_cell: bool = False,
    on_step: Callable[[], None] | None = None,
) -> Relaxation:
    """Relax all atoms at fixed cell with BFGS to forces below `fmax` (eV/Å), in at most `max_steps`.

    `with_cell`: the cell relaxes too, at zero pressure, till the generalised forces of ASE's FrechetCellFilter are below
    `fmax` as well.

    `on_step` is called after each reference calculation. LabelError if any of them fails; not converging is
    no error but a result with `converged` False.
    """
    from ase.filters import FrechetCellFilter
    from ase.optimize.bfgs import BFGS

    start = plain_structure(atoms)
    check_geometry(start)
    moving = start.copy()
    moving.calc = calculator
    energies: list[float] = []
    kind: EnergyKind = "energy"
    max_force, converged = np.inf, False
    with calculator_errors(calculator):
        optimizer = BFGS(FrechetCellFilter(moving) if with_cell else moving, logfile=None)
        for converged_now in optimizer.irun(fmax=fmax, steps=max_steps):
            converged = bool(converged_now)
            forces_n3 = np.asarray(moving.get_forces(), dtype=np.float64)
            energy, kind = _energy_of(moving)
            _refuse_unconverged(calculator)
            check_finite(energy, forces_n3, None)
            energies.append(energy)
            max_force = float(np.linalg.norm(forces_n3, axis=1).max())
            if on_step is not None:
                on_step()
    check_net_force(forces_n3)
    return Relaxation(
        start=start,
        relaxed=plain_structure(moving),
        energy_start=energies[0],
        energy_relaxed=energies[-1],
        energy_kind=kind,
        num_steps=int(optimizer.nsteps),
        converged=converged,
        max_force=max_force,
    )


def check_geometry(atoms: Atoms) -> None:
    """LabelError for a structure that no reference calculation should be started on."""
    if len(atoms) == 0:
        raise LabelError("geometry", "the structure has no atoms")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise LabelError(
            "geometry", f"the positions or the cell of {atoms.get_chemical_formula()} hold NaN or infinity"
        )
    periodic_vectors = atoms.cell.array[atoms.pbc]
    if len(periodic_vectors) and np.linalg.matrix_rank(periodic_vectors) < len(periodic_vectors):
        raise LabelError(
            "geometry", f"the periodic cell vectors of {atoms.get_chemical_formula()} span no cell"
        )
    if (atoms.numbers < 1).any() or (atoms.numbers > 118).any():
        raise LabelError(
            "geometry", f"{atoms.get_chemical_formula()} holds an atomic number outside 1 to 118"
        )


def check_finite(energy: float, forces_n3: Array, stress_6: Array | None) -> None:
    """LabelError with cause 'non-finite' naming what holds NaN or infinity."""
    named = {"energy": np.asarray(energy), "forces": forces_n3, "stress": stress_6}
    bad = [name for name, values in named.items() if values is not None and not np.isfinite(values).all()]
    if bad:
        raise LabelError(
            "non-finite", f"{' and '.join(bad)} hold NaN or infinity (energy {energy} eV); do atoms overlap?"
        )


def _calculate(atoms: Atoms, calculator: Any) -> Mapping[str, Any]:
    """All properties from one call, because file-based codes would start anew for each."""
    properties = [
        name for name in ("energy", "forces", "stress") if name in calculator.implemented_properties
    ]
    if not atoms.pbc.any() and "stress" in properties:
        properties.remove("stress")
    try:
        calculator.calculate(atoms, properties, all_changes)
    except PropertyNotImplementedError:  # some codes offer stress and then refuse it for this kind of input
        if "stress" not in properties:
            raise
        properties.remove("stress")
        calculator.calculate(atoms, properties, all_changes)
    results = dict(calculator.results)
    if "stress" not in properties:
        results.pop("stress", None)
    return results


def _refuse_unconverged(calculator: Any) -> None:
    """Wrapper scripts lose a code's exit status, and some ASE calculators read any output without a word."""
    converged = getattr(calculator, "converged", None)
    unconverged = isinstance(converged, bool | np.bool_) and not converged
    output = getattr(getattr(calculator, "template", None), "outputname", None)
    if output is not None:
        path = Path(calculator.directory) / output
        unconverged |= path.is_file() and "convergence NOT achieved" in path.read_text(errors="replace")
    if unconverged:
        raise LabelError("scf", f"the self-consistent field of {type(calculator).__name__} did not converge")


def _energy(results: Mapping[str, Any]) -> tuple[float, EnergyKind]:
    if results.get("free_energy") is not None:
        return float(results["free_energy"]), "free_energy"
    if results.get("energy") is not None:
        return float(results["energy"]), "energy"
    raise LabelError("calculator", "the calculator ended without an energy")


def _energy_of(atoms: Atoms) -> tuple[float, EnergyKind]:
    try:
        return float(atoms.get_potential_energy(force_consistent=True)), "free_energy"
    except PropertyNotImplementedError:
        return float(atoms.get_potential_energy()), "energy"


def _array(results: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    if results.get(name) is None:
        raise LabelError("calculator", f"the calculator ended without {name}")
    array = np.array(results[name], dtype=np.float64)
    if array.shape != shape:
        raise LabelError(
            "calculator", f"the calculator gave {name} of shape {array.shape}, but {shape} was expected"
        )
    return array


def _voigt(stress: Any) -> Array:
    stress = np.array(stress, dtype=np.float64)
    if stress.shape == (3, 3):
        return symmetric_voigt(stress)
    return _array({"stress": stress}, "stress", (6,))


def check_net_force(forces_n3: Array) -> None:
    """LabelError for forces that do not add up to zero, as those of an isolated system do."""
    net = float(np.linalg.norm(forces_n3.sum(axis=0)))
    total = float(np.linalg.norm(forces_n3, axis=1).sum())
    if net > _NET_FORCE_SHARE * total and net > _NET_FORCE_PER_ATOM * len(forces_n3):
        raise LabelError(
            "net-force",
            f"the forces add up to {net:.3g} eV/Å of {total:.3g} eV/Å in magnitudes, "
            "but nothing pulls from outside; does the calculator apply a field or a constraint?",
        )

"""Reference energies, forces, stresses and relaxations, checked before anyone may learn from them.

Units: eV, Å; stress in eV/Å³ with ASE's sign (positive under tension), Voigt order xx yy zz yz xz xy.
Shape suffixes: n atoms, 3 directions, 6 Voigt components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from numpy.typing import NDArray

from hpcft.errors import LabelError
from hpcft.labelling.causes import calculator_errors
from hpcft.labelling.convergence import is_unconverged
from hpcft.labelling.item import OPTIONAL_ARRAYS, plain_structure
from hpcft.labelling.sanity import symmetric_voigt

Array = NDArray[np.float64]
EnergyKind = Literal["free_energy", "energy"]

# A net force above both bounds is no rounding: an external field, an applied constraint, or forces of another
# structure.
_NET_FORCE_SHARE = 0.05  # of the summed magnitudes
_NET_FORCE_PER_ATOM = 0.01  # eV/Å


EXTRA_SHAPES: Mapping[str, tuple[int, ...] | None] = {"magmoms": None, "charges": None, "dipole": (3,)}
"""Shape of what a label may hold beside energy, forces and stress; None: a number for each atom."""


@dataclass(frozen=True, eq=False)
class Label:
    """What a single-point gave.

    `energy_kind` is 'free_energy' where that is the energy the forces derive from, and 'energy' where the code offers
    nothing else, or where the energy extrapolated to zero smearing was asked for. `stress_6` is None where the code has
    none or nothing is periodic. `extra` holds what else was asked for: magmoms [n] (Bohr magnetons), charges [n] (e),
    dipole [3] (e Å).
    """

    energy: float
    energy_kind: EnergyKind
    forces_n3: Array
    stress_6: Array | None
    extra: Mapping[str, Array] = field(default_factory=dict)


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


def with_label(atoms: Atoms, label: Label, *, extra: bool = False) -> Atoms:
    """A copy that holds the label as MACE reads it: REF_energy, REF_forces, REF_stress; with `extra` also what else it has."""
    labelled = atoms.copy()
    labelled.info["REF_energy"] = label.energy
    labelled.set_array("REF_forces", label.forces_n3)
    if label.stress_6 is not None:
        labelled.info["REF_stress"] = label.stress_6
    for name, values in label.extra.items() if extra else ():
        (labelled.arrays if EXTRA_SHAPES[name] is None else labelled.info)[f"REF_{name}"] = values
    return labelled


def compute_label(
    atoms: Atoms,
    calculator: Any,
    *,
    properties: Sequence[str] = (),
    energy: Literal["free", "extrapolated"] = "free",
) -> Label:
    """Energy, forces and stress from one reference calculation; LabelError if they are missing or impossible.

    Constraints of `atoms` do not act on the forces. `calculator` may be any ASE calculator; it is asked for
    all at once, with `properties` (see Label.extra) beside the three.
    """
    structure = plain_structure(atoms)
    check_geometry(structure)
    with calculator_errors(calculator):
        results = _calculate(structure, calculator, properties)
        _refuse_unconverged(calculator)
    value, kind = _energy(results, energy)
    forces_n3 = _array(results, "forces", (len(structure), 3))
    stress_6 = None if results.get("stress") is None else _voigt(results["stress"])
    per_atom = (len(structure),)
    extra = {name: _array(results, name, EXTRA_SHAPES[name] or per_atom) for name in properties}
    check_finite(value, forces_n3, stress_6, extra)
    check_net_force(forces_n3)
    return Label(value, kind, forces_n3, stress_6, extra)


def relax(
    atoms: Atoms,
    label_of: Callable[[Atoms], Label],
    fmax: float,
    max_steps: int,
    *,
    with_cell: bool = False,
) -> Relaxation:
    """Relax all atoms at fixed cell with BFGS to forces below `fmax` (eV/Å), in at most `max_steps`.

    `label_of` gives the label of each structure on the way; it may know some of them from an earlier attempt. BFGS
    decides by them alone, so the same labels lead the same way.

    `with_cell`: the cell relaxes too, at zero pressure, till the generalised forces of ASE's FrechetCellFilter are below
    `fmax` as well.

    LabelError if any calculation fails; not converging is no error but a result with `converged` False.
    """
    from ase.filters import FrechetCellFilter
    from ase.optimize.bfgs import BFGS

    start = plain_structure(atoms)
    check_geometry(start)
    moving = start.copy()
    labels: list[Label] = []

    def next_label(structure: Atoms) -> Label:
        labels.append(label_of(structure))
        return labels[-1]

    moving.calc = _Labelling(next_label)
    optimizer = BFGS(FrechetCellFilter(moving) if with_cell else moving, logfile=None)
    converged = False
    for converged_now in optimizer.irun(fmax=fmax, steps=max_steps):
        converged = bool(converged_now)
    return Relaxation(
        start=start,
        relaxed=plain_structure(moving),
        energy_start=labels[0].energy,
        energy_relaxed=labels[-1].energy,
        energy_kind=labels[-1].energy_kind,
        num_steps=int(optimizer.nsteps),
        converged=converged,
        max_force=float(np.linalg.norm(labels[-1].forces_n3, axis=1).max()),
    )


class _Labelling(Calculator):  # type: ignore[misc]  # ASE has no types
    """ASE's optimisers ask a calculator; this one answers with labels."""

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, label_of: Callable[[Atoms], Label]) -> None:
        super().__init__()
        self._label_of = label_of

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        assert atoms is not None
        super().calculate(atoms, properties, system_changes)
        label = self._label_of(atoms)
        if "stress" in (properties or ()) and label.stress_6 is None:
            raise LabelError("bad-input", "the reference gives no stress, without which a cell cannot relax")
        self.results = {"energy": label.energy, "free_energy": label.energy, "forces": label.forces_n3}
        if label.stress_6 is not None:
            self.results["stress"] = label.stress_6


def check_geometry(atoms: Atoms) -> None:
    """LabelError for a structure that no reference calculation should be started on."""
    if len(atoms) == 0:
        raise LabelError("geometry", "the structure has no atoms")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise LabelError(
            "geometry", f"the positions or the cell of {atoms.get_chemical_formula()} hold NaN or infinity"
        )
    for name in OPTIONAL_ARRAYS:
        if name in atoms.arrays and not np.isfinite(atoms.arrays[name]).all():
            raise LabelError("geometry", f"the {name} of {atoms.get_chemical_formula()} hold NaN or infinity")
    periodic_vectors = atoms.cell.array[atoms.pbc]
    if len(periodic_vectors) and np.linalg.matrix_rank(periodic_vectors) < len(periodic_vectors):
        raise LabelError(
            "geometry", f"the periodic cell vectors of {atoms.get_chemical_formula()} span no cell"
        )
    if (atoms.numbers < 1).any() or (atoms.numbers > 118).any():
        raise LabelError(
            "geometry", f"{atoms.get_chemical_formula()} holds an atomic number outside 1 to 118"
        )


def check_finite(
    energy: float, forces_n3: Array, stress_6: Array | None, extra: Mapping[str, Array] | None = None
) -> None:
    """LabelError with cause 'non-finite' naming what holds NaN or infinity."""
    named = {"energy": np.asarray(energy), "forces": forces_n3, "stress": stress_6, **(extra or {})}
    bad = [name for name, values in named.items() if values is not None and not np.isfinite(values).all()]
    if bad:
        raise LabelError(
            "non-finite", f"{' and '.join(bad)} hold NaN or infinity (energy {energy} eV); do atoms overlap?"
        )


def _calculate(atoms: Atoms, calculator: Any, extra: Sequence[str]) -> Mapping[str, Any]:
    """All properties from one call, because file-based codes would start anew for each."""
    wanted = ("energy", "forces", "stress", *extra)
    properties = [name for name in wanted if name in calculator.implemented_properties]
    if missing := set(extra) - set(properties):
        raise LabelError(
            "bad-input", f"{type(calculator).__name__} does not give {', '.join(sorted(missing))}"
        )
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
    if is_unconverged(calculator):
        raise LabelError("scf", f"the self-consistent field of {type(calculator).__name__} did not converge")


def _energy(results: Mapping[str, Any], which: Literal["free", "extrapolated"]) -> tuple[float, EnergyKind]:
    if which == "free" and results.get("free_energy") is not None:
        return float(results["free_energy"]), "free_energy"
    if results.get("energy") is not None:
        return float(results["energy"]), "energy"
    raise LabelError("calculator", "the calculator ended without an energy")


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

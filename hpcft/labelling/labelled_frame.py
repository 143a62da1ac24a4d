"""One labelled structure as some file holds it, and as training and label stores see it: checked, or refused with the reason.

Units: eV, Å; stress in eV/Å^3 with ASE's sign, Voigt order xx yy zz yz xz xy. Shape suffixes: n atoms, 3 directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from hpcft.errors import LabelError
from hpcft.labelling.label import check_finite, check_geometry
from hpcft.labelling.sanity import symmetric_voigt

Array = NDArray[np.float64]

ISOLATED_ATOM = "IsolatedAtom"
WEIGHTS = ("config_weight", "config_energy_weight", "config_forces_weight")
STRESS_WEIGHT, VIRIALS_WEIGHT = "config_stress_weight", "config_virials_weight"
# Where MACE and everybody who trains it put virials; there is no option for it.
VIRIALS_KEY = "REF_virials"
# What ASE moves from a file into a calculator, and what its readers of other codes' output put there.
_OF_CALCULATORS = ("energy", "free_energy", "forces", "stress")


@dataclass(frozen=True)
class LabelKeys:
    """The names of the labels in a file; `energy`, `free_energy`, `forces`, `stress` stand for a calculator's results."""

    energy: str = "REF_energy"
    forces: str = "REF_forces"
    stress: str = "REF_stress"


@dataclass(frozen=True, eq=False)
class Frame:
    """A structure and its labels as they were found: None where there is none, nothing checked.

    `virials` (eV) are what MACE calls so: -dE/d(strain), so that stress = -virials / volume
    (`mace.modules.utils.compute_forces_virials`). `weights` have the names of `config_weight` and its like.
    """

    structure: Atoms
    energy: Any
    forces: Any
    stress: Any = None
    virials: Any = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    config_type: str = ""


def frame_of(atoms: Atoms, keys: LabelKeys) -> Frame:
    """What stands under the keys of a structure that some file holds."""
    results = calculator_results(atoms)
    info = {**results, **atoms.info}
    weights = (*WEIGHTS, STRESS_WEIGHT, VIRIALS_WEIGHT)
    return Frame(
        structure=atoms,
        energy=info.get(keys.energy),
        forces=atoms.arrays.get(keys.forces, results.get(keys.forces)),
        stress=info.get(keys.stress),
        virials=info.get(VIRIALS_KEY),
        weights={name: atoms.info[name] for name in weights if name in atoms.info},
        config_type=str(atoms.info.get("config_type", "")),
    )


def calculator_results(atoms: Atoms) -> Mapping[str, Any]:
    """Stored results, raw: ASE's get_forces would zero those of fixed atoms."""
    results = {} if atoms.calc is None else atoms.calc.results
    return {name: results[name] for name in _OF_CALCULATORS if results.get(name) is not None}


def labelled_atoms(frame: Frame, origin: str) -> Atoms:
    """What training sees of a frame; LabelError says what is wrong with it.

    Info REF_energy, REF_stress (6, Voigt; absent where there is none or its weight is 0), `origin`, and config_type and the
    weights where the file has them; array REF_forces. Of what else `frame.structure` has, nothing. The forces of an isolated
    atom are zero if nobody gave them; a stress of one means nothing and is left out.
    """
    atoms = frame.structure
    check_geometry(atoms)
    is_isolated = len(atoms) == 1 and frame.config_type == ISOLATED_ATOM
    weights = _checked_weights(frame.weights)
    energy, forces_n3 = _energy(frame.energy), _forces(frame.forces, len(atoms), is_isolated)
    stress_6, stress_weight = (None, None) if is_isolated else _stress(frame, weights)
    check_finite(energy, forces_n3, stress_6)
    labelled = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    labelled.info = {"REF_energy": energy, "origin": origin}
    labelled.info |= {name: weights[name] for name in WEIGHTS if name in weights}
    if frame.config_type:
        labelled.info["config_type"] = frame.config_type
    if stress_6 is not None:
        labelled.info["REF_stress"] = stress_6
    if stress_6 is not None and stress_weight is not None:
        labelled.info[STRESS_WEIGHT] = stress_weight
    labelled.set_array("REF_forces", forces_n3)
    return labelled


def is_isolated_atom(atoms: Atoms) -> bool:
    """Whether this is one of the single atoms by which MACE's data sets give the elements' energies."""
    return len(atoms) == 1 and atoms.info.get("config_type") == ISOLATED_ATOM


def _energy(found: Any) -> float:
    if found is None:
        raise LabelError("missing", "it has no energy")
    energy = _numbers(found, "energy")
    if energy.size != 1:
        raise LabelError("shape", f"its energy has shape {energy.shape}, but must be one number")
    return float(energy.item())


def _forces(found: Any, num_atoms: int, is_isolated: bool) -> Array:
    if found is None and is_isolated:
        return np.zeros((1, 3))
    if found is None:
        raise LabelError("missing", "it has no forces")
    forces_n3 = _numbers(found, "forces")
    if forces_n3.shape != (num_atoms, 3):
        raise LabelError(
            "shape",
            f"its forces have shape {forces_n3.shape}, but must have {(num_atoms, 3)}: x, y, z of each atom",
        )
    return forces_n3


def _stress(frame: Frame, weights: Mapping[str, float]) -> tuple[Array | None, float | None]:
    """The stress, by way of the virials if only they are given, and its weight."""
    stress_weight, virials_weight = weights.get(STRESS_WEIGHT), weights.get(VIRIALS_WEIGHT)
    stress_6 = None if stress_weight == 0 else _voigt(frame.stress, "stress")
    virials_6 = None if stress_6 is not None or virials_weight == 0 else _voigt(frame.virials, "virials")
    if stress_6 is None and virials_6 is None:
        return None, None
    if not frame.structure.pbc.all():
        raise LabelError(
            "stress",
            f"it has a stress but is not periodic in three directions (pbc {frame.structure.pbc.tolist()}): remove the "
            "stress, or correct pbc",
        )
    if virials_6 is not None:
        return -virials_6 / frame.structure.get_volume(), virials_weight
    return stress_6, stress_weight


def _voigt(found: Any, what: str) -> Array | None:
    """Six components of a stress or virial given with six or nine; None for none, or for one that is all NaN."""
    if found is None:
        return None
    values = _numbers(found, what)
    if np.isnan(values).all():
        return None
    if values.shape == (6,):
        return values
    if values.shape in ((9,), (3, 3)):
        return symmetric_voigt(values.reshape(3, 3), what)
    raise LabelError(
        "shape",
        f"its {what} has shape {values.shape}, but must have 6 (xx, yy, zz, yz, xz, xy), 9 or 3 x 3 components",
    )


def _checked_weights(found: Mapping[str, Any]) -> dict[str, float]:
    weights = {}
    for name, value in found.items():
        weight = _numbers(value, name)
        if weight.size != 1 or not (np.isfinite(weight).all() and weight.item() >= 0):
            raise LabelError("weight", f"its {name} is {value}, but must be a number that is 0 or larger")
        weights[name] = float(weight.item())
    return weights


def _numbers(found: Any, what: str) -> Array:
    try:
        return np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        raise LabelError("shape", f"its {what} is {found!r:.50}, which is no number") from None

"""What a reference calculation will take, and who shall do it: structures of any sizes dealt out so that all are ready together.

A calculation with `a` atoms and `k` k-points takes about c a^p k seconds. The exponent p is that of the method until labels
tell better; the factor c matters only between single points and relaxations, which take a step's time for each step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.labelling.reference import Reference

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Plane waves and localised orbitals cost between the square and the cube of the number of atoms at the sizes that are labelled.
_DFT = frozenset(
    "espresso gpaw vasp cp2k aims orca abinit siesta castep elk exciting fleur nwchem octopus "  # noqa: SIM905 (20 lines)
    "onetep openmx psi4 qchem sparc turbomole".split()
)
_SEMI_EMPIRICAL = ("tblite", "xtb", "dftb", "mopac")
_EXPONENTS = {"dft": 3.0, "semi-empirical": 2.0, "classical": 1.0}
_LARGEST_EXPONENT = 4.0
# Fewer labels, or of sizes closer to each other than this factor, say nothing about the exponent.
_LEAST_LABELS = 8
_LEAST_SPREAD = 1.3
# A slope through so many points is as good as through all.
_MOST_POINTS = 400
_FEW_STEPS = 25.0
"""Steps of a relaxation while none has been seen."""


@dataclass(frozen=True)
class Seen:
    """What labels so far have taken, one row for each calculation that came to its end: [S] each."""

    num_atoms: Floats
    num_kpoints: Floats
    step_s: Floats
    """Seconds of a single point, or of a relaxation by its number of steps."""
    num_steps: Floats
    """Steps of the relaxations alone."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of a calculation, or, before any label is there, a number in proportion to them."""

    exponent: float
    factor: float = 1.0
    steps: float = _FEW_STEPS
    """Expected steps of a relaxation."""

    def single_points(self, num_atoms: Ints, num_kpoints: Ints) -> Floats:
        """[S]"""
        return np.asarray(self.factor * num_atoms.astype(float) ** self.exponent * num_kpoints, dtype=float)

    def relaxations(self, num_atoms: Ints, num_kpoints: Ints) -> Floats:
        """[S]"""
        return self.steps * self.single_points(num_atoms, num_kpoints)


def cost_model(reference: Reference, seen: Seen | None = None) -> CostModel:
    """What is known of the method, and over it what labels so far say."""
    model = CostModel(_EXPONENTS[_method(reference)])
    if seen is None:
        return model
    steps = float(np.mean(seen.num_steps)) if len(seen.num_steps) else model.steps
    is_sound = np.isfinite(seen.step_s) & (seen.step_s > 0) & (seen.num_atoms > 0)
    log_atoms = np.log(seen.num_atoms[is_sound])
    log_s = np.log(seen.step_s[is_sound] / seen.num_kpoints[is_sound])
    if not len(log_s):
        return CostModel(model.exponent, model.factor, max(1.0, steps))
    exponent = _slope(log_atoms, log_s)
    exponent = model.exponent if exponent is None else min(max(exponent, 0.0), _LARGEST_EXPONENT)
    factor = math.exp(float(np.median(log_s - exponent * log_atoms)))
    return CostModel(exponent, factor, max(1.0, steps))


def _slope(x: Floats, y: Floats) -> float | None:
    """Theil and Sen's: the median over all pairs, which single calculations on a slow node do not move."""
    if len(x) < _LEAST_LABELS or np.ptp(x) < math.log(_LEAST_SPREAD):
        return None
    # Evenly over the sizes: of many equal ones and a few others, the few tell the slope.
    order = np.argsort(x, kind="stable")[np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).astype(int))]
    dx, dy = (values[order][:, None] - values[order] for values in (x, y))
    pairs = dx > math.log(_LEAST_SPREAD) / 2
    return float(np.median(dy[pairs] / dx[pairs])) if pairs.any() else None


def _method(reference: Reference) -> str:
    words = reference.calculator.lower().replace("_", ".").split(".")
    if any(word in _DFT for word in words):
        return "dft"
    return "semi-empirical" if any(word in _SEMI_EMPIRICAL for word in words) else "classical"


def count_kpoints(reference: Reference, cell_s33: Floats, pbc_s3: NDArray[np.bool_]) -> Ints:
    """Points of each structure's mesh, symmetry left aside: of the fixed mesh, or of the one that a spacing gives. [S]"""
    mesh = _mesh(reference.arguments, cell_s33, pbc_s3)
    return np.asarray(np.prod(np.where(pbc_s3, mesh, 1), axis=1), dtype=np.int64)


def _mesh(arguments: Mapping[str, Any], cell_s33: Floats, pbc_s3: NDArray[np.bool_]) -> Ints:
    """[S, 3]; ones where the arguments say nothing that is understood."""
    num = len(cell_s33)
    fixed, per_spacing = _wish(arguments)
    if per_spacing is not None:
        points = np.ceil(_reciprocal_lengths(cell_s33, pbc_s3) * per_spacing - 1e-9)
        return np.asarray(np.maximum(1, points), dtype=np.int64)
    return np.broadcast_to(np.asarray(fixed, dtype=np.int64), (num, 3))


def _wish(arguments: Mapping[str, Any]) -> tuple[Sequence[int], float | None]:
    """A fixed mesh, or how many points one 1/Å of a reciprocal vector (without 2 pi) is worth."""
    kpts = arguments.get("kpts", arguments.get("k_grid"))
    density = _positive(arguments.get("k_grid_density"))
    if isinstance(kpts, Mapping):
        density, kpts = _positive(kpts.get("density")), kpts.get("size")
    # ASE's Espresso has the spacing without 2 pi, VASP with it; a density is points by 1/Å with it.
    is_espresso = "input_data" in arguments or "pseudopotentials" in arguments
    if (spacing := _positive(arguments.get("kspacing"))) is not None:
        return (1, 1, 1), (1.0 if is_espresso else 2 * math.pi) / spacing
    if density is not None:
        return (1, 1, 1), 2 * math.pi * density
    mesh = [_positive(n) for n in kpts] if isinstance(kpts, list | tuple) and len(kpts) == 3 else []
    return [max(1, int(n or 1)) for n in mesh] or (1, 1, 1), None


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _reciprocal_lengths(cell_s33: Floats, pbc_s3: NDArray[np.bool_]) -> Floats:
    """Lengths of the reciprocal vectors, without 2 pi, in 1/Å; [S, 3]. What is not periodic gets none, nor a damaged cell."""
    is_finite = np.isfinite(cell_s33).all(axis=(1, 2), keepdims=True)
    cell_s33 = np.where(is_finite, cell_s33, 0.0)
    lengths = np.zeros((len(cell_s33), 3))
    whole = pbc_s3.all(axis=1) & (np.abs(np.linalg.det(cell_s33)) > 1e-9)
    lengths[whole] = np.linalg.norm(np.linalg.inv(cell_s33[whole]), axis=1)
    for index in np.flatnonzero(~whole & pbc_s3.any(axis=1)):
        lengths[index] = np.linalg.norm(np.linalg.pinv(cell_s33[index] * pbc_s3[index][:, None]), axis=0)
    return lengths


def deal_out(cost_s: Sequence[float] | Floats, num_tasks: int) -> list[list[int]]:
    """Numbers of the items of each task: the dearest item first, each to the task that has least to do so far.

    (Longest processing time first: no later than 4/3 of the best, R. L. Graham, SIAM J. Appl. Math. 17, 416, 1969.) The same
    costs give the same tasks; equal ones are dealt out in turn.
    """
    costs = np.asarray(cost_s, dtype=float)
    order = np.argsort(-costs, kind="stable").tolist()
    tasks: list[list[int]] = [[] for _ in range(num_tasks)]
    loads = [(0.0, task) for task in range(num_tasks)]
    for item, cost in zip(order, costs[order].tolist(), strict=True):
        load, task = loads[0]
        tasks[task].append(item)
        heapq.heapreplace(loads, (load + cost, task))
    return tasks

"""Labels that are finite and complete, and wrong all the same: told by the other labels, and by what forces can be.

What a single label shows of itself (NaN, a net force) is refused where it is made, in `hpcft.labelling.label`. Above the
limits here a label is suspect, not proven wrong: it is set aside and listed, and a user may release it.

Units: eV, Å, eV/Å³. Shape suffixes: s labels, k elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.stress import full_3x3_to_voigt_6_stress
from ase.units import GPa
from numpy.typing import NDArray

from hpcft.errors import LabelError
from hpcft.labelling.energy_fit import energy_deviations, spread_of

if TYPE_CHECKING:
    from hpcft.labelling.label import Label
    from hpcft.labelling.label_table import LabelTable

Array = NDArray[Any]

# No potential and no reference has such forces, and no batch such an error of them (root mean square). In eV/Å.
ABSURD_FORCE = 1e3
# Twice the pressure in the centre of the Earth (800 GPa), in eV/Å³. Numbers above it are in kbar or GPa.
ABSURD_STRESS = 5.0

# An energy further than this from the sum of its elements' is no binding energy of what was labelled beside it ...
_WINDOW = 1.0  # eV/atom
_SPREADS = 20.0
# ... unless its forces say so: squeezed atoms are high in energy, and go down this far.
_REACH_OF_FORCES = 1.0  # Å
# A molecule in a box is no crystal of its formula; strained cells have volumes without such a gap between them.
_VOLUME_GAP = 2.0
_FEWEST_LABELS, _FEWEST_LABELS_PER_ELEMENT = 10, 3

# Two calculations of one structure with one reference differ by what its convergence leaves open.
_SAME_ENERGY = 1e-4  # eV/atom
_SAME_FORCE = 5e-3  # eV/Å
_SAME_STRESS = 1e-3  # eV/Å^3
_SYMMETRIC = 0.01  # of the largest component


def suspects(labels: LabelTable) -> dict[int, str]:
    """The rows of labels that look wrong, in order, each with the reason."""
    found: dict[int, str] = {}
    for test in (_absurd, _disagreeing, _implausible):
        for row, reason in test(labels):
            found.setdefault(row, reason)
    return dict(sorted(found.items()))


def _absurd(labels: LabelTable) -> Iterator[tuple[int, str]]:
    for row in np.flatnonzero(~(labels.max_forces_s <= ABSURD_FORCE)).tolist():
        yield (
            row,
            f"it has a force of {labels.max_forces_s[row]:.4g} eV/Å, and no reference gives more than {ABSURD_FORCE:g}",
        )
    for row in np.flatnonzero(labels.max_stresses_s > ABSURD_STRESS).tolist():
        yield row, absurd_stress(labels.max_stresses_s[row])
    for row in np.flatnonzero(~np.isfinite(labels.energies_s)).tolist():
        yield row, f"its energy is {labels.energies_s[row]}"


def absurd_stress(largest: float) -> str:
    """What is wrong with a label whose largest component of stress is above ABSURD_STRESS."""
    return f"it has a stress of {largest:.4g} eV/Å³ ({largest / GPa:.3g} GPa), more than {ABSURD_STRESS:g}: is it in kbar or GPa?"


def _disagreeing(labels: LabelTable) -> Iterator[tuple[int, str]]:
    """All labels of a structure that has different ones: which of them is right, nobody knows."""
    if not len(labels):
        return
    groups: dict[str, int] = {}
    groups_s = np.array([groups.setdefault(key, len(groups)) for key in labels.keys])
    order = np.argsort(groups_s, kind="stable")
    starts = np.flatnonzero(np.diff(groups_s[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    energies_s = labels.energies_s / np.maximum(labels.counts_sk.sum(axis=1), 1)

    def ranges(values_s: Array) -> Array:
        return np.maximum.reduceat(values_s[order], starts) - np.minimum.reduceat(values_s[order], starts)

    energies, forces = ranges(energies_s), ranges(labels.max_forces_s)
    for group in np.flatnonzero((energies > _SAME_ENERGY) | (forces > _SAME_FORCE)).tolist():
        rows = order[starts[group] : ends[group]]
        for row in rows.tolist():
            yield (
                row,
                f"the {len(rows)} labels of its structure differ by {energies[group]:.3g} eV/atom and {forces[group]:.3g} eV/Å",
            )


def _implausible(labels: LabelTable) -> Iterator[tuple[int, str]]:
    """Energies outside the window around a sum of energies per element that is fitted to all labels."""
    finite_s = np.flatnonzero(np.isfinite(labels.energies_s) & np.isfinite(labels.mean_forces_s))
    if len(finite_s) < max(_FEWEST_LABELS, _FEWEST_LABELS_PER_ELEMENT * len(labels.numbers_k)):
        return
    counts_sk = labels.counts_sk[finite_s]
    sizes_s = counts_sk.sum(axis=1)
    shares_sk = counts_sk / sizes_s[:, None]
    deviations_s = energy_deviations(
        labels.energies_s[finite_s] / sizes_s, lambda rows: shares_sk[rows], _WINDOW
    )
    window = max(_WINDOW, _SPREADS * spread_of(deviations_s))
    above_s = window + _REACH_OF_FORCES * labels.mean_forces_s[finite_s]
    outside_s = _is_outside(deviations_s, window, above_s)
    groups_s = _alike(labels)[finite_s]
    for group in np.unique(groups_s[outside_s]).tolist():
        rows = np.flatnonzero(groups_s == group)
        offs = deviations_s[rows] - _level(deviations_s[rows], window, above_s[rows])
        for at in np.flatnonzero(_is_outside(offs, window, above_s[rows])).tolist():
            limit = above_s[rows[at]] if offs[at] > 0 else window
            yield (
                int(finite_s[rows[at]]),
                f"its energy is off by {offs[at]:+.3g} eV/atom from what its elements have in the other labels, more than "
                f"{limit:.3g}",
            )


def _is_outside(deviations: Array, window: float, above: Array) -> NDArray[np.bool_]:
    """Too low, or higher than forces explain."""
    return np.asarray((deviations < -window) | (deviations > above))


def _alike(labels: LabelTable) -> NDArray[np.intp]:
    """A number [s] for each kind of structure: of one formula, periodic in as many directions, and of about one density."""
    kinds_s = np.unique(
        np.column_stack([labels.counts_sk, labels.num_periodic_s]), axis=0, return_inverse=True
    )[1].reshape(-1)
    order = np.lexsort((labels.volumes_s, kinds_s))
    ordered, volumes = kinds_s[order], labels.volumes_s[order]
    begins = np.zeros(len(order), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]) | (volumes[1:] > _VOLUME_GAP * volumes[:-1])
    groups_s = np.empty(len(order), dtype=np.intp)
    groups_s[order] = np.cumsum(begins)
    return groups_s


def _level(deviations: Array, window: float, above: Array) -> float:
    """What the labels of one kind are compared with.

    A kind of which every label is off (isolated atoms among crystals, molecules, the only oxide among metals) is unusual, not
    wrong. The level that suits most of its labels then says what is usual for it, so that never all of them are suspect.
    """
    if (np.abs(deviations) <= window).any():
        return 0.0
    lows, highs = np.sort(deviations - above), np.sort(deviations + window)
    ends = np.sort(np.concatenate([lows, highs]))
    levels = (ends[1:] + ends[:-1]) / 2
    num_suited = np.searchsorted(lows, levels, "right") - np.searchsorted(highs, levels, "left")
    best = levels[num_suited == num_suited.max()]
    return float(best[np.argmin(np.abs(best))])


def disagreement(one: Label, other: Label) -> str | None:
    """By how much two labels of the same structure differ, or None where they say the same."""
    found = []
    energy = abs(one.energy - other.energy) / len(one.forces_n3)
    if not energy <= _SAME_ENERGY:
        found.append(f"energy by {energy:.3g} eV/atom")
    force = float(np.abs(one.forces_n3 - other.forces_n3).max())
    if not force <= _SAME_FORCE:
        found.append(f"forces by up to {force:.3g} eV/Å")
    if one.stress_6 is not None and other.stress_6 is not None:
        stress = float(np.abs(one.stress_6 - other.stress_6).max())
        if not stress <= _SAME_STRESS:
            found.append(f"stress by up to {stress:.3g} eV/Å³")
    return " and ".join(found) or None


def symmetric_voigt(values_33: Array, what: str = "stress") -> NDArray[np.float64]:
    """Six components (xx, yy, zz, yz, xz, xy) of a symmetric tensor; LabelError if it is not symmetric."""
    asymmetry = float(np.abs(values_33 - values_33.T).max())
    if asymmetry > _SYMMETRIC * float(np.abs(values_33).max()) and np.isfinite(asymmetry):
        raise LabelError(
            "stress",
            f"its {what} is not symmetric: xy and yx, or others, differ by {asymmetry:.3g}; are components in another order?",
        )
    return np.asarray(full_3x3_to_voigt_6_stress(values_33), dtype=np.float64)

"""Labels that are finite and complete, and wrong all the same: told by the other labels, and by what forces can be.

What a single label shows of itself (NaN, a net force) is refused where it is made, in `hpcft.labelling.label`. Above the
limits here a label is suspect, not proven wrong: it is set aside and listed, and a user may release it.

Units: eV, Å. Shape suffixes: s labels, k elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from hpcft.errors import LabelError
from hpcft.labelling.energy_fit import energy_deviations, spread_of
from hpcft.storage.structures import read_columns

if TYPE_CHECKING:
    from hpcft.labelling.label import Label

Array = NDArray[Any]

# No potential and no reference has such forces, and no batch such an error of them (root mean square). In eV/Å.
ABSURD_FORCE = 1e3

# An energy further than this from the sum of its elements' is no binding energy of what was labelled beside it ...
_WINDOW = 1.0  # eV/atom
_SPREADS = 20.0
# ... unless its forces say so: squeezed atoms are high in energy, and go down this far.
_REACH_OF_FORCES = 1.0  # Å
_FEWEST_LABELS, _FEWEST_LABELS_PER_ELEMENT = 10, 3

# Two calculations of one structure with one reference differ by what its convergence leaves open.
_SAME_ENERGY = 1e-4  # eV/atom
_SAME_FORCE = 5e-3  # eV/Å
_SAME_STRESS = 1e-3  # eV/Å^3
_SYMMETRIC = 0.01  # of the largest component


@dataclass(frozen=True, eq=False)
class LabelTable:
    """What the tests need of many labels, as columns: labels of one reference, whose `keys` are equal for equal structures."""

    keys: Sequence[str]
    energies_s: Array
    max_forces_s: Array
    mean_forces_s: Array
    numbers_k: Array
    counts_sk: Array
    """How many atoms of which element."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, keys: Sequence[str], structures: Sequence[Atoms]) -> LabelTable:
        """The table of structures with REF_energy and REF_forces."""
        offsets = np.cumsum([0, *map(len, structures)])
        return cls._from_columns(
            keys,
            np.array([atoms.info["REF_energy"] for atoms in structures], dtype=float),
            np.concatenate([np.empty((0, 3)), *(atoms.arrays["REF_forces"] for atoms in structures)]),
            np.concatenate([np.empty(0, int), *(atoms.numbers for atoms in structures)]),
            offsets,
        )

    @classmethod
    def read(cls, path: Path) -> LabelTable:
        """The table of a shard's labels.h5, without making a structure of any of them."""
        wanted = ("info/key", "info/REF_energy", "arrays/REF_forces", "numbers", "offsets")
        keys, *columns = read_columns(path, wanted)
        return cls._from_columns(keys.tolist(), *columns)

    @classmethod
    def _from_columns(
        cls, keys: Sequence[str], energies_s: Array, forces_n3: Array, numbers_n: Array, offsets: Array
    ) -> LabelTable:
        numbers_k, elements_n = np.unique(numbers_n, return_inverse=True)
        sizes = np.diff(offsets)
        rows_n = np.repeat(np.arange(len(sizes)), sizes)
        counts_sk = np.zeros((len(sizes), len(numbers_k)), dtype=int)
        np.add.at(counts_sk, (rows_n, elements_n), 1)
        magnitudes_n = np.linalg.norm(forces_n3, axis=1)
        largest_s, sums_s = np.zeros(len(sizes)), np.zeros(len(sizes))
        np.maximum.at(largest_s, rows_n, magnitudes_n)
        np.add.at(sums_s, rows_n, magnitudes_n)
        return cls(list(keys), energies_s, largest_s, sums_s / np.maximum(sizes, 1), numbers_k, counts_sk)

    @classmethod
    def joined(cls, tables: Sequence[LabelTable]) -> LabelTable:
        """One table of several, in their order."""
        numbers_k = np.unique(np.concatenate([np.empty(0, int), *(table.numbers_k for table in tables)]))
        counts = []
        for table in tables:
            counts_sk = np.zeros((len(table), len(numbers_k)), dtype=int)
            counts_sk[:, np.searchsorted(numbers_k, table.numbers_k)] = table.counts_sk
            counts.append(counts_sk)

        def column(name: str) -> Array:
            return np.concatenate([np.empty(0), *(getattr(table, name) for table in tables)])

        return cls(
            [key for table in tables for key in table.keys],
            column("energies_s"),
            column("max_forces_s"),
            column("mean_forces_s"),
            numbers_k,
            np.concatenate([np.zeros((0, len(numbers_k)), dtype=int), *counts]),
        )


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
    for row in np.flatnonzero(~np.isfinite(labels.energies_s)).tolist():
        yield row, f"its energy is {labels.energies_s[row]}"


def _disagreeing(labels: LabelTable) -> Iterator[tuple[int, str]]:
    """All labels of a structure that has different ones: which of them is right, nobody knows."""
    _, groups_s, sizes = np.unique(np.array(labels.keys, dtype=str), return_inverse=True, return_counts=True)
    energies_s = labels.energies_s / np.maximum(labels.counts_sk.sum(axis=1), 1)
    repeated_s = np.flatnonzero(sizes[groups_s] > 1)
    for group in np.unique(groups_s[repeated_s]).tolist():
        rows = repeated_s[groups_s[repeated_s] == group]
        energy, force = np.ptp(energies_s[rows]), np.ptp(labels.max_forces_s[rows])
        if energy > _SAME_ENERGY or force > _SAME_FORCE:
            for row in rows.tolist():
                yield (
                    row,
                    f"the {len(rows)} labels of its structure differ by {energy:.3g} eV/atom and {force:.3g} eV/Å",
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
    formulas_s = np.unique(counts_sk, axis=0, return_inverse=True)[1].reshape(-1)
    for formula in np.unique(formulas_s[outside_s]).tolist():
        rows = np.flatnonzero(formulas_s == formula)
        offs = deviations_s[rows] - _level(deviations_s[rows], outside_s[rows])
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


def _level(deviations: Array, outside: Array) -> float:
    """What the labels of one formula are compared with.

    A formula of which every label is off (isolated atoms among crystals, the only oxide among metals) is unusual, not wrong:
    the middle one of its labels then says what is usual for it, so that never all of them are suspect.
    """
    if not outside.all():
        return 0.0
    return float(deviations[np.argsort(np.abs(deviations))[(len(deviations) - 1) // 2]])


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

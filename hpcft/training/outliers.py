"""Labels that would spoil a training: forces that are too large, energies that cannot belong to their data set.

Shape suffixes: s structures, k elements.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from hpcft.errors import UserError
from hpcft.labelling.energy_fit import energy_deviations, spread_of
from hpcft.labelling.labelled_frame import is_isolated_atom
from hpcft.labelling.sanity import ABSURD_FORCE

Array = NDArray[np.float64]

# An energy is judged by what is usual in its own file: a file of dimers or of two codes varies a lot.
_SPREADS = 50.0


@dataclass(frozen=True)
class OutlierPolicy:
    """Which labels are left out, and how many may be before the data as a whole is refused.

    `max_force`: largest force on any atom, eV/Å. Below training's ABSURD_FORCE, above which no label can be right: 50 eV/Å
    is what atoms feel that nearly touch, and a few such labels rule the gradient of all others.
    `max_energy`: largest deviation, eV/atom, of an energy from a sum of energies per element fitted to its file; widened to
    50 times the usual deviation there. `max_share`: outliers among all structures; with more, UserError. Unless it is
    zero, one is left out of the smallest data too.
    """

    max_force: float = 50.0
    max_energy: float = 100.0
    max_share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.max_force <= ABSURD_FORCE:
            raise UserError(
                f"The largest force of the training data is {self.max_force} eV/Å, but must lie between 0 and "
                f"{ABSURD_FORCE:g}, more than which no reference gives."
            )
        if not self.max_energy > 0:
            raise UserError(
                f"The largest deviation of an energy is {self.max_energy} eV/atom, but must be above 0."
            )
        if not 0 <= self.max_share < 1:
            raise UserError(
                f"The largest share of outliers is {self.max_share}, but must be from 0 to less than 1."
            )

    def tolerated(self, num_structures: int) -> int:
        """How many outliers may be left out; never all structures."""
        if self.max_share == 0:
            return 0
        return min(max(1, int(self.max_share * num_structures)), num_structures - 1)


@dataclass(frozen=True)
class Outlier:
    """Structure `index` of those that were looked at; `excess` is how many times the limit it has."""

    index: int
    reason: str
    excess: float


class LabelColumns:
    """What is kept of every structure for these tests: some forty bytes."""

    def __init__(self) -> None:
        self._energies, self._max_forces = array("d"), array("d")
        self._sizes, self._is_isolated = array("q"), array("b")
        self._num_elements, self._elements, self._counts = array("q"), array("B"), array("q")

    def add(self, atoms: Atoms) -> None:
        """Take note of a structure of `labelled_atoms`."""
        counts = np.bincount(atoms.numbers)
        elements = np.flatnonzero(counts)
        self._energies.append(atoms.info["REF_energy"])
        self._max_forces.append(float(np.linalg.norm(atoms.arrays["REF_forces"], axis=1).max()))
        self._sizes.append(len(atoms))
        self._is_isolated.append(is_isolated_atom(atoms))
        self._num_elements.append(len(elements))
        self._elements.extend(elements.tolist())
        self._counts.extend(counts[elements].tolist())

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def num_atoms_each(self) -> list[int]:
        return self._sizes.tolist()

    def elements(self, left_out: Sequence[int]) -> set[int]:
        """Atomic numbers in all structures but some."""
        kept_s = np.ones(len(self), dtype=bool)
        kept_s[list(left_out)] = False
        return set(np.array(self._elements)[np.repeat(kept_s, np.array(self._num_elements))].tolist())

    def outliers(self, policy: OutlierPolicy) -> list[Outlier]:
        """Structures whose forces or energy training would not survive, in order, each once."""
        forces_s = np.array(self._max_forces)
        found = [
            Outlier(
                int(i),
                f"has a force of {forces_s[i]:.4g} eV/Å, above {policy.max_force:g}",
                float(forces_s[i] / policy.max_force),
            )
            for i in np.flatnonzero(forces_s > policy.max_force)
        ]
        # Isolated atoms lie above all bound ones by the cohesive energy, and have a label each, not a spread.
        regular_s = np.flatnonzero((forces_s <= policy.max_force) & (np.array(self._is_isolated) == 0))
        deviations_s, limit = self._energy_deviations(regular_s, policy.max_energy)
        found += [
            Outlier(
                int(regular_s[row]),
                f"has an energy that deviates by {deviations_s[row]:+.4g} eV/atom from what its elements have in "
                f"the other structures, more than {limit:.4g}",
                float(abs(deviations_s[row]) / limit),
            )
            for row in np.flatnonzero(np.abs(deviations_s) > limit)
        ]
        return sorted(found, key=lambda outlier: outlier.index)

    def _energy_deviations(self, chosen_s: NDArray[np.int64], max_energy: float) -> tuple[Array, float]:
        """Residuals [s] (eV/atom) of a fit of energies per element, and the limit for them."""
        if not len(chosen_s):
            return np.empty(0), max_energy
        energies_s = np.array(self._energies)[chosen_s] / np.array(self._sizes)[chosen_s]
        num_elements = int(max(self._elements)) + 1
        deviations_s = energy_deviations(
            energies_s, lambda rows: self._shares(chosen_s[rows], num_elements), max_energy
        )
        return deviations_s, max(max_energy, _SPREADS * spread_of(deviations_s))

    def _shares(self, chosen_s: NDArray[np.int64], num_elements: int) -> Array:
        """Which share of each structure's atoms is of which element: [s, k]."""
        ends = np.cumsum(np.array(self._num_elements))
        lengths = np.array(self._num_elements)[chosen_s]
        starts = ends[chosen_s] - lengths
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        pairs = np.repeat(starts, lengths) + within
        rows, columns = np.repeat(np.arange(len(chosen_s)), lengths), np.array(self._elements)[pairs]
        shares_sk: Array = np.zeros((len(chosen_s), num_elements))
        shares_sk[rows, columns] = np.array(self._counts)[pairs]
        shares_sk /= np.array(self._sizes)[chosen_s][:, None]
        return shares_sk

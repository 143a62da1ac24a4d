"""Labelled structures in files: found, checked in full before anything is paid for, and read when they are needed.

    source = open_labelled([Path("a.extxyz"), Path("labels.h5")])
    source[0].info["REF_energy"], source[0].arrays["REF_forces"]

Units: eV, Å; stress in eV/Å^3 with ASE's sign, Voigt order xx yy zz yz xz xy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from hpcft.errors import LabelError, UserError
from hpcft.labelling.labelled_frame import LabelKeys, labelled_atoms
from hpcft.training.outliers import LabelColumns, Outlier, OutlierPolicy
from hpcft.training.source_files import SourceFile, find_files

__all__ = ["LabelledSource", "OutlierPolicy", "open_labelled"]

_DEFAULT_POLICY = OutlierPolicy()
_DEFAULT_KEYS = LabelKeys()
_SHOWN = 5


class LabelledSource(Sequence[Atoms]):
    """Structures with labels that have passed all checks, each read anew when it is asked for.

    Of HDF5 files it holds no structure, however many there are; those of other files stay in memory. It may be used after
    fork and may be pickled, but by one thread at a time.

    Info: REF_energy; REF_stress (6,) where it is known; `origin`, the frame and the file; config_type, config_weight,
    config_energy_weight, config_forces_weight, config_stress_weight where the file has them. Arrays: REF_forces (n, 3).
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        kept: NDArray[np.int64],
        num_atoms_each: list[int],
        elements: set[int],
        dropped: list[str],
    ) -> None:
        """`kept` are the structures that count, numbered through all files."""
        self._files = list(files)
        self._starts = _starts(files)
        self._kept = kept
        self.num_atoms_each = num_atoms_each
        self.elements = elements
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Atoms: ...
    @overload
    def __getitem__(self, index: slice) -> list[Atoms]: ...
    def __getitem__(self, index: int | slice) -> Atoms | list[Atoms]:
        if isinstance(index, slice):
            return [self._atoms(number) for number in self._kept[index].tolist()]
        return self._atoms(int(self._kept[index]))

    def _atoms(self, number: int) -> Atoms:
        which = bisect_right(self._starts, number) - 1
        file, index = self._files[which], number - self._starts[which]
        name = _name(file, index)
        try:
            return labelled_atoms(file.frame(index), name)
        except LabelError as error:
            raise UserError(
                f"{name} was sound when training began, and now {error}; the file has been changed. Start again."
            ) from error


def open_labelled(
    paths: Sequence[Path],
    *,
    outliers: OutlierPolicy = _DEFAULT_POLICY,
    energy_key: str = _DEFAULT_KEYS.energy,
    forces_key: str = _DEFAULT_KEYS.forces,
    stress_key: str = _DEFAULT_KEYS.stress,
) -> LabelledSource:
    """The labelled structures of all paths, in their order; every label is read and checked here, once.

    A path is a file that ASE reads, a structure file of hpcft, a file of `mace_prepare_data`, a folder of such HDF5 files,
    or a label shard of hpcft or a folder of them. The keys are those of the files that ASE reads; `energy`, `free_energy`,
    `forces` and `stress` then mean what ASE keeps as results of a calculator.

    Raises UserError, naming file and frame, for data that cannot be read or trained on, and for more outliers than
    `outliers` allows; those it allows are left out and listed in `dropped`.
    """
    if not paths:
        raise UserError("No training data was named; give at least one file.")
    keys = LabelKeys(energy_key, forces_key, stress_key)
    files: list[SourceFile] = []
    num_atoms_each: list[int] = []
    elements: set[int] = set()
    found: list[Outlier] = []
    for path in paths:
        of_path = find_files(path, keys)
        columns = _scan(path, of_path)
        first = len(num_atoms_each)
        here = columns.outliers(outliers)
        found += [Outlier(first + o.index, o.reason, o.excess) for o in here]
        elements |= columns.elements([o.index for o in here])
        files += of_path
        num_atoms_each += columns.num_atoms_each
    dropped = _refuse_too_many(files, found, len(num_atoms_each), outliers)
    kept = np.delete(np.arange(len(num_atoms_each)), [o.index for o in found])
    return LabelledSource(files, kept, [num_atoms_each[i] for i in kept.tolist()], elements, dropped)


def _scan(path: Path, files: Sequence[SourceFile]) -> LabelColumns:
    """Read all labels of a path; UserError that names the frames that no training can use."""
    columns, faults = LabelColumns(), []
    for file in files:
        for index, frame in enumerate(file.frames()):
            try:
                columns.add(labelled_atoms(frame, ""))
            except LabelError as error:
                faults.append(f"{_name(file, index)}: {error}")
    num_frames = len(columns) + len(faults)
    if num_frames == 0:
        raise UserError(f"{path} holds no labelled structure; give data with at least one.")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UserError(
            f"{len(faults)} of {num_frames} structures of {path} cannot be trained on. {'; '.join(faults[:_SHOWN])}{more}. "
            "Correct these frames, or remove them from the file."
        )
    return columns


def _refuse_too_many(
    files: Sequence[SourceFile], found: Sequence[Outlier], num_structures: int, policy: OutlierPolicy
) -> list[str]:
    """What is said about each outlier, if they are few enough to be left out."""
    starts = _starts(files)

    def describe(outlier: Outlier) -> str:
        which = bisect_right(starts, outlier.index) - 1
        return f"{_name(files[which], outlier.index - starts[which])} {outlier.reason}"

    if len(found) > policy.tolerated(num_structures):
        worst = max(found, key=lambda outlier: outlier.excess)
        raise UserError(
            f"{len(found)} of {num_structures} labelled structures are outliers, more than {policy.max_share:.3g} of them. The "
            f"worst: {describe(worst)}. Check the units (eV, eV/Å) and what the reference did there; remove these frames, or, "
            f"if the labels are right, allow larger forces with the key max_force ({policy.max_force:g} eV/Å) or more outliers "
            f"with max_outliers ({policy.max_share:g} of all) in the YAML file of hpcft train --config."
        )
    return [describe(outlier) for outlier in found]


def _starts(files: Sequence[SourceFile]) -> list[int]:
    """The number of the first structure of each file."""
    return [0, *accumulate(len(file) for file in files)][:-1]


def _name(file: SourceFile, index: int) -> str:
    return f"frame {index} of {file.path}"

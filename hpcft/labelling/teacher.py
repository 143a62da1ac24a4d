"""A larger MACE model as teacher: an ASE calculator around any model file that hpcft can load."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols

from hpcft.errors import UserError
from hpcft.models.files import elements_of_file, load_model
from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate, frozen

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Teacher(Calculator):  # type: ignore[misc]  # ASE is untyped
    """Energy, forces and stress of a model; its energy is the one from which the forces derive."""

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self._potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        model = self._potential
        graph = build_graph([self.atoms], model.cutoff, dtype=dtype_of(model), device=device_of(model))
        with frozen(model):
            found = evaluate(model, graph, stress="stress" in properties)
        energy = float(found.energies_b[0])
        forces_n3 = found.forces_n3.double().cpu().numpy()
        self.results = {"energy": energy, "free_energy": energy, "forces": forces_n3}
        if found.stress_b33 is not None:
            stress_33 = found.stress_b33[0].double().cpu().numpy()
            self.results["stress"] = stress_33.ravel()[[0, 4, 8, 5, 2, 1]]


def mace(model: str, dtype: str = "float64", device: str = "cpu") -> Teacher:
    """The teacher in the file `model`, which is read once per process.

    UserError for a missing or damaged file, and for a pickled one that was not imported (`hpcft model import`).
    """
    if dtype not in _DTYPES:
        raise UserError(f"the teacher's dtype is {dtype!r}; write {' or '.join(_DTYPES)}")
    path = Path(model).expanduser()
    return Teacher(_loaded(path, _version(path), dtype, device))


def elements_of_teacher(model: str, **_: Any) -> set[str]:
    """Chemical symbols that the model in a file knows."""
    path = Path(model).expanduser()
    return {chemical_symbols[number] for number in _elements(path, _version(path))}


def _version(path: Path) -> tuple[int, int, int] | None:
    """Another one whenever the file is another; None where there is none, which the loading says."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, version: tuple[int, int, int] | None, dtype: str, device: str) -> Potential:
    return load_model(path, dtype=_DTYPES[dtype], device=device)


@functools.lru_cache(maxsize=1)
def _elements(path: Path, version: tuple[int, int, int] | None) -> frozenset[int]:
    return frozenset(elements_of_file(path))

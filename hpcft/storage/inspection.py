"""What is in an HDF5 file, as a dictionary for tables and JSON; and whether it still is what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.symbols import Symbols

from hpcft.errors import UserError
from hpcft.storage.hdf5 import kind_of, open_file
from hpcft.storage.seal import SEAL_BYTES, DamagedFile, check_seal
from hpcft.storage.segments import read_segment, segment_files, segment_folders
from hpcft.storage.soundness import hdf5_files, is_hdf5
from hpcft.storage.structures import read_structures
from hpcft.storage.trajectory import Trajectory
from hpcft.storage.tree import Array, is_dataset, read_attributes

# A trajectory of hundreds of gigabytes is not read in full to be shown; this much takes a second.
_MOST_COMPARED_BYTES = 1 << 28


def inspect_file(path: Path) -> dict[str, Any]:
    """Kind, size, provenance and datasets of any HDF5 file, and what hpcft's own kinds hold, summarised.

    Raises UserError for a file that is missing, damaged or no HDF5 at all.
    """
    _check_is_hdf5(path)
    kind = kind_of(path)
    with open_file(path, verify=kind in ("segment", "structures")) as file:  # which are read in full below
        report: dict[str, Any] = {"path": str(path), "kind": kind, "num_bytes": path.stat().st_size}
        report["warnings"] = _doubts(path, kind, file)
        report["provenance"] = read_attributes(file["provenance"]) if "provenance" in file else {}
        report["datasets"] = _list_datasets(file)
    if kind == "trajectory":
        report["replicas"] = _summarise_trajectory(path)
    elif kind == "segment":
        report["replicas"] = _summarise_segment(path)
    elif kind == "structures":
        report["structures"] = _summarise_structures(path)
    return report


def _check_is_hdf5(path: Path) -> None:
    if path.is_dir():
        found = [*hdf5_files(path), *(file for run in segment_folders(path) for file in segment_files(run))]
        example = f", such as {found[0]}" if found else "; of a campaign docs/files.md lists them"
        raise UserError(f"{path} is a folder; name an HDF5 file in it{example}")
    if path.is_file() and not is_hdf5(path):
        raise UserError(
            f"{path} is no HDF5 file, and inspect shows only these; a model is described by: hpcft model info {path}"
        )


def _doubts(path: Path, kind: str, file: Any) -> list[str]:
    """Why the file may not be what was written, though it can be read. Segments and structures are refused then."""
    if kind == "other":
        is_ours = file.userblock_size == SEAL_BYTES and "provenance" in file
        return [f"{path} has lost hpcft's seal, so nobody can say whether it is what was written"] * is_ours
    if path.stat().st_size > _MOST_COMPARED_BYTES:
        return []
    try:
        check_seal(path)
    except DamagedFile as error:
        return [f"{error} What can be proven of it: hpcft verify {path}"]
    return []


def verify_file(path: Path) -> str:
    """The kind of a file of hpcft that is bit for bit what was written; DamagedFile for any other."""
    return check_seal(path).kind


def _list_datasets(file: Any) -> list[dict[str, Any]]:
    datasets: list[dict[str, Any]] = []

    def add(name: str, node: Any) -> None:
        if is_dataset(node):
            unit = node.attrs.get("unit")
            entry: dict[str, Any] = {"name": f"/{name}", "shape": list(node.shape)}
            entry["dtype"] = "string" if node.dtype == object else str(node.dtype)
            entry["unit"] = None if unit is None else str(unit)
            datasets.append(entry)

    file.visititems(add)
    return datasets


def _summarise_trajectory(path: Path) -> list[dict[str, Any]]:
    names = ("numbers", "step", "time_fs", "potential_energy", "temperature_K")
    with Trajectory(path) as trajectory:
        summaries = []
        for replica in trajectory.replicas:
            arrays = {name: trajectory.array(replica, name) for name in names}
            if "sane" in trajectory.observable_names(replica):
                arrays["sane"] = trajectory.array(replica, "sane")
            summaries.append({"replica": replica, **_summarise_replica(arrays)})
        return summaries


def _summarise_segment(path: Path) -> list[dict[str, Any]]:
    blocks, _ = read_segment(path)
    arrays = {block.replica: block.static() | block.per_frame() | block.observables for block in blocks}
    return [{"replica": replica, **_summarise_replica(own)} for replica, own in arrays.items()]


def _summarise_replica(arrays: dict[str, Array]) -> dict[str, Any]:
    step, time_fs = arrays["step"], arrays["time_fs"]
    has_frames = len(step) > 0
    return {
        "num_atoms": len(arrays["numbers"]),
        "formula": Symbols(arrays["numbers"]).get_chemical_formula(),
        "num_frames": len(step),
        "first_step": int(step[0]) if has_frames else None,
        "last_step": int(step[-1]) if has_frames else None,
        "first_time_fs": float(time_fs[0]) if has_frames else None,
        "last_time_fs": float(time_fs[-1]) if has_frames else None,
        "potential_energy_eV": _range(arrays["potential_energy"]),
        "temperature_K": _range(arrays["temperature_K"]),
        "num_flagged_frames": int(np.sum(~arrays["sane"].astype(bool))) if "sane" in arrays else 0,
    }


def _summarise_structures(path: Path) -> dict[str, Any]:
    structures = read_structures(path)
    energies = [
        atoms.info["REF_energy"] / len(atoms)
        for atoms in structures
        if "REF_energy" in atoms.info and len(atoms)
    ]
    forces = [
        np.linalg.norm(atoms.arrays["REF_forces"], axis=1)
        for atoms in structures
        if "REF_forces" in atoms.arrays
    ]
    sizes = [len(atoms) for atoms in structures]
    return {
        "num_structures": len(structures),
        "num_atoms": {"min": min(sizes, default=None), "max": max(sizes, default=None), "total": sum(sizes)},
        "elements": sorted({symbol for atoms in structures for symbol in atoms.symbols}),
        "energy_per_atom_eV": _range(np.array(energies)),
        "max_force_eV_per_Angstrom": _range(np.concatenate(forces))["max"] if forces else None,
        **_summarise_relaxations(structures),
    }


# Of relaxations by a reference or a model, which have no labels: what is in `info`, and what it is called here.
_ENERGIES = {
    "energy_start": "start_energy_per_atom_eV",
    "energy_relaxed": "relaxed_energy_per_atom_eV",
    "model_energy": "model_energy_per_atom_eV",
}
_VALUES = {"num_steps": "num_steps", "steps": "num_steps", "max_force": "max_force_eV_per_Angstrom"}


def _summarise_relaxations(structures: Sequence[Atoms]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name, title in {**_ENERGIES, **_VALUES}.items():
        having = [atoms for atoms in structures if name in atoms.info and len(atoms)]
        if having:
            sizes = [len(atoms) if name in _ENERGIES else 1 for atoms in having]
            summary[title] = _range(np.array([atoms.info[name] for atoms in having]) / np.array(sizes))
    if any("converged" in atoms.info for atoms in structures):
        summary["num_converged"] = sum(bool(atoms.info.get("converged")) for atoms in structures)
    return summary


def _range(values: Array) -> dict[str, float | None]:
    """Minimum, mean and maximum of the finite values; JSON has no NaN, and an exploded replica has."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return {"min": None, "mean": None, "max": None}
    return {"min": float(finite.min()), "mean": float(finite.mean()), "max": float(finite.max())}

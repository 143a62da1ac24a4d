"""Where a replica's data stand below its H5MD root, and in which unit: one table for writer and reader.

H5MD 1.1 (https://nongnu.org/h5md) as MDAnalysis 2.11 and znh5md 0.4.8 read it, which ask for more than the
standard does: species, mass and pbc repeated for each frame (znh5md), the plural `forces` (MDAnalysis refuses
`force` in eV/Å), this spelling of units, and observables in a group with the name of the particles group.
"""

from __future__ import annotations

from hpcft.storage.tree import encode_name

PARTICLES = "particles/trajectory"
OBSERVABLES = "observables/trajectory"

STEP = f"{PARTICLES}/position/step"
TIME = f"{PARTICLES}/position/time"

PER_FRAME: dict[str, tuple[str, str | None]] = {
    "positions": (f"{PARTICLES}/position", "Angstrom"),
    "velocities": (f"{PARTICLES}/velocity", "Angstrom fs-1"),
    "forces": (f"{PARTICLES}/forces", "eV Angstrom-1"),
    "cell": (f"{PARTICLES}/box/edges", "Angstrom"),
    "potential_energy": (f"{OBSERVABLES}/potential_energy", "eV"),
    "temperature_K": (f"{OBSERVABLES}/temperature", "K"),
}
"""Element and unit by the name of the field in FrameBlock; step and time are shared by all elements."""

STATIC: dict[str, tuple[str, str | None]] = {
    "numbers": (f"{PARTICLES}/species", None),
    "masses": (f"{PARTICLES}/mass", "u"),
    "pbc": (f"{PARTICLES}/box/pbc", None),
}


def replica_path(replica: int) -> str:
    """The H5MD root of a replica."""
    return f"/replicas/{replica:04d}"


def observable_path(name: str) -> str:
    """The H5MD element of an observable."""
    return f"{OBSERVABLES}/{encode_name(name)}"


def dataset_path(name: str) -> str:
    """The dataset of a field of FrameBlock or of an observable."""
    if name in ("step", "time_fs"):
        return STEP if name == "step" else TIME
    element, _ = (PER_FRAME | STATIC).get(name, (observable_path(name), None))
    return f"{element}/value"

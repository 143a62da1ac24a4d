"""Small outputs of VASP, with just what ASE's readers ask for; and one that pw.x wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

PWO = Path(__file__).parent / "recorded" / "relaxation-of-silicon.pwo"
"""A relaxation of two silicon atoms by Quantum ESPRESSO 6.7 in four steps; its list of times is cut off."""

EV_PER_A3_IN_KBAR = 1602.1766208


def vasprun(structures: Sequence[Atoms], num_scf_steps: Sequence[int], nelm: int = 60) -> str:
    """A vasprun.xml with one ionic step per structure; energies 0.05 eV above the free ones."""
    first = structures[0]
    atoms = "".join(f"<rc><c>{symbol}</c><c>1</c></rc>" for symbol in first.get_chemical_symbols())
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n'
        f'<parameters><separator name="electronic"><i type="int" name="NELM">{nelm}</i></separator></parameters>\n'
        f'<atominfo><array name="atoms"><set>{atoms}</set></array></atominfo>\n'
        '<kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>\n'
        + _structure(first, ' name="initialpos"')
        + "\n"
        + "\n".join(_calculation(a, n) for a, n in zip(structures, num_scf_steps, strict=True))
        + "\n</modeling>\n"
    )


def _calculation(atoms: Atoms, num_scf_steps: int) -> str:
    free = atoms.info["REF_energy"]
    energy = (
        f'<energy><i name="e_fr_energy">{free:.8f}</i><i name="e_0_energy">{free + 0.05:.8f}</i></energy>'
    )
    forces = _varray("forces", atoms.arrays["REF_forces"])
    steps = f"<scstep>{energy}</scstep>" * num_scf_steps
    return f"<calculation>{steps}{_structure(atoms)}{forces}{energy}</calculation>"


def _structure(atoms: Atoms, name: str = "") -> str:
    crystal = f"<crystal>{_varray('basis', atoms.cell.array)}</crystal>"
    return f"<structure{name}>{crystal}{_varray('positions', atoms.get_scaled_positions(wrap=False))}</structure>"


def _varray(name: str, rows: np.ndarray) -> str:
    return (
        f'<varray name="{name}">'
        + "".join(f"<v>{x:.12f} {y:.12f} {z:.12f}</v>" for x, y, z in rows)
        + "</varray>"
    )


def outcar(structures: Sequence[Atoms], converged: Sequence[bool]) -> str:
    """An OUTCAR of structures of one element with one ionic step each; energies 0.05 eV above the free ones."""
    first = structures[0]
    symbol = first.get_chemical_symbols()[0]
    header = (
        f" vasp.6.4.2 20Jul23\n POTCAR:    PAW_PBE {symbol} 05Jan2001\n POTCAR:    PAW_PBE {symbol} 05Jan2001\n"
        f"   ions per type = {len(first)}\n   k-points  NKPTS = 1   k-points in BZ  NKDIM = 1  number of bands  NBANDS= 8\n"
        " k-points in reciprocal lattice and weights: gamma\n   0.0  0.0  0.0  1.0\n"
        "   ISPIN  =      1    spin polarized calculation?\n"
    )
    return header + "".join(_ionic_step(a, c) for a, c in zip(structures, converged, strict=True))


def _ionic_step(atoms: Atoms, converged: bool) -> str:
    said = "because EDIFF is reached" if converged else "EDIFF was not reached (unconverged)"
    stress = -atoms.info["REF_stress"][[0, 1, 2, 5, 3, 4]] * EV_PER_A3_IN_KBAR
    free = atoms.info["REF_energy"]
    rows = np.hstack([atoms.positions, atoms.arrays["REF_forces"]])
    lines = [
        "--------------------------------------- Iteration      1(   1)  -----------------------------------",
        f"------------------------ aborting loop {said} ----------------------------------------",
        "  in kB  " + " ".join(f"{x:11.5f}" for x in stress),
        "      direct lattice vectors                 reciprocal lattice vectors",
        *(" ".join(f"{x:13.9f}" for x in [*vector, 0, 0, 0]) for vector in atoms.cell.array),
        " POSITION                                       TOTAL-FORCE (eV/Angst)",
        " ---------",
        *(" ".join(f"{x:13.7f}" for x in row) for row in rows),
        " ---------",
        "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)",
        "  ---------------------------------------------------",
        f"  free  energy   TOTEN  = {free:18.8f} eV",
        "",
        f"  energy  without entropy= {free + 0.1:16.8f}  energy(sigma->0) = {free + 0.05:16.8f}",
        "",
    ]
    return "\n".join(lines) + "\n"

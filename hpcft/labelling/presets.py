"""Short names of reference calculators: the class, sound settings beneath the user's, and where the command belongs.

What is computed, stored and compared is the dotted path with all arguments, so a preset that changes in a later release
makes other labels, which are told apart. Ladders change how the self-consistent field is found, never what it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.labelling.contents import STILLINGER_WEBER, TERSOFF
from hpcft.labelling.settings import AIMS, CP2K, ESPRESSO, GPAW, ORCA, TBLITE, TEACHER, VASP, merged

MPI = "{mpi}"
"""Stands in a command for the site's MPI launcher with its number of ranks."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """How a short name is spelt out."""

    calculator: str
    """Dotted path."""
    arguments: Arguments = field(default_factory=dict)
    """Beneath what the user writes."""
    command: str | None = None
    """What starts the code; None: it runs inside Python."""
    ladder: tuple[Arguments, ...] = ()
    """Arguments to try in turn when the self-consistent field does not converge."""
    with_command: Callable[[Arguments, str], Arguments] = lambda arguments, command: arguments
    """The arguments with the command where this calculator wants it."""
    read: Callable[[Arguments], Arguments] = lambda arguments: arguments
    """The user's arguments, or a rung of the ladder, as the preset's are written, so that they win where they meet."""
    completed: Callable[[Arguments], Arguments] = lambda arguments: arguments
    """The arguments with what a label needs whatever the user wrote."""
    for_properties: Mapping[str, Arguments] = field(default_factory=dict)
    """Beneath what the user writes, by the property of a label that needs it: other labels keep their keys."""


def _in_profile(*also: str) -> Callable[[Arguments, str], Arguments]:
    """Command, and what else of the arguments belongs there, in the table `profile`."""

    def with_command(arguments: Arguments, command: str) -> Arguments:
        moved = {name: arguments[name] for name in also if name in arguments}
        kept = {name: value for name, value in arguments.items() if name not in also}
        return merged(kept, {"profile": {"command": command, **moved}})

    return with_command


def _as_argument(arguments: Arguments, command: str) -> Arguments:
    return {**arguments, "command": command}


def _flat(arguments: Arguments) -> Arguments:
    """ASE lets a keyword that stands alone win over the same in a namelist; here all stand alone, in lower case."""
    if not isinstance(arguments.get("input_data"), Mapping):
        return arguments
    flat: dict[str, Any] = {}
    for key, value in arguments["input_data"].items():
        flat |= {k.lower(): v for k, v in (value if isinstance(value, Mapping) else {key: value}).items()}
    return {**arguments, "input_data": flat}


def _one_smearing(arguments: Arguments) -> Arguments:
    """`smearing` and `occupation_type` are two words for one thing, and ASE takes but one."""
    return {
        name: value
        for name, value in arguments.items()
        if name != "occupation_type" or "smearing" not in arguments
    }


def _with_gradient(arguments: Arguments) -> Arguments:
    """ORCA's forces must be asked for on the line that also names the method; its convergence as well."""
    line = str(arguments.get("orcasimpleinput", ""))
    words = [word.lower() for word in line.split()]
    if not any(
        re.fullmatch(r"(sloppy|loose|normal|strong|tight|verytight|extreme)scf", word) for word in words
    ):
        line += " TightSCF"
    for word in (
        "EnGrad",
        "SCFConvForced",
    ):  # the latter: do not go on with a wave function that is nearly converged
        if word.lower() not in words:
            line += f" {word}"
    return {**arguments, "orcasimpleinput": line.strip()}


_PW = {
    "conv_thr": 1.0e-8,  # Ry, of the whole cell
    "disk_io": "none",
    "occupations": "smearing",
    "smearing": "cold",
    "degauss": 0.01,  # Ry
}
_INCAR = {
    "prec": "Accurate",
    "ediff": 1.0e-6,
    "algo": "Normal",
    "nelm": 120,
    "ismear": 0,
    "sigma": 0.05,
    "lreal": False,
    "lasph": True,
    "isym": 0,  # structures of MD have none
    "ibrion": -1,
    "nsw": 0,
    "isif": 2,  # forces and stress
    "lwave": False,
    "lcharg": False,
}
_CP2K = """&FORCE_EVAL
  &DFT
    &QS
      EPS_DEFAULT 1.0E-12
    &END QS
    &MGRID
      REL_CUTOFF [Ry] 60
    &END MGRID
    &SCF
      EPS_SCF 1.0E-7
    &END SCF
  &END DFT
&END FORCE_EVAL
"""

PRESETS: dict[str, Preset] = {
    "emt": Preset("ase.calculators.emt.EMT"),
    "tersoff": Preset(TERSOFF),
    "stillinger-weber": Preset(STILLINGER_WEBER),
    "mace": Preset(TEACHER),
    "gfn2-xtb": Preset(
        TBLITE,
        {"method": "GFN2-xTB", "accuracy": 0.1, "max_iterations": 250, "verbosity": 0},
        ladder=(
            {"max_iterations": 500, "mixer_damping": 0.2},
            {"max_iterations": 1000, "mixer_damping": 0.05},
        ),
    ),
    "gpaw": Preset(
        GPAW,
        {
            "mode": {"name": "pw", "ecut": 400},
            "occupations": {"name": "fermi-dirac", "width": 0.05},
            "convergence": {"energy": 1.0e-6, "density": 1.0e-5, "forces": 1.0e-3},
            "maxiter": 150,
        },
        ladder=(
            {"mixer": {"backend": "pulay", "beta": 0.05, "nmaxold": 5, "weight": 100.0}, "maxiter": 300},
            {"mixer": {"backend": "pulay", "beta": 0.02, "nmaxold": 8, "weight": 100.0}, "maxiter": 500},
        ),
    ),
    "espresso": Preset(
        ESPRESSO,
        {"input_data": _PW},
        command="{mpi} pw.x",
        ladder=(
            {"input_data": {"mixing_beta": 0.3, "electron_maxstep": 200}},
            {"input_data": {"mixing_beta": 0.1, "mixing_mode": "local-TF", "electron_maxstep": 300}},
        ),
        with_command=_in_profile("pseudo_dir"),
        read=_flat,
    ),
    "vasp": Preset(
        VASP,
        _INCAR,
        command="{mpi} vasp_std",
        ladder=(
            {"algo": "All", "nelm": 200},
            {"algo": "Normal", "amix": 0.1, "bmix": 0.01, "nelm": 300},
        ),
        with_command=_as_argument,
        for_properties={"magmoms": {"lorbit": 10}},  # of the atoms, where ispin is 2
    ),
    "cp2k": Preset(
        CP2K,
        {"inp": _CP2K, "max_scf": 100, "stress_tensor": True, "print_level": "LOW"},
        command="{mpi} cp2k.psmp -s",
        ladder=({"max_scf": 300},),
        with_command=_as_argument,
    ),
    "aims": Preset(
        AIMS,
        {
            "relativistic": "atomic_zora scalar",
            "occupation_type": "gaussian 0.05",
            "sc_accuracy_rho": 1.0e-5,
            "sc_accuracy_etot": 1.0e-6,
            "sc_accuracy_forces": 1.0e-4,
            "sc_iter_limit": 120,
        },
        command="{mpi} aims.x",
        ladder=(
            {"charge_mix_param": 0.05, "sc_iter_limit": 250},
            {"charge_mix_param": 0.02, "sc_iter_limit": 400},
        ),
        with_command=_in_profile("default_species_directory"),
        completed=_one_smearing,
    ),
    "orca": Preset(
        ORCA,
        {"charge": 0, "mult": 1},
        command="orca",  # which starts its own ranks, as many as %pal in orcablocks says
        with_command=_in_profile(),
        completed=_with_gradient,
    ),
}


def launcher(words: Sequence[str], ranks: int) -> str:
    """The site's MPI launcher as text for a command, with `{ranks}` filled in."""
    return shlex.join(word.replace("{ranks}", str(ranks)) for word in words)

"""What counts as the truth, and how it is computed: the reference calculator and the label tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, Strict

from hpcft.config.common import Elements, Resources, VariableName
from hpcft.config.validate import Count, Folder, OneLine, Positive, Section, Unit, matching, shown
from hpcft.config.yaml_file import KeyPath

SHORT_NAMES = (
    "emt",
    "tersoff",
    "stillinger-weber",
    "gfn2-xtb",
    "espresso",
    "gpaw",
    "vasp",
    "cp2k",
    "aims",
    "orca",
    "mace",
)
"""Calculators with settings of their own in hpcft.labelling.presets; any other is named by its dotted path."""

DATA_SET_VARIABLES = frozenset(
    {
        "VASP_PP_PATH",
        "VASP_PP_VERSION",
        "ASE_VASP_VDW",
        "GPAW_SETUP_PATH",
        "CP2K_DATA_DIR",
        "AIMS_SPECIES_DIR",
        "ABINIT_PP_PATH",
        "SIESTA_PP_PATH",
        "CASTEP_PP_PATH",
        "OPENMX_DFT_DATA_PATH",
        "DFTB_PREFIX",
        "XTBPATH",
    }
)
"""Environment variables by which codes find potentials, basis sets and parameters: they decide the numbers."""


def _short_or_dotted(name: str) -> str:
    if "." not in name and name not in SHORT_NAMES:
        raise ValueError(
            f"{shown(name)} is no short name (those are {', '.join(SHORT_NAMES)}); for any other ASE calculator "
            "name a class with its module, such as ase.calculators.emt.EMT"
        )
    return name


Calculator = Annotated[
    str,
    matching(
        r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_]*)*",
        "name a class with its module, such as ase.calculators.emt.EMT, or a short name such as emt",
    ),
    AfterValidator(_short_or_dotted),
]
Property = Literal["magmoms", "charges", "dipole"]


class Reference(Section):
    """The calculator whose energies, forces and stresses count as the truth."""

    calculator: Calculator
    """Short name (docs/labelling.md), or dotted path of an ASE calculator class, such as ase.calculators.emt.EMT."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the calculator."""
    command: OneLine | None = None
    """Command of a code that is a program, for short names; {mpi} is the site's MPI launcher. Left out: the short name's."""
    ladder: Annotated[tuple[dict[str, JsonValue], ...], Strict(False)] | None = None
    """Arguments to try in turn, each over `arguments`, when the self-consistent field does not converge; same physics.
    Left out: the short name's."""
    elements: Elements | None = None
    """Chemical symbols that the reference knows; left out: the calculator is asked."""
    properties: Annotated[tuple[Property, ...], Strict(False)] = ()
    """What a label holds beside energy, forces and stress: magmoms, charges, dipole."""
    energy: Literal["free", "extrapolated"] = "free"
    """Which energy counts: that from which the forces derive, or the one extrapolated to zero smearing."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of the calculations; those that name data sets, such as VASP_PP_PATH, enter a label's key."""
    time_limit_s: Annotated[Positive, Unit("s")] = 3600.0
    """Time after which one calculation is stopped and counts as failed, in seconds."""
    memory_limit_GB: Annotated[Positive, Unit("GB")] | None = None
    """Memory above which one calculation, all its processes together, is stopped and counts as failed, in GB."""


class Label(Section):
    """Reference calculations of the selected frames."""

    shards: Count = 1
    """Tasks over which the frames are spread."""
    workers: Count = 1
    """Calculations that run side by side in one task; an idle worker takes the next structure."""
    ranks_per_calculation: Count = 1
    """MPI ranks of one calculation, for {mpi} in reference.command."""
    store: Folder | None = None
    """Folder of labels that campaigns share: what one of them has paid for, none pays for again. Left out: its own."""
    quarantine: bool = True
    """Whether labels that look wrong (docs/label-store.md) are kept from training and judging; they are listed either way."""
    tolerated_failures: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of a stage's reference calculations, and of its tasks, that may fail for good before the campaign stops."""
    resources: Resources = Resources()
    """What one task asks of the machine."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        needed = self.workers * self.ranks_per_calculation
        if needed > self.resources.cpus_per_rank:
            what = f"is {self.resources.cpus_per_rank}, but {self.workers} workers with {self.ranks_per_calculation} MPI "
            yield (
                ("resources", "cpus_per_rank"),
                f"{what}ranks each run at once; write {needed}: more processes than cores are slower by far",
            )

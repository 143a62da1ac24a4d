"""Kinds of values and sections that several configurations have in common."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Strict

from hpcft.config.validate import Count, Positive, Section, Unit, matching, shown

# Not from ASE, whose import takes longer than `hpcft status` may.
SYMBOLS = frozenset(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr "  # noqa: SIM905 (118 lines as a list)
    "Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba "
    "La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra "
    "Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og".split()
)

# As whole words: TOKENIZERS_PARALLELISM is no secret.
_SECRET = re.compile(r"(TOKEN|SECRETS?|PASSWORDS?|PASSWD|API_?KEYS?|CREDENTIALS?)(?![A-Z0-9])", re.IGNORECASE)


def _elements(symbols: tuple[str, ...]) -> tuple[str, ...]:
    if not symbols:
        raise ValueError("the list is empty; write at least one chemical symbol")
    for symbol in symbols:
        if symbol not in SYMBOLS:
            guess = symbol.strip().capitalize()
            remedy = f"write {guess}" if guess in SYMBOLS else "write symbols such as Cu"
            raise ValueError(f"{shown(symbol)} is no chemical symbol; {remedy}")
        if symbols.count(symbol) > 1:
            raise ValueError(f"{symbol} is listed twice; once is enough")
    return symbols


def _variable_name(name: str) -> str:
    if _SECRET.search(name):
        raise ValueError(
            "looks like a secret, and others can read site.json and batch scripts; delete it here and export it in the "
            "shell that starts hpcft: sbatch hands that on to the jobs"
        )
    return name


Elements = Annotated[tuple[str, ...], Strict(False), AfterValidator(_elements)]
DottedPath = Annotated[
    str,
    matching(
        r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+",
        "name a class with its module, such as ase.calculators.emt.EMT",
    ),
]

VariableName = Annotated[
    str,
    matching(
        r"[A-Za-z_][A-Za-z0-9_]*", "a variable's name has A-Z a-z 0-9 _ and does not begin with a digit"
    ),
    AfterValidator(_variable_name),
]


class Resources(Section):
    """What one task of a stage asks of the machine."""

    time_min: Annotated[Count, Unit("min")] = 60
    """Time limit of one attempt in minutes."""
    cpus_per_rank: Count = 1
    """CPU cores for each rank."""
    memory_GB: Annotated[Positive, Unit("GB")] | None = None
    """Memory of the task on each node in GB; left out: what the site gives by default."""

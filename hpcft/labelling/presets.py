"""Short names of reference calculators: the class, sound settings beneath the user's, and where the command belongs.

A short name is nothing but a way to write: what is computed, stored and compared is the dotted path with all arguments, so a
preset that changes in a later release makes other labels, which are told apart.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.labelling.settings import ESPRESSO, merged

MPI = "{mpi}"
"""Stands in a command for the site's MPI launcher with its number of ranks."""


@dataclass(frozen=True)
class Preset:
    """How a short name is spelt out."""

    calculator: str
    """Dotted path."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Beneath what the user writes."""
    command: str | None = None
    """What starts the code; None: it runs inside Python."""
    ladder: tuple[Mapping[str, Any], ...] = ()
    """Arguments to try in turn when the self-consistent field does not converge."""
    with_command: Callable[[Mapping[str, Any], str], Mapping[str, Any]] = lambda arguments, command: arguments
    """The arguments with the command where this calculator wants it."""


def _profile(arguments: Mapping[str, Any], command: str) -> Mapping[str, Any]:
    return merged(arguments, {"profile": {"command": command}})


PRESETS: dict[str, Preset] = {
    "emt": Preset("ase.calculators.emt.EMT"),
    "espresso": Preset(
        ESPRESSO,
        command="pw.x",
        arguments={
            "input_data": {
                "conv_thr": 1.0e-8,
                "disk_io": "none",
                "occupations": "smearing",
                "smearing": "cold",
                "degauss": 0.01,
            },
        },
        ladder=(
            {"input_data": {"mixing_beta": 0.3, "electron_maxstep": 200}},
            {"input_data": {"mixing_beta": 0.1, "mixing_mode": "local-TF", "electron_maxstep": 300}},
        ),
        with_command=_profile,
    ),
}


def launcher(words: Sequence[str], ranks: int) -> str:
    """The site's MPI launcher as text for a command, with `{ranks}` filled in."""
    return shlex.join(word.replace("{ranks}", str(ranks)) for word in words)

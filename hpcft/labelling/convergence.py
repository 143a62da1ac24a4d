"""Codes that end well without a self-consistent field: ASE reads their numbers as if they had converged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpcft.labelling.settings import CP2K

# What codes write into their output when they give up and go on to the forces.
_MARKS = (
    "convergence NOT achieved",  # Quantum ESPRESSO
    "Wavefunction not fully converged",  # ORCA
    "SELF-CONSISTENCY CYCLE DID NOT CONVERGE",  # FHI-aims
    "SCF run NOT converged",  # CP2K before 2024, where this is but a warning
)


def is_unconverged(calculator: Any) -> bool:
    """Whether the last calculation of an ASE calculator ended without converging, as far as it or its output tells.

    VASP says it in `converged`, which is None where its output has no word on it: that counts as unconverged too.
    """
    if hasattr(calculator, "read_convergence"):
        return not bool(calculator.converged)
    converged = getattr(calculator, "converged", None)
    if isinstance(converged, bool | np.bool_) and not converged:
        return True
    output = _output_of(calculator)
    if output is None or not output.is_file():
        return False
    text = output.read_text(errors="replace")
    return any(mark in text for mark in _MARKS)


def _output_of(calculator: Any) -> Path | None:
    name = getattr(getattr(calculator, "template", None), "outputname", None)
    if name is not None:
        return Path(calculator.directory, str(name))
    if f"{type(calculator).__module__}.{type(calculator).__name__}" == CP2K:
        return Path(str(calculator.label) + ".out")
    return None

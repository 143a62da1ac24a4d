"""Small models of Al and Cu and a cell of them, for pytest and for the scripts that it starts."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from ase.build import bulk

from hpcft.models.morse import MorsePotential

CUTOFF = 4.0  # Å


def small_morse() -> MorsePotential:
    """A Morse potential that tells the two elements apart in every parameter, float64."""
    torch.manual_seed(0)
    potential = MorsePotential([13, 29], cutoff=CUTOFF).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return potential


def small_mace() -> Any:
    """A MACE of Al and Cu with random weights and vector features, float64."""
    from hpcft.models.mace import build_mace

    torch.manual_seed(0)
    block = "RealAgnosticResidualInteractionBlock"
    return build_mace(
        {
            "r_max": CUTOFF,
            "num_bessel": 4,
            "num_polynomial_cutoff": 5.0,
            "max_ell": 2,
            "interaction_cls": block,
            "interaction_cls_first": block,
            "num_interactions": 2,
            "num_elements": 2,
            "hidden_irreps": "4x0e+4x1o",
            "MLP_irreps": "4x0e",
            "gate": "silu",
            "readout_cls": "NonLinearReadoutBlock",
            "atomic_energies": [[1.0, -2.0]],
            "avg_num_neighbors": 10.0,
            "atomic_numbers": [13, 29],
            "correlation": 2,
            "radial_type": "bessel",
            "radial_MLP": [8],
            "atomic_inter_scale": 10.0,
            "atomic_inter_shift": 0.1,
            "heads": ["Default"],
        },
        torch.float64,
    )


def alloy(repeat: tuple[int, int, int] = (2, 1, 1), rattle: float = 0.1, seed: int = 0) -> Atoms:
    """A periodic fcc cell of Cu with every second atom Al, off its lattice sites."""
    atoms = bulk("Cu", a=3.7, cubic=True).repeat(repeat)
    atoms.numbers[::2] = 13
    atoms.rattle(rattle, seed=seed)
    return atoms

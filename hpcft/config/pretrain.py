"""The recipe of `hpcft model pretrain`: a small foundation model from crystals with a cheap reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict

from hpcft.config.common import Elements
from hpcft.config.reference import Reference
from hpcft.config.training import Optimisation
from hpcft.config.validate import (
    Count,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Section,
    Seed,
    Unit,
    matching,
    validate,
)
from hpcft.config.yaml_file import KeyPath, load_yaml

Crystal = Literal["fcc", "diamond", "L1_0", "L1_2"]
Irreps = Annotated[
    str,
    matching(
        r"[1-9][0-9]{0,3}x[0-9][eo]( ?\+ ?[1-9][0-9]{0,3}x[0-9][eo])*",
        "write multiplicities and irreducible representations, such as 32x0e or 32x0e + 32x1o",
    ),
]


class Data(Section):
    """Strained and rattled crystals of all the elements."""

    crystals: Annotated[tuple[Crystal, ...], Strict(False)] = ("fcc", "L1_0", "L1_2")
    """Prototypes: fcc and diamond of each element, L1_0 and L1_2 of each pair."""
    structures_per_crystal: Count
    """Structures made of each prototype with each choice of elements."""
    repeat: Count = 2
    """Cubic cells along each edge of the supercell."""
    max_strain: Annotated[float, Field(ge=0, lt=0.5)] = 0.04
    """Largest strain of the cell."""
    rattle: Annotated[NonNegative, Unit("Å")] = 0.05
    """Standard deviation of the displacement of each coordinate, in Å."""
    validation: Fraction = 0.1
    """Fraction of the structures that is kept for validation."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if not self.crystals:
            yield ("crystals",), "the list is empty; write at least one of fcc, diamond, L1_0 and L1_2"
        if len(set(self.crystals)) < len(self.crystals):
            yield ("crystals",), "lists a crystal twice; once is enough"


class Architecture(Section):
    """Size of the MACE model."""

    cutoff: Annotated[Positive, Unit("Å")] = 5.0
    """Radius in which atoms see each other, in Å."""
    channels: Count = 32
    """Features of each kind."""
    max_ell: Annotated[int, Field(ge=0)] = 2
    """Highest degree of the spherical harmonics."""
    correlation: Count = 2
    """Body order of one layer, less one."""
    num_layers: Count = 2
    """Message-passing layers."""
    radial_features: Count = 8
    """Radial basis functions."""
    hidden_irreps: Irreps = "32x0e"
    """Irreducible representations of the messages, each with as many as channels."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        multiplicities = {int(number) for number in re.findall(r"(\d+)x", self.hidden_irreps)}
        if multiplicities != {self.channels}:
            meant = re.sub(r"\d+x", f"{self.channels}x", self.hidden_irreps)
            yield ("hidden_irreps",), f"{self.hidden_irreps} is not {self.channels} channels; write {meant}"


class Recipe(Section):
    """A small foundation model and how it is made."""

    name: Name
    """Name of the model."""
    seed: Seed = 0
    """Every random number follows from it."""
    elements: Elements
    """Chemical symbols that the model knows."""
    reference: Reference
    """The calculator that labels the crystals."""
    data: Data
    """Structures to learn from."""
    model: Architecture = Architecture()
    """Size of the model."""
    train: Optimisation
    """Training."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if len(self.elements) == 1 and {"L1_0", "L1_2"} & set(self.data.crystals):
            yield (
                ("data", "crystals"),
                f"{self.elements[0]} alone makes no L1_0 or L1_2; write [fcc] or [diamond]",
            )
        unknown = set(self.elements) - set(self.reference.elements or self.elements)
        if unknown:
            problem = f"{', '.join(sorted(unknown))} cannot be labelled: not in reference.elements"
            yield ("elements",), f"{problem}; take it out here, or add it there if the calculator knows it"


def load_recipe(path: Path) -> Recipe:
    """The recipe that the YAML file describes; else a UserError with every problem."""
    return validate(Recipe, load_yaml(path), path)

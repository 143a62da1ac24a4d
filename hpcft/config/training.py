"""What a training is told: the train section of a campaign, and what it shares with the recipe of a foundation model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from hpcft.config.common import SYMBOLS, Resources
from hpcft.config.validate import (
    Count,
    Fraction,
    InputFile,
    Positive,
    Scheduled,
    ScheduledCount,
    Section,
    Seed,
    Unit,
    always_zero,
    shown,
    validate,
)
from hpcft.config.yaml_file import KeyPath, load_yaml


def _symbol(symbol: str) -> str:
    if symbol not in SYMBOLS:
        raise ValueError(f"{shown(symbol)} is no chemical symbol; write symbols such as Cu")
    return symbol


Symbol = Annotated[str, AfterValidator(_symbol)]


class Weights(Section):
    """Weights of the terms of the loss, each a number or a schedule [[epoch, weight], ...]."""

    energy: Scheduled = 1.0
    """Weight of the energy per atom; a number, or [[epoch, weight], ...]."""
    forces: Scheduled = 1.0
    """Weight of the forces; a number, or [[epoch, weight], ...]."""
    stress: Scheduled = 0.0
    """Weight of the stress; a number, or [[epoch, weight], ...]."""


class Replay(Section):
    """Structures of the foundation model's training that are mixed in, so that it does not forget."""

    file: InputFile
    """Labelled structures (extxyz with REF_energy, REF_forces)."""
    batch_size: Count = 2
    """Replay structures that join each global batch."""
    weight: Scheduled = 1.0
    """Weight of the replay loss beside that of the labels; a number, or [[epoch, weight], ...]."""
    head: str = "shared"
    """Readouts that learn them: shared with the labels; own: a second head, dropped in the end; or a head's name in the model."""


class RelaxationTraining(Section):
    """Training through the iterated map of a relaxation (BPTT), towards those of relaxations.train."""

    weight: Scheduled
    """Weight of the loss on the relaxed structures, per amu^1/2 Å; a number, or [[epoch, weight], ...]."""
    every: Count = 1
    """Optimiser steps between two steps that include this loss."""
    batch_size: Count = 1
    """Relaxations in each such step."""
    steps: ScheduledCount = 40
    """Relaxation steps at most; a number, or [[epoch, steps], ...], such as steps that grow."""
    map: Literal["descent", "fire"] = "descent"
    """What is iterated: descent (with momentum: heavy ball), or FIRE."""
    step_size: Annotated[Positive, Unit("Å²/eV")] = 0.05
    """Displacement per force of a descent in Å²/eV."""
    momentum: Fraction = 0.8
    """Heavy-ball momentum of a descent; 0 is plain gradient descent."""
    max_step: Annotated[Positive, Unit("Å")] = 0.2
    """Longest way of an atom in one step in Å."""
    learn_step_size: Literal["no", "global", "per-element"] = "no"
    """Whether the step size of a descent is learned too, as one number or one for each element."""
    fmax: Annotated[Positive, Unit("eV/Å")] | None = None
    """Largest force at which a structure is at rest and stops, in eV/Å; left out: relaxations.fmax, or 0.001 if implicit."""
    engine: Literal["adjoint", "checkpoint", "plain", "finite-difference", "implicit"] = "adjoint"
    """How the gradient is computed: see docs/relaxation.md; implicit takes the gradient at the converged minimum."""
    last: Count | None = None
    """Truncated BPTT: only the last so many steps are differentiated; left out: all."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.learn_step_size != "no" and self.map != "descent":
            yield (
                ("learn_step_size",),
                f"the map {self.map} has no step size to learn; use map: descent, or no",
            )
        if self.engine == "implicit" and (self.last is not None or self.learn_step_size != "no"):
            key = "last" if self.last is not None else "learn_step_size"
            yield (
                (key,),
                "engine: implicit does not unroll any steps; leave this key out, or use engine: adjoint",
            )


class Optimisation(Section):
    """Minimisation of a loss over labelled structures."""

    ranks: Count = 1
    """Processes that share each batch (DDP)."""
    epochs: Count
    """Passes of training; in a campaign, in each round."""
    batch_size: Count = 4
    """Labelled structures in the global batch, over all ranks."""
    learning_rate: Positive = 1e-3
    """Learning rate after the warm-up of a twentieth of the steps."""
    weights: Weights = Weights()
    """Weights of the terms of the loss."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.batch_size < self.ranks:
            problem = (
                f"a batch of {self.batch_size} leaves some of the {self.ranks} ranks without a structure"
            )
            yield ("batch_size",), f"{problem}; raise batch_size, or lower ranks"
        weights = (self.weights.energy, self.weights.forces, self.weights.stress)
        relaxation = getattr(self, "relaxation", None)
        if all(map(always_zero, weights)) and (relaxation is None or always_zero(relaxation.weight)):
            yield (
                ("weights",),
                "energy, forces and stress are all 0, so nothing would be learned; raise one of them",
            )


class Lora(Section):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685) of a MACE model, by mace's own layers."""

    rank: Count = 4
    """Rank of the matrices."""
    alpha: Positive = 4.0
    """Their sum enters with alpha / rank."""


class Huber(Section):
    """Where errors stop to count squared and go on linearly (Ann. Math. Statist. 35, 73, 1964)."""

    energy: Annotated[Positive, Unit("eV/atom")] = 0.01
    """Error of the energy per atom, in eV/atom."""
    forces: Annotated[Positive, Unit("eV/Å")] = 0.1
    """Error of a force component, in eV/Å."""
    stress: Annotated[Positive, Unit("eV/Å³")] = 0.01
    """Error of a stress component, in eV/Å³."""


class Validation(Section):
    """Labels that are set aside, the same in all rounds."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the labels, chosen by a hash of each structure."""
    patience: Count | None = None
    """Epochs without a better validation loss after which the training ends; left out: it goes to the last epoch."""


class Train(Optimisation):
    """Fine-tuning of the model on all labels so far."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: a cosine down to a hundredth of it, or constant."""
    steps_per_epoch: Count | None = None
    """Optimiser steps in an epoch; left out: one pass over the labels."""
    precision: Literal["float32", "float64"] = "float32"
    """Floating-point type of the training and of the model file; for dynamics and relaxations see explore.precision."""
    acceleration: Literal["none", "cuequivariance", "auto"] = "none"
    """Kernels of NVIDIA's cuEquivariance, checked against the model first; auto: where there is a GPU and the package."""
    tf32: bool = False
    """Whether float32 matrix products on an NVIDIA GPU may be rounded to TF32; refused if the forces change by over 1 %."""
    replay: Replay | None = None
    """Structures mixed in against forgetting; left out: none."""
    relaxation: RelaxationTraining | None = None
    """Training through relaxations; left out: none."""
    checkpoint_every_epochs: Count = 1
    """Epochs between two checkpoints."""
    rates: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Factors of the learning rate by pattern of parameter names, such as products.0.*; 0 freezes, the first match counts."""
    lora: Lora | None = None
    """Only small matrices beside the model's own are learned, and added to them at the end; left out: all weights."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the exponential moving average of the weights, which is then the round's model; left out: none."""
    huber: Huber | None = None
    """Beyond these errors the loss grows linearly; left out: squared errors throughout."""
    energy_zero: Literal["keep", "fit"] | dict[Symbol, float] = "keep"
    """Keep: the foundation's zero of energy is the reference's; fit: found in round 1; or the isolated atoms' energies in eV."""
    validation: Validation | None = None
    """Labels that choose the best epoch and are never trained on; left out: none, and the last epoch counts."""
    max_edges: Count | None = None
    """Edges of the neighbour graph that a rank computes at once, where memory is short; left out: its whole share of a batch."""
    checkpoint_every_min: Annotated[Positive, Unit("min")] = 10.0
    """Minutes after which a checkpoint is written within an epoch."""
    gradient_clip: Positive | None = 10.0
    """Norm to which the gradient is clipped; null: not clipped."""
    resources: Resources = Resources()
    """What the task asks of the machine."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super()._problems()
        if self.acceleration == "cuequivariance" and self.lora is not None:
            yield ("acceleration",), "lora is for mace's own layers; leave one of the two out"
        if self.tf32 and self.precision != "float32":
            yield ("tf32",), f"is a way to compute in float32, and precision is {self.precision}; choose one"


class TrainingRun(Train):
    """A training without a campaign: what `hpcft train --config` reads."""

    epochs: Count = 50
    """Passes over the data."""
    weights: Weights = Weights(energy=10.0)
    """Weights of the terms of the loss."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.99
    """Decay per step of the exponential moving average of the weights, which is then the model; null: none."""
    seed: Seed = 0
    """Every random number follows from it."""
    max_force: Annotated[Positive, Unit("eV/Å")] = 50.0
    """Structures with a larger force are outliers and left out, in eV/Å."""
    max_outliers: Fraction = 0.01
    """Fraction of the data that may be left out as outliers, one structure at least; more is an error. 0: none may."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super()._problems()
        if self.relaxation is not None:
            yield ("relaxation",), "needs reference relaxations, which only a campaign has; leave it out"
        if self.ranks != 1:
            yield ("ranks",), "is what the launcher says (srun, mpirun, torchrun); leave it out"


def load_training(path: Path) -> TrainingRun:
    """The training that the YAML file describes; else a UserError with every problem."""
    return validate(TrainingRun, load_yaml(path), path)

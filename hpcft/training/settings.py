"""How a training goes: what the trainer is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpcft.relaxation import RelaxationPair
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Huber, Unrolling, Weights
from hpcft.training.schedule import Scheduled


@dataclass(frozen=True)
class ReplaySettings:
    """How much of the foundation's own data goes into every step, so that it is not forgotten."""

    batch_size: int = 2
    weight: Scheduled = 1.0
    head: str = "shared"
    """`shared` with the labels; `own`: readouts that start equal and are dropped in the end; or a head that the model has."""


@dataclass(frozen=True)
class BpttSettings:
    """The relaxation loss: its weight per amu^1/2 Å, the optimiser steps between two of them, and what is unrolled.

    Weight and `steps` (of the unroll) may be schedules: steps that grow, or epochs without it first.
    """

    weight: Scheduled
    every: int = 1
    batch_size: int = 1
    steps: Scheduled = 20
    unrolling: Unrolling = field(default_factory=Unrolling)


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (arXiv 2106.09685): matrices of this rank, whose product enters with alpha / rank."""

    rank: int = 4
    alpha: float = 4.0


@dataclass(frozen=True)
class TrainingSettings:
    """`batch_size` counts structures over all ranks.

    `schedule` of the learning rate: cosine or constant, both after a warm-up. `huber` makes the loss linear beyond its deltas
    (left out: squared errors). `rates` are factors of the learning rate by pattern of parameter names (fnmatch, the first that
    matches counts); 0 freezes. `lora`: only small matrices beside the weights are learned. `ema`: decay per step of the
    exponential moving average of the weights, which is then what is validated and returned. `patience`: epochs without a
    better validation loss after which the training ends. `max_edges`: a rank's share of a batch is computed in pieces of at
    most so many edges, whose gradients add up: memory is bounded, the mathematics is the same.
    """

    epochs: int
    batch_size: int = 4
    steps_per_epoch: int | None = None
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    weights: Weights = field(default_factory=Weights)
    huber: Huber | None = None
    replay: ReplaySettings | None = None
    relaxation: BpttSettings | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    lora: Lora | None = None
    ema: float | None = None
    patience: int | None = None
    max_edges: int | None = None
    gradient_clip: float | None = 10.0
    checkpoint_every_epochs: int = 1
    checkpoint_every_s: float = 600.0
    acceleration: str = "none"
    """none, cuequivariance, or auto: where there is a GPU and the package."""
    tf32: bool = False
    prefetch: bool | None = None
    """Whether the next batch is made while this one is computed; None: where there is a GPU."""
    seed: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class TrainingData:
    """`validation` is never trained on: it chooses the best epoch."""

    labels: LabelledSet
    replay: LabelledSet | None = None
    relaxations: Sequence[RelaxationPair] = ()
    validation: LabelledSet | None = None

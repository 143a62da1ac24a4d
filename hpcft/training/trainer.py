"""Fine-tuning on any number of ranks, resumable at every epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, as_module, device_of, dtype_of
from hpcft.relaxation import RelaxationPair, check_pair, require_twice_differentiable
from hpcft.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from hpcft.training.data import LabelledSet, draw, share
from hpcft.training.loss import Counts, LabelledTerm, Objective, RelaxationTerm, Unrolling, Weights
from hpcft.training.rank import Rank
from hpcft.training.sanity import ABSURD_FORCE, NotFinite, what_to_do
from hpcft.training.schedule import Scheduled, value_at


@dataclass(frozen=True)
class ReplaySettings:
    """How much of the foundation's own data goes into every step, so that it is not forgotten."""

    batch_size: int = 2
    weight: Scheduled = 1.0


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
class TrainingSettings:
    epochs: int
    batch_size: int = 4
    steps_per_epoch: int | None = None
    learning_rate: float = 1e-3
    weights: Weights = field(default_factory=Weights)
    replay: ReplaySettings | None = None
    relaxation: BpttSettings | None = None
    gradient_clip: float | None = 10.0
    checkpoint_every_epochs: int = 1
    seed: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class TrainingData:
    labels: LabelledSet
    replay: LabelledSet | None = None
    relaxations: Sequence[RelaxationPair] = ()


# How often a training may go back to its last good checkpoint, and what each time does to its learning rate.
MAX_SETBACKS = 3
SETBACK_FACTOR = 0.5


class Trainer:
    """One training run. All ranks construct it with equal arguments and call `run` together."""

    def __init__(
        self, potential: Potential, data: TrainingData, settings: TrainingSettings, rank: Rank | None = None
    ) -> None:
        self.potential, self.data, self.settings = potential, data, settings
        self.rank = rank or Rank()
        self.device = device_of(potential)
        self.step_size = None if settings.relaxation is None else settings.relaxation.unrolling.step_size
        if self.step_size is not None:
            self.step_size.to(self.device, dtype_of(potential))
        self.objective = Objective(potential, settings.weights, self.rank.world_size, self.step_size)
        self.wrapped: torch.nn.Module = self.objective
        if self.rank.world_size > 1:
            self.wrapped = DistributedDataParallel(self.objective)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=settings.learning_rate, amsgrad=True)
        self.history: list[dict[str, float]] = []
        self.setbacks: list[dict[str, Any]] = []
        self._refuse_what_cannot_be_learned()

    def _refuse_what_cannot_be_learned(self) -> None:
        if self.settings.relaxation is None or not self.data.relaxations:
            return
        for number, pair in enumerate(self.data.relaxations):
            with_cell = self.settings.relaxation.unrolling.with_cell
            check_pair(pair, f"relaxation {number}", with_cell=with_cell)
        first = self.data.relaxations[0].start
        dtype = dtype_of(self.potential)
        graph = build_graph([first], self.potential.cutoff, dtype=dtype, device=self.device)
        require_twice_differentiable(self.potential, graph)

    @property
    def steps_per_epoch(self) -> int:
        one_pass = math.ceil(len(self.data.labels) / self.settings.batch_size)
        return self.settings.steps_per_epoch or one_pass

    def run(
        self,
        folder: Path,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
        on_setback: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train to the last epoch, from the newest checkpoint in `folder` if there is one; returns the history.

        Numbers that are none send it back to the last good checkpoint with a lower learning rate; raises NotFinite when
        that has not helped. A run that was killed after going back finds the same numbers and goes back again.
        """
        epoch = self._resume(folder)
        good = self._checkpoint(epoch)
        while epoch < self.settings.epochs:
            try:
                row = self._epoch(epoch)
            except NotFinite as error:
                self._go_back(good, epoch, error)
                epoch = good.epoch
                if on_setback is not None:
                    on_setback(self.setbacks[-1])
                continue
            epoch += 1
            self.history.append(row)
            if epoch == self.settings.epochs or epoch % self.settings.checkpoint_every_epochs == 0:
                good = self._checkpoint(epoch)
                if self.rank.is_first:
                    save_checkpoint(folder, good)
            if on_epoch is not None:
                on_epoch(row)
        return self.history

    def log(self) -> list[dict[str, Any]]:
        """The history, with each setback after the epoch to which it went back."""
        rows: list[dict[str, Any]] = []
        for epoch in range(len(self.history) + 1):
            rows += self.history[epoch - 1 : epoch] if epoch else []
            rows += [setback for setback in self.setbacks if setback["back_to_epoch"] == epoch]
        return rows

    def _go_back(self, good: Checkpoint, epoch: int, error: NotFinite) -> None:
        """Take up the weights of `good` again, on a lower rate; raises NotFinite once that has been tried often enough."""
        setbacks = self.setbacks
        self._take(good)
        self.setbacks = setbacks  # of which `good` knows only those before it
        if len(setbacks) >= MAX_SETBACKS:
            sets = {"the labels": self.data.labels, "the replay data": self.data.replay}
            raise NotFinite(
                f"{error}. Going back {len(setbacks)} times, to {self._rate_factor(len(setbacks)):g} of the learning rate, "
                f"has not helped. {what_to_do(sets)}"
            ) from error
        self.setbacks = [
            *setbacks,
            {
                "setback": len(setbacks) + 1,
                "in_epoch": epoch + 1,
                "back_to_epoch": good.epoch,
                "learning_rate_factor": self._rate_factor(len(setbacks) + 1),
                "why": str(error),
            },
        ]

    @staticmethod
    def _rate_factor(num_setbacks: int) -> float:
        return float(SETBACK_FACTOR**num_setbacks)

    def _resume(self, folder: Path) -> int:
        checkpoint = load_latest(folder)
        if self.rank.world_size > 1:
            # Ranks may see different files for a moment on a network file system: rank 0 decides.
            epoch = torch.tensor(checkpoint.epoch if checkpoint else 0, device=self.device)
            mine = int(epoch)
            dist.broadcast(epoch, src=0)
            if int(epoch) != mine:
                raise RuntimeError(
                    f"rank {self.rank.rank} sees checkpoint {mine} where rank 0 sees {int(epoch)} in {folder}"
                )
        if checkpoint is None:
            return 0
        self._take(checkpoint)
        return checkpoint.epoch

    def _take(self, checkpoint: Checkpoint) -> None:
        as_module(self.potential).load_state_dict(checkpoint.model)
        if self.step_size is not None:
            self.step_size.load_state_dict(checkpoint.step_size)
        self.optimiser.load_state_dict(copy.deepcopy(checkpoint.optimiser))  # it keeps what it is given
        self.history, self.setbacks = list(checkpoint.history), list(checkpoint.setbacks)

    def _checkpoint(self, epoch: int) -> Checkpoint:
        """A copy: training goes on in the tensors themselves."""
        return Checkpoint(
            epoch,
            copy.deepcopy(as_module(self.potential).state_dict()),
            copy.deepcopy(self.optimiser.state_dict()),
            list(self.history),
            list(self.setbacks),
            {} if self.step_size is None else copy.deepcopy(self.step_size.state_dict()),
        )

    def _learning_rate(self, step: int) -> float:
        """Cosine from the full rate to a hundredth of it, after a warm-up of one twentieth of the run."""
        total = self.settings.epochs * self.steps_per_epoch
        warm = max(1, total // 20)
        if step < warm:
            return self.settings.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, total - warm)
        return self.settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _epoch(self, epoch: int) -> dict[str, float]:
        sums: dict[str, list[Tensor]] = {}
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            for name, value in self._step(step).items():
                sums.setdefault(name, []).append(value)
        self._refuse_weights(epoch)
        if self.step_size is not None:
            sums["relaxation/step_size"] = [self.step_size.log_eta.detach().exp().mean()]
        row = {name: float(torch.stack(values).mean()) for name, values in sums.items()}
        return {"epoch": float(epoch + 1), "learning_rate": self.optimiser.param_groups[0]["lr"], **row}

    def _step(self, step: int) -> dict[str, Tensor]:
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate(step) * self._rate_factor(len(self.setbacks))
        epoch = step / self.steps_per_epoch
        self.objective.weights = self.settings.weights.at(epoch)
        labelled = [self._term(self.data.labels, self.settings.batch_size, step, 1.0, "labels", 0)]
        if self.settings.replay is not None and self.data.replay is not None:
            replay = self.settings.replay
            weight = value_at(replay.weight, epoch)
            labelled.append(self._term(self.data.replay, replay.batch_size, step, weight, "replay", 1))
        self.optimiser.zero_grad(set_to_none=True)
        loss, parts = self.wrapped(labelled, self._relaxation(step))
        loss.backward()
        self.objective.count_left_out(parts)
        clip = self.settings.gradient_clip if self.settings.gradient_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        # All ranks judge the same numbers, so that all of them go back or none does.
        parts = self._mean_over_ranks({"loss": loss.detach(), **parts, "norm": norm})
        norm = parts.pop("norm")
        _average_what_is_left(parts)
        if not torch.isfinite(parts["loss"]):
            raise NotFinite(
                f"the loss is {float(parts['loss'])} {self._where(step)}; parts: {_numbers(parts)}"
            )
        if not torch.isfinite(norm):
            raise NotFinite(
                f"the gradient's norm is {float(norm)} {self._where(step)}; parts: {_numbers(parts)}"
            )
        self._refuse_absurd_forces(parts, step)
        self.optimiser.step()
        return parts

    def _refuse_absurd_forces(self, parts: dict[str, Tensor], step: int) -> None:
        for name in ("labels/forces", "replay/forces"):
            if self.objective.weights.forces != 0 and name in parts and float(parts[name]) > ABSURD_FORCE**2:
                raise NotFinite(
                    f"the error of the forces in {name} is {math.sqrt(float(parts[name])):.3g} eV/Å {self._where(step)}"
                )

    def _refuse_weights(self, epoch: int) -> None:
        """No checkpoint and no model ever holds weights that are not numbers."""
        finite = torch.stack([torch.isfinite(p).all() for p in self.parameters]).all().double()
        if float(self._mean_over_ranks({"finite": finite})["finite"]) < 1.0:
            raise NotFinite(f"weights are not finite at the end of epoch {epoch + 1}")

    def _where(self, step: int) -> str:
        indices = draw(len(self.data.labels), self.settings.batch_size, step, (*self.settings.seed, 0))
        return f"at step {step} on structures {indices} of the labels"

    def _term(
        self, data: LabelledSet, size: int, step: int, weight: float, name: str, stream: int
    ) -> LabelledTerm:
        indices = draw(len(data), size, step, (*self.settings.seed, stream))
        costs = data.num_atoms_each(indices)
        mine = [indices[i] for i in share(costs, self.rank.rank, self.rank.world_size)]
        batch = data.batch(mine, self.device) if mine else None
        return LabelledTerm(batch, Counts(len(indices), data.num_atoms(indices)), weight, name)

    def _relaxation(self, step: int) -> RelaxationTerm | None:
        bptt = self.settings.relaxation
        if bptt is None or not self.data.relaxations or step % bptt.every:
            return None
        epoch = step / self.steps_per_epoch
        weight, steps = value_at(bptt.weight, epoch), round(value_at(bptt.steps, epoch))
        if weight == 0:
            return None
        number = step // bptt.every
        indices = draw(len(self.data.relaxations), bptt.batch_size, number, (*self.settings.seed, 2))
        pairs = [self.data.relaxations[i] for i in indices]
        costs = [len(pair.start) * min(steps, pair.num_steps or steps) for pair in pairs]
        mine = [pairs[i] for i in share(costs, self.rank.rank, self.rank.world_size)]
        return RelaxationTerm(mine, len(indices), weight, steps, bptt.unrolling)

    def _mean_over_ranks(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.rank.world_size == 1:
            return parts
        values = torch.stack([value.to(self.device, torch.float64) for value in parts.values()])
        dist.all_reduce(values)
        return dict(zip(parts, values / self.rank.world_size, strict=True))


def _average_what_is_left(parts: dict[str, Tensor]) -> None:
    """Delta Q is reported for the relaxations that count in the loss; not at all where every one was left out."""
    if "relaxation/dropped" not in parts:
        return
    kept = 1 - parts["relaxation/dropped"]
    delta_q = parts.pop("relaxation/delta_q")
    if float(kept) > 1e-9:
        parts["relaxation/delta_q"] = delta_q / kept


def _numbers(parts: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value):.3g}" for name, value in parts.items())

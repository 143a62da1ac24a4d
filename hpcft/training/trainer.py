"""Fine-tuning on any number of ranks, resumable at every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hpcft.models.protocol import Potential, as_module, device_of
from hpcft.relaxation import MapSettings
from hpcft.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from hpcft.training.data import LabelledSet, RelaxationPair, draw, share
from hpcft.training.loss import Counts, LabelledTerm, Objective, RelaxationTerm, Weights
from hpcft.training.rank import Rank


@dataclass(frozen=True)
class ReplaySettings:
    """How much of the foundation's own data goes into every step, so that it is not forgotten."""

    batch_size: int = 2
    weight: float = 1.0


@dataclass(frozen=True)
class BpttSettings:
    """The relaxation loss: its weight per amu^1/2 Å, the steps between two of them, and its map."""

    weight: float
    every: int = 1
    batch_size: int = 1
    map: MapSettings = field(default_factory=MapSettings)


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


class NotFinite(RuntimeError):
    """The loss became infinite or not a number; the message says in which step and on which structures."""


class Trainer:
    """One training run. All ranks construct it with equal arguments and call `run` together."""

    def __init__(
        self, potential: Potential, data: TrainingData, settings: TrainingSettings, rank: Rank | None = None
    ) -> None:
        self.potential, self.data, self.settings = potential, data, settings
        self.rank = rank or Rank()
        self.device = device_of(potential)
        self.objective = Objective(potential, settings.weights, self.rank.world_size)
        self.wrapped: torch.nn.Module = self.objective
        if self.rank.world_size > 1:
            self.wrapped = DistributedDataParallel(self.objective)
        self.parameters = [p for p in as_module(potential).parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=settings.learning_rate, amsgrad=True)
        self.history: list[dict[str, float]] = []

    @property
    def steps_per_epoch(self) -> int:
        one_pass = math.ceil(len(self.data.labels) / self.settings.batch_size)
        return self.settings.steps_per_epoch or one_pass

    def run(
        self, folder: Path, on_epoch: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Train to the last epoch, from the newest checkpoint in `folder` if there is one; returns the history."""
        start = self._resume(folder)
        for epoch in range(start, self.settings.epochs):
            row = self._epoch(epoch)
            self.history.append(row)
            last = epoch + 1 == self.settings.epochs
            if self.rank.is_first and (last or (epoch + 1) % self.settings.checkpoint_every_epochs == 0):
                save_checkpoint(folder, self._checkpoint(epoch + 1))
            if on_epoch is not None:
                on_epoch(row)
        return self.history

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
        as_module(self.potential).load_state_dict(checkpoint.model)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        self.history = list(checkpoint.history)
        return checkpoint.epoch

    def _checkpoint(self, epoch: int) -> Checkpoint:
        return Checkpoint(
            epoch, as_module(self.potential).state_dict(), self.optimiser.state_dict(), self.history
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
        row = {name: float(torch.stack(values).mean()) for name, values in sums.items()}
        return {"epoch": float(epoch + 1), "learning_rate": self.optimiser.param_groups[0]["lr"], **row}

    def _step(self, step: int) -> dict[str, Tensor]:
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate(step)
        labelled = [self._term(self.data.labels, self.settings.batch_size, step, 1.0, "labels", 0)]
        if self.settings.replay is not None and self.data.replay is not None:
            replay = self.settings.replay
            labelled.append(self._term(self.data.replay, replay.batch_size, step, replay.weight, "replay", 1))
        self.optimiser.zero_grad(set_to_none=True)
        loss, parts = self.wrapped(labelled, self._relaxation(step))
        loss.backward()
        parts = self._mean_over_ranks({"loss": loss.detach(), **parts})
        if not torch.isfinite(parts["loss"]):
            raise NotFinite(
                f"the loss is {float(parts['loss'])} {self._where(step)}; parts: {_numbers(parts)}"
            )
        clip = self.settings.gradient_clip if self.settings.gradient_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        if not torch.isfinite(norm):
            raise NotFinite(
                f"the gradient's norm is {float(norm)} {self._where(step)}; parts: {_numbers(parts)}"
            )
        self.optimiser.step()
        return parts

    def _where(self, step: int) -> str:
        indices = draw(len(self.data.labels), self.settings.batch_size, step, (*self.settings.seed, 0))
        return f"at step {step} on structures {indices} of the labels"

    def _term(
        self, data: LabelledSet, size: int, step: int, weight: float, name: str, stream: int
    ) -> LabelledTerm:
        indices = draw(len(data), size, step, (*self.settings.seed, stream))
        mine = share(indices, self.rank.rank, self.rank.world_size)
        batch = data.batch(mine, self.device) if mine else None
        return LabelledTerm(batch, Counts(len(indices), data.num_atoms(indices)), weight, name)

    def _relaxation(self, step: int) -> RelaxationTerm | None:
        bptt = self.settings.relaxation
        if bptt is None or not self.data.relaxations or step % bptt.every:
            return None
        number = step // bptt.every
        indices = draw(len(self.data.relaxations), bptt.batch_size, number, (*self.settings.seed, 2))
        mine = share(indices, self.rank.rank, self.rank.world_size)
        pairs = [self.data.relaxations[i] for i in mine]
        return RelaxationTerm(pairs, len(indices), bptt.weight, bptt.map)

    def _mean_over_ranks(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.rank.world_size == 1:
            return parts
        values = torch.stack([value.to(self.device, torch.float64) for value in parts.values()])
        dist.all_reduce(values)
        return dict(zip(parts, values / self.rank.world_size, strict=True))


def _numbers(parts: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value):.3g}" for name, value in parts.items())

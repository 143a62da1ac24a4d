"""The training loop: one optimiser step per global batch, resumable after every step that a checkpoint holds."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hpcft.errors import UserError
from hpcft.labelling.sanity import ABSURD_FORCE
from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, as_module, device_of, dtype_of
from hpcft.relaxation import check_pair, require_twice_differentiable
from hpcft.training.batches import Batches, Piece
from hpcft.training.checkpoint import Checkpoint, differences, load_latest, save_checkpoint
from hpcft.training.data import draw
from hpcft.training.loss import Objective
from hpcft.training.measure import errors_of
from hpcft.training.optimiser import MovingAverage, learning_rate, parameter_groups
from hpcft.training.rank import Rank
from hpcft.training.sanity import NotFinite, what_to_do
from hpcft.training.scaffold import Scaffold
from hpcft.training.settings import BpttSettings, Lora, ReplaySettings, TrainingData, TrainingSettings

__all__ = [
    "BpttSettings",
    "Lora",
    "NotFinite",
    "ReplaySettings",
    "Trainer",
    "TrainingData",
    "TrainingSettings",
]

# How often a training may go back to its last good checkpoint, and what each time does to its learning rate.
MAX_SETBACKS = 3
SETBACK_FACTOR = 0.5


# Structures of the validation set that are evaluated together.
_VALIDATED_TOGETHER = 8


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
        self._refuse_what_cannot_be_learned()
        self.scaffold = Scaffold(potential, settings, data.labels.batch([0], self.device).graph)
        self.objective = Objective(
            potential,
            settings.weights,
            self.rank.world_size,
            self.step_size,
            settings.huber,
            replay=self.scaffold.replay,
        )
        groups = parameter_groups(self.objective, settings.rates)
        self.wrapped: torch.nn.Module = self.objective
        if self.rank.world_size > 1:
            # Buffers are constants of the architecture: nothing to broadcast.
            self.wrapped = DistributedDataParallel(self.objective, broadcast_buffers=False)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimiser = torch.optim.Adam(groups, lr=settings.learning_rate, amsgrad=True)
        self.average = MovingAverage(self.parameters, settings.ema) if settings.ema is not None else None
        self.history: list[dict[str, float]] = []
        self.setbacks: list[dict[str, Any]] = []
        self.speed: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.batches = Batches(data, settings, self.rank, self.device)
        self._sums: dict[str, list[Tensor]] = {}

    def _refuse_what_cannot_be_learned(self) -> None:
        if len(self.data.labels) == 0:
            raise UserError("there are no labels to train on")
        if self.settings.patience is not None and self.data.validation is None:
            raise UserError(
                "patience needs validation data, by which it is judged; give some, or leave it out"
            )
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
        return self.batches.steps_per_epoch

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued; not the number of ranks or epochs, nor how memory is used."""
        parameters = as_module(self.potential).state_dict()
        shapes = [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in parameters.items()]
        sets = (self.data.labels, self.data.replay, self.data.validation)
        return {
            "model": f"{self.potential.architecture} {hashlib.sha256(' '.join(shapes).encode()).hexdigest()[:16]}",
            "structures": [None if data is None else len(data) for data in sets],
            "relaxations": len(self.data.relaxations),
            "steps_per_epoch": self.steps_per_epoch,
            "batch_size": self.settings.batch_size,
            "learning_rate": self.settings.learning_rate,
            "schedule": self.settings.schedule,
            "rates": dict(self.settings.rates),
            "lora": None if self.settings.lora is None else self.settings.lora.rank,
            "acceleration": self.scaffold.acceleration,
            "replay head": None if self.settings.replay is None else self.settings.replay.head,
            "ema": self.settings.ema,
            "seed": list(self.settings.seed),
        }

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(
        self,
        folder: Path,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
        on_setback: Callable[[dict[str, Any]], None] | None = None,
        save_now: Callable[[], bool] = lambda: False,
    ) -> list[dict[str, float]]:
        """Train to the last epoch, from the newest checkpoint in `folder` if there is one; returns the history.

        Afterwards the model is that of the best epoch where there is validation data, else the moving average, else the last.
        A checkpoint is written after epochs, every so many seconds, and when `save_now` says so (asked by rank 0 after each
        step). Numbers that are none send it back to the last good checkpoint of whole epochs with a lower learning rate;
        raises NotFinite when that has not helped. A run that was killed after going back finds the same numbers and goes back
        again. UserError when `folder` holds the checkpoints of another training.
        """
        folder.mkdir(parents=True, exist_ok=True)
        good, (epoch, step) = self._resume(folder)
        saver = _Saver(self, folder, save_now) if self.rank.is_first else None
        with self.batches.in_order() as pieces_of:
            while not self._is_over(epoch):
                try:
                    row = self._epoch(epoch, step, pieces_of, saver)
                except NotFinite as error:
                    self._go_back(good, epoch, error)
                    (epoch, step), self._sums = good.position, {}
                    if on_setback is not None:
                        on_setback(self.setbacks[-1])
                    continue
                epoch, step, self._sums = epoch + 1, 0, {}
                self.history.append(row)
                self._keep_if_best(epoch, row)
                if self._is_over(epoch) or epoch % self.settings.checkpoint_every_epochs == 0:
                    good = self.checkpoint(epoch)
                    if self.rank.is_first:
                        save_checkpoint(folder, good)
                if on_epoch is not None:
                    on_epoch({**row, **self.speed[-1]})
        self._take_what_is_returned()
        return self.history

    def _is_over(self, epoch: int) -> bool:
        patience = self.settings.patience
        waited = epoch - int(self.best.get("epoch", epoch))
        return epoch >= self.settings.epochs or (patience is not None and waited >= patience)

    def _keep_if_best(self, epoch: int, row: dict[str, float]) -> None:
        loss = row.get("valid/loss")
        if loss is None or not loss < self.best.get("loss", math.inf):
            return
        with self._as_returned():
            model = copy.deepcopy(as_module(self.potential).state_dict())
        self.best = {"epoch": epoch, "loss": loss, "model": model}

    def _as_returned(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _take_what_is_returned(self) -> None:
        if self.best:
            as_module(self.potential).load_state_dict(self.best["model"])
        elif self.average is not None:
            self.average.copy_to_weights()
        self.scaffold.take_down()

    def log(self) -> list[dict[str, Any]]:
        """The history with times, and each setback after the epoch to which it went back."""
        rows: list[dict[str, Any]] = []
        speed = [*self.speed, *({} for _ in self.history[len(self.speed) :])]
        told = [{**row, **fast} for row, fast in zip(self.history, speed, strict=False)]
        for epoch in range(len(self.history) + 1):
            rows += told[epoch - 1 : epoch] if epoch else []
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

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _resume(self, folder: Path) -> tuple[Checkpoint, tuple[int, int]]:
        """What to go back to, and the epoch and step at which to go on."""
        good, newest = self.checkpoint(0), load_latest(folder)
        position = newest.position if newest else (0, 0)
        if self.rank.world_size > 1:
            # Ranks may see different files for a moment on a network file system: rank 0 decides.
            first = torch.tensor(position, device=self.device)
            dist.broadcast(first, src=0)
            if tuple(first.tolist()) != position:
                raise RuntimeError(
                    f"rank {self.rank.rank} sees checkpoint {position} where rank 0 sees {tuple(first.tolist())} in {folder}"
                )
        if newest is None:
            return good, (0, 0)
        if different := differences(self.identity, newest.identity):
            raise UserError(
                f"{folder} holds the checkpoints of another training ({'; '.join(different)}); continue that one as it was, or "
                "choose another folder"
            )
        if (whole := load_latest(folder, whole_epochs=True)) is not None:
            good = whole
        self._take(newest)
        return good, newest.position

    def _take(self, checkpoint: Checkpoint) -> None:
        as_module(self.potential).load_state_dict(checkpoint.model)
        if self.step_size is not None:
            self.step_size.load_state_dict(checkpoint.step_size)
        self.scaffold.load_state_dict(checkpoint.scaffold)
        if self.average is not None:
            self.average.load_state_dict(checkpoint.average)
        self.optimiser.load_state_dict(copy.deepcopy(checkpoint.optimiser))  # it keeps what it is given
        self.history, self.setbacks = list(checkpoint.history), list(checkpoint.setbacks)
        self.speed, self.best = list(checkpoint.speed), dict(checkpoint.best)
        self._sums = {name: list(values.to(self.device)) for name, values in checkpoint.partial.items()}

    def checkpoint(self, epoch: int, step: int = 0) -> Checkpoint:
        """A copy: training goes on in the tensors themselves."""
        return Checkpoint(
            epoch,
            copy.deepcopy(as_module(self.potential).state_dict()),
            copy.deepcopy(self.optimiser.state_dict()),
            list(self.history),
            list(self.setbacks),
            {} if self.step_size is None else copy.deepcopy(self.step_size.state_dict()),
            step,
            {name: torch.stack(values).cpu() for name, values in self._sums.items()} if step else {},
            {} if self.average is None else self.average.state_dict(),
            dict(self.best),
            list(self.speed),
            self.scaffold.state_dict(),
            self.identity,
        )

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def _epoch(
        self, epoch: int, first: int, pieces_of: Callable[[int], list[Piece]], saver: _Saver | None
    ) -> dict[str, float]:
        started, num_done = time.perf_counter(), self.steps_per_epoch - first
        for within in range(first, self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + within
            for name, value in self._step(step, pieces_of(step)).items():
                self._sums.setdefault(name, []).append(value)
            if saver is not None:
                saver.after(epoch, within + 1)
        self._refuse_weights(epoch)
        seconds = time.perf_counter() - started
        if self.step_size is not None:
            self._sums["relaxation/step_size"] = [self.step_size.log_eta.detach().exp().mean()]
        row = {name: float(torch.stack(values).mean()) for name, values in self._sums.items()}
        rate = self.optimiser.param_groups[0]["lr"] / self.optimiser.param_groups[0]["rate"]
        row = {"epoch": float(epoch + 1), "learning_rate": rate, **row}
        if self.data.validation is not None:
            with self._as_returned():
                found = errors_of(
                    self.potential,
                    self.data.validation,
                    self.rank,
                    weights=self.settings.weights.at(epoch + 1),
                    huber=self.settings.huber,
                    together=_VALIDATED_TOGETHER,
                )
            row |= {f"valid/{name}": value for name, value in found.items()}
        self.speed = [*self.speed[:epoch], self._speed(seconds, num_done, epoch)]
        return row

    def _speed(self, seconds: float, num_steps: int, epoch: int) -> dict[str, float]:
        """Structures and atoms per second over all ranks, as far as this process has followed the epoch."""
        last = (epoch + 1) * self.steps_per_epoch
        structures, atoms = self.batches.sizes(range(last - num_steps, last))
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": seconds,
            "structures_per_s": structures / seconds,
            "atoms_per_s": atoms / seconds,
            "memory_MiB": memory / 2**20,
        }

    def _step(self, step: int, pieces: list[Piece]) -> dict[str, Tensor]:
        settings, factor = self.settings, self._rate_factor(len(self.setbacks))
        total = settings.epochs * self.steps_per_epoch
        rate = learning_rate(settings.learning_rate, step, total, settings.schedule) * factor
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        self.objective.weights = settings.weights.at(step / self.steps_per_epoch)
        self.optimiser.zero_grad(set_to_none=True)
        parts = self._gradient(pieces)
        clip = settings.gradient_clip if settings.gradient_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        # All ranks judge the same numbers, so that all of them go back or none does.
        parts = self._mean_over_ranks({**parts, "gradient_norm": norm.detach()})
        # Together, and once a step: a GPU that is asked waits for its next orders.
        read = dict(
            zip(parts, torch.stack([value.double() for value in parts.values()]).tolist(), strict=True)
        )
        for name, what in (("loss", "the loss"), ("gradient_norm", "the gradient's norm")):
            if not math.isfinite(read[name]):
                numbers = ", ".join(f"{part} {value:.3g}" for part, value in read.items())
                raise NotFinite(f"{what} is {read[name]} {self._where(step)}; parts: {numbers}")
        self._refuse_absurd_forces(read, step)
        _average_what_is_left(parts, read)
        self.optimiser.step()
        if self.average is not None:
            self.average.update()
        return parts

    def _gradient(self, pieces: list[Piece]) -> dict[str, Tensor]:
        """Leaves the gradient of all pieces together in the parameters; ranks exchange it with the last one."""
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            alone = isinstance(self.wrapped, DistributedDataParallel) and not is_last
            with self.wrapped.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                try:
                    loss, parts = self.wrapped(*piece)
                    loss.backward()
                except torch.OutOfMemoryError as error:
                    at_once = self.settings.max_edges or "a whole share of a batch"
                    raise UserError(
                        f"this step does not fit into the memory of the GPU; set train.max_edges lower ({at_once} is computed at "
                        "once now), or a relaxation's batch_size and steps"
                    ) from error
            self.objective.count_left_out(parts)
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _refuse_absurd_forces(self, parts: dict[str, float], step: int) -> None:
        if self.settings.huber is not None:
            return  # its loss is no mean square
        for name in ("labels/forces", "replay/forces"):
            if self.objective.weights.forces != 0 and name in parts and parts[name] > ABSURD_FORCE**2:
                raise NotFinite(
                    f"the error of the forces in {name} is {math.sqrt(parts[name]):.3g} eV/Å {self._where(step)}"
                )

    def weights_are_finite(self) -> bool:
        return bool(torch.stack([torch.isfinite(p).all() for p in self.parameters]).all())

    def _refuse_weights(self, epoch: int) -> None:
        """No checkpoint and no model ever holds weights that are not numbers."""
        finite = torch.tensor(float(self.weights_are_finite()))
        if float(self._mean_over_ranks({"finite": finite})["finite"]) < 1.0:
            raise NotFinite(f"weights are not finite at the end of epoch {epoch + 1}")

    def _where(self, step: int) -> str:
        indices = draw(len(self.data.labels), self.settings.batch_size, step, (*self.settings.seed, 0))
        return f"at step {step} on structures {indices} of the labels"

    def _mean_over_ranks(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.rank.world_size == 1:
            return parts
        names = sorted(parts)  # pieces may come in another order on another rank
        values = torch.stack([parts[name].to(self.device, torch.float64) for name in names])
        dist.all_reduce(values)
        mean = dict(zip(names, values / self.rank.world_size, strict=True))
        return {name: mean[name] for name in parts}


class _Saver:
    """Writes a checkpoint within an epoch: every so many seconds, and when it is told to."""

    def __init__(self, trainer: Trainer, folder: Path, save_now: Callable[[], bool]) -> None:
        self._trainer, self._folder, self._save_now = trainer, folder, save_now
        self._saved_at = time.monotonic()

    def after(self, epoch: int, step: int) -> None:
        is_due = time.monotonic() - self._saved_at > self._trainer.settings.checkpoint_every_s
        # The epoch's own checkpoint follows its last step.
        if step < self._trainer.steps_per_epoch and (self._save_now() or is_due):
            if self._trainer.weights_are_finite():
                save_checkpoint(self._folder, self._trainer.checkpoint(epoch, step))
            self._saved_at = time.monotonic()


def _average_what_is_left(parts: dict[str, Tensor], read: dict[str, float]) -> None:
    """Delta Q is reported for the relaxations that count in the loss; not at all where every one was left out."""
    if "relaxation/dropped" not in parts:
        return
    delta_q = parts.pop("relaxation/delta_q")
    if 1 - read["relaxation/dropped"] > 1e-9:
        parts["relaxation/delta_q"] = delta_q / (1 - parts["relaxation/dropped"])

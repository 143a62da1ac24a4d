"""Train: fine-tune the model of the round before on all labels so far, and on relaxed structures (BPTT)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcft.config.campaign import Campaign
from hpcft.errors import CampaignStopped
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.labels import relaxation_pairs_by_index, training_labels
from hpcft.storage.atomic import write_text
from hpcft.storage.structures import read_structures

if TYPE_CHECKING:
    from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings


def ranks(campaign: Campaign) -> int:
    return campaign.train.ranks


def plan(context: StageContext) -> list[dict[str, Any]]:
    return [{}]


def run(task: TaskContext) -> dict[str, Any]:
    import torch

    from hpcft.models.files import load_model, save_model, sha256_of
    from hpcft.training.distributed import choose_device, process_group
    from hpcft.training.trainer import Trainer

    context = task.context
    device = choose_device(task.rank, context.device)
    dtype = getattr(torch, context.campaign.train.precision)
    start = context.model(context.round - 1)
    potential = load_model(start, dtype=dtype, device=device)
    data = _data(context, potential.cutoff, dtype)
    with process_group(task.rank, task.path, device):
        trainer = Trainer(potential, data, _settings(context), task.rank)
        log = _log_to(task, trainer)
        history = trainer.run(task.path, log, log)
    final = task.path / "model.pt"
    if task.rank.is_first:
        provenance = {
            "campaign": context.campaign.name,
            "round": context.round,
            "start_sha256": sha256_of(start),
            "labels": len(data.labels),
            "relaxations": len(data.relaxations),
        }
        task.ensure_owned()
        save_model(final, potential, provenance)
    return {
        "labels": len(data.labels),
        "relaxations": len(data.relaxations),
        "epochs": len(history),
        "first": history[0],
        "last": history[-1],
        "model_sha256": sha256_of(final) if task.rank.is_first else None,
    }


def _log_to(task: TaskContext, trainer: Trainer) -> Callable[[dict[str, Any]], None]:
    """Keeps metrics.jsonl equal to the history: a line for each epoch and setback, whatever was killed in between."""

    def write(row: dict[str, Any]) -> None:
        if task.rank.is_first:
            lines = "".join(json.dumps(line) + "\n" for line in trainer.log())
            write_text(task.path / "metrics.jsonl", lines)

    return write


def _data(context: StageContext, cutoff: float, dtype: Any) -> TrainingData:
    from hpcft.training.data import LabelledSet, RelaxationPair
    from hpcft.training.trainer import TrainingData

    structures = training_labels(context)
    if not structures:
        raise CampaignStopped(
            f"round {context.round} has no labels to train on: no frame of explore stayed within the guards, or every "
            "label failed. See `hpcft status`; a lower explore.temperature_K or timestep helps."
        )
    replay = None
    if context.campaign.train.replay is not None:
        replay = LabelledSet(read_structures(context.folder.inputs / "replay.h5"), cutoff, dtype, "replay")
    pairs = []
    if context.campaign.train.relaxation is not None:
        ends = relaxation_pairs_by_index(context, "label", 1)
        pairs = [RelaxationPair(start, relaxed) for start, relaxed in ends.values()]
        if not pairs:
            raise CampaignStopped(
                "train.relaxation has nothing to learn from: no reference relaxation of round 1 converged. Raise "
                "relaxations.max_steps or relaxations.fmax, or leave train.relaxation out, in a new campaign."
            )
    return TrainingData(LabelledSet(structures, cutoff, dtype, "the labels"), replay, pairs)


def _settings(context: StageContext) -> TrainingSettings:
    from hpcft.relaxation import MapSettings
    from hpcft.training.loss import Weights
    from hpcft.training.trainer import BpttSettings, ReplaySettings, TrainingSettings

    train = context.campaign.train
    bptt = None
    if train.relaxation is not None:
        r = train.relaxation
        bptt = BpttSettings(r.weight, r.every, r.batch_size, MapSettings(r.steps, r.step_size, r.momentum))
    return TrainingSettings(
        epochs=train.epochs,
        batch_size=train.batch_size,
        steps_per_epoch=train.steps_per_epoch,
        learning_rate=train.learning_rate,
        weights=Weights(train.weights.energy, train.weights.forces, train.weights.stress),
        replay=None if train.replay is None else ReplaySettings(train.replay.batch_size, train.replay.weight),
        relaxation=bptt,
        gradient_clip=train.gradient_clip,
        checkpoint_every_epochs=train.checkpoint_every_epochs,
        seed=context.entropy("train", context.round),
    )


def collect(context: StageContext) -> dict[str, Any]:
    return context.results()[0]

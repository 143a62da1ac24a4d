"""Train: fine-tune the model of the round before on all labels so far, and on relaxed structures (BPTT)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hpcft.config.campaign import Campaign
from hpcft.errors import CampaignStopped, UserError
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.labels import relaxation_results_by_index, training_labels
from hpcft.stages.sharing import learned_step_size, relaxation_map
from hpcft.storage.atomic import write_text
from hpcft.storage.structures import read_structures

if TYPE_CHECKING:
    from hpcft.relaxation import RelaxationPair
    from hpcft.training.trainer import BpttSettings, Trainer, TrainingData, TrainingSettings


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
    data, refused = _data(context, potential.cutoff, dtype)
    with process_group(task.rank, task.path, device):
        trainer = Trainer(potential, data, _settings(context, potential.elements), task.rank)
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
        "relaxations_refused": refused,
        "epochs": len(history),
        "first": history[0],
        "last": history[-1],
        "step_size": None if trainer.step_size is None else trainer.step_size.values(),
        "model_sha256": sha256_of(final) if task.rank.is_first else None,
    }


def _log_to(task: TaskContext, trainer: Trainer) -> Callable[[dict[str, Any]], None]:
    """Keeps metrics.jsonl equal to the history: a line for each epoch and setback, whatever was killed in between."""

    def write(row: dict[str, Any]) -> None:
        if task.rank.is_first:
            lines = "".join(json.dumps(line) + "\n" for line in trainer.log())
            write_text(task.path / "metrics.jsonl", lines)

    return write


def _data(context: StageContext, cutoff: float, dtype: Any) -> tuple[TrainingData, list[str]]:
    from hpcft.training.data import LabelledSet
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
    pairs, refused = _relaxations(context)
    return TrainingData(LabelledSet(structures, cutoff, dtype, "the labels"), replay, pairs), refused


def _relaxations(context: StageContext) -> tuple[list[RelaxationPair], list[str]]:
    """The targets of train.relaxation, and what was refused as one and why."""
    from hpcft.relaxation import RelaxationPair, check_pair

    pairs: list[RelaxationPair] = []
    refused: list[str] = []
    if context.campaign.train.relaxation is None:
        return pairs, refused
    for number, end in relaxation_results_by_index(context, "label", 1).items():
        pair = RelaxationPair(end.start, end.relaxed, end.num_steps)
        try:
            check_pair(pair, f"relaxation {number}", with_cell=context.campaign.relaxations.cell)
        except UserError as error:
            refused.append(str(error))
        else:
            pairs.append(pair)
    if not pairs:
        raise CampaignStopped(
            "train.relaxation has nothing to learn from: no reference relaxation of round 1 converged to a target. "
            + " ".join(refused[:3])
            + " Raise relaxations.max_steps or relaxations.fmax, or leave train.relaxation out, in a new campaign."
        )
    return pairs, refused


def _settings(context: StageContext, elements: Sequence[int]) -> TrainingSettings:
    from hpcft.training.loss import Weights
    from hpcft.training.schedule import scheduled
    from hpcft.training.trainer import ReplaySettings, TrainingSettings

    train = context.campaign.train
    replay = train.replay
    return TrainingSettings(
        epochs=train.epochs,
        batch_size=train.batch_size,
        steps_per_epoch=train.steps_per_epoch,
        learning_rate=train.learning_rate,
        weights=Weights(
            scheduled(train.weights.energy), scheduled(train.weights.forces), scheduled(train.weights.stress)
        ),
        replay=None if replay is None else ReplaySettings(replay.batch_size, scheduled(replay.weight)),
        relaxation=_bptt(context, elements),
        gradient_clip=train.gradient_clip,
        checkpoint_every_epochs=train.checkpoint_every_epochs,
        seed=context.entropy("train", context.round),
    )


def _bptt(context: StageContext, elements: Sequence[int]) -> BpttSettings | None:
    from hpcft.relaxation import StepSize, Stop
    from hpcft.training.loss import Unrolling
    from hpcft.training.schedule import scheduled
    from hpcft.training.trainer import BpttSettings

    campaign = context.campaign
    settings = campaign.train.relaxation
    if settings is None:
        return None
    learned = learned_step_size(context, context.round - 1)
    if learned is None and settings.learn_step_size != "no":
        learned = StepSize(settings.step_size, elements if settings.learn_step_size == "per-element" else ())
    return BpttSettings(
        weight=scheduled(settings.weight),
        every=settings.every,
        batch_size=settings.batch_size,
        steps=scheduled(settings.steps),
        unrolling=Unrolling(
            relaxation_map(settings, learned),
            settings.engine,
            Stop(fmax=settings.fmax or campaign.relaxations.fmax),
            settings.last,
            campaign.relaxations.cell,
            settings.fmax or Unrolling.minimum_fmax,
        ),
    )


def collect(context: StageContext) -> dict[str, Any]:
    return context.results()[0]

"""From what a configuration says about a training to what the trainer is told."""

from __future__ import annotations

from hpcft.config.training import Train
from hpcft.training.loss import Huber, Weights
from hpcft.training.schedule import scheduled
from hpcft.training.settings import BpttSettings, Lora, ReplaySettings, TrainingSettings


def settings_of(
    train: Train, *, seed: tuple[int, ...], relaxation: BpttSettings | None = None
) -> TrainingSettings:
    """The settings of a `train` section; its relaxation needs more than the section and comes from the caller."""
    replay, huber, lora, weights = train.replay, train.huber, train.lora, train.weights
    return TrainingSettings(
        epochs=train.epochs,
        batch_size=train.batch_size,
        steps_per_epoch=train.steps_per_epoch,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        weights=Weights(*(scheduled(weight) for weight in (weights.energy, weights.forces, weights.stress))),
        huber=None if huber is None else Huber(huber.energy, huber.forces, huber.stress),
        replay=None
        if replay is None
        else ReplaySettings(replay.batch_size, scheduled(replay.weight), replay.head),
        relaxation=relaxation,
        rates=train.rates,
        lora=None if lora is None else Lora(lora.rank, lora.alpha),
        ema=train.ema,
        patience=None if train.validation is None else train.validation.patience,
        max_edges=train.max_edges,
        gradient_clip=train.gradient_clip,
        checkpoint_every_epochs=train.checkpoint_every_epochs,
        checkpoint_every_s=60 * train.checkpoint_every_min,
        acceleration=train.acceleration,
        tf32=train.tf32,
        seed=seed,
    )

"""Training checkpoints: atomic, never without a good one, leftovers ignored."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpcft.models.files import is_whole
from hpcft.storage.atomic import write_bytes

# checkpoint-EPOCH.pt after whole epochs, checkpoint-EPOCH-STEP.pt within one.
_NAME = re.compile(r"checkpoint-(\d{6})(?:-(\d{6}))?\.pt")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """State after `epoch` whole epochs and `step` steps of the next.

    Batches are drawn by number and nothing else is random: so these two are the sampler's position and the state of every
    rank's generator, for any number of ranks.
    """

    epoch: int
    model: dict[str, Any]
    optimiser: dict[str, Any]
    history: list[dict[str, float]]
    setbacks: list[dict[str, Any]] = field(default_factory=list)
    """Each time that training went back to an earlier checkpoint; their number lowers the learning rate."""
    step_size: dict[str, Any] = field(default_factory=dict)
    """State of a relaxation's learnable step size; empty where there is none."""
    step: int = 0
    partial: dict[str, Any] = field(default_factory=dict)
    """What the steps of an epoch that is not over have shown, by name."""
    average: dict[str, Any] = field(default_factory=dict)
    """The moving average of the weights; empty where there is none."""
    best: dict[str, Any] = field(default_factory=dict)
    """`epoch`, validation `loss` and `model` of the best epoch; empty without validation."""
    speed: list[dict[str, float]] = field(default_factory=list)
    """Time and memory of each epoch: beside the history, which is the same for every run."""
    scaffold: dict[str, Any] = field(default_factory=dict)
    """Weights beside the model's own: the second head for replay data."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What makes two trainings the same."""

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.step


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a new file, and only then delete old ones: the newest two of whole epochs stay, and two since then.

    Old ones that a killed writer has left go first, or a series of kills would fill the disk.
    """
    _delete_old(folder)
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    within = f"-{checkpoint.step:06d}" if checkpoint.step else ""
    write_bytes(folder / f"checkpoint-{checkpoint.epoch:06d}{within}.pt", buffer.getvalue())
    _delete_old(folder)


def _delete_old(folder: Path) -> None:
    found = _existing(folder)
    whole = [position for position in found if not position[1]]
    since = [position for position in found if position[1] and position > max(whole, default=(0, 0))]
    for position, path in found.items():
        if position not in (*whole[-_KEPT:], *since[-_KEPT:]):
            path.unlink(missing_ok=True)


def load_latest(folder: Path, *, whole_epochs: bool = False) -> Checkpoint | None:
    """The newest checkpoint that reads back whole (of whole epochs only, if asked); None when there is none."""
    for position, path in reversed(_existing(folder).items()):
        if (whole_epochs and position[1]) or not is_whole(path):
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            return Checkpoint(**content)
        except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError, ValueError):
            continue
    return None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What two identities disagree on, each as `name: ours, not theirs`; nothing where one was never recorded."""
    if not theirs:
        return []
    return [
        f"{name}: {ours.get(name)}, not {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _existing(folder: Path) -> dict[tuple[int, int], Path]:
    """By epoch and step, the oldest first."""
    found = {}
    for path in folder.glob("checkpoint-*.pt"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[1]), int(match[2] or 0)] = path
    return dict(sorted(found.items()))

"""Training checkpoints: atomic, never without a good one, leftovers ignored."""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpcft.models.files import is_whole
from hpcft.storage.atomic import write_bytes

_NAME = re.compile(r"checkpoint-(\d{6})\.pt")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """State at the end of an epoch. Batches are drawn by number, so the epoch is also the sampler's position."""

    epoch: int
    model: dict[str, Any]
    optimiser: dict[str, Any]
    history: list[dict[str, float]]
    setbacks: list[dict[str, Any]] = field(default_factory=list)
    """Each time that training went back to an earlier checkpoint; their number lowers the learning rate."""
    step_size: dict[str, Any] = field(default_factory=dict)
    """State of a relaxation's learnable step size; empty where there is none."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a new file, and only then delete all but the newest two."""
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    write_bytes(folder / f"checkpoint-{checkpoint.epoch:06d}.pt", buffer.getvalue())
    for old in _existing(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that reads back whole; None when there is none."""
    for path in reversed(_existing(folder)):
        if not is_whole(path):
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            return Checkpoint(**content)
        except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError, ValueError):
            continue
    return None


def _existing(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))

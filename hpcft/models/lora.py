"""Low-rank adaptation of a MACE model (Hu et al., arXiv 2106.09685), by mace's own layers."""

from __future__ import annotations

from typing import Any

import torch

from hpcft.errors import UserError
from hpcft.models.protocol import Potential, as_module


def add_lora(potential: Potential, rank: int, alpha: float, seed: int = 0) -> None:
    """Put A B alpha / rank beside the linear maps; only A (small random numbers) and B (zeros) want gradients afterwards.

    Nothing changes yet in what the model says. UserError for an architecture without such layers.
    """
    from mace.modules.lora import inject_lora

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same matrices on every rank, and when a training is taken up again
        inject_lora(_model_of(potential), rank=rank, alpha=alpha)


def merge_lora(potential: Potential) -> None:
    """Add the products to the weights they stand beside: an ordinary model again, which every program reads."""
    from mace.modules.lora import merge_lora_weights

    merge_lora_weights(_model_of(potential))


def _model_of(potential: Potential) -> Any:
    if potential.architecture != "mace":
        raise UserError(
            f"LoRA is for MACE models; this one is '{potential.architecture}': leave train.lora out"
        )
    return as_module(potential).model

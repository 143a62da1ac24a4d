"""A second head of a MACE model, for data with another purpose: readouts of its own over the same messages.

mace-torch keeps the readouts of all heads in one matrix and masks those of the others; here a head is a view of the model that
shares every module but the readouts. Both are the same function.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from hpcft.errors import UserError
from hpcft.models.protocol import Potential, as_module

# What a head has for itself: ScaleShiftMACE's own names.
_OF_A_HEAD = ("readouts", "scale_shift", "embedding_readout")


def second_head(potential: Potential) -> Potential:
    """The same model with readouts of its own, equal at first; training one trains what they share for both.

    UserError for an architecture without heads.
    """
    view = _view(_mace(potential))
    model = view.model
    view.model = _view(model)
    for name in _OF_A_HEAD:
        if hasattr(model, name):
            setattr(view.model, name, copy.deepcopy(getattr(model, name)))
    return view  # type: ignore[no-any-return]


def on_head(potential: Potential, name: str) -> Potential:
    """The same model, weights included, on another of the heads that it has.

    UserError for an architecture without heads, and for a head that the model does not have.
    """
    from hpcft.models.mace import head_index

    view = _view(_mace(potential))
    view.head = head_index(view.model, name)
    return view  # type: ignore[no-any-return]


def own_parameters(head: Potential, potential: Potential) -> dict[str, torch.Tensor]:
    """The parameters of `head` that it does not share with `potential`, by name."""
    shared = {id(p) for p in as_module(potential).parameters()}
    return {name: p for name, p in as_module(head).named_parameters() if id(p) not in shared}


def _mace(potential: Potential) -> Any:
    if potential.architecture != "mace":
        raise UserError(
            f"heads are for MACE models; this one is '{potential.architecture}': write head: shared in train.replay"
        )
    return potential


def _view(module: Any) -> Any:
    """Another object with the same modules and tensors, in tables of its own."""
    view = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        view.__dict__[table] = dict(module.__dict__[table])
    return view

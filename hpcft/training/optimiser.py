"""Adam over groups of parameters with rates of their own, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hpcft.errors import UserError

_WARM_UP = 20  # the first 1/20 of the steps
_LAST_RATE = 0.01  # of the full learning rate


def parameter_groups(module: torch.nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, each with its `rate` (factor of the learning rate); frozen ones want no gradient.

    A parameter takes the factor of the first pattern that matches its name, or 1. UserError for a pattern that matches
    nothing, or when nothing is left to be learned.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    unused = set(rates)
    named = [(_plain(name), parameter) for name, parameter in module.named_parameters()]
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        pattern = next((pattern for pattern in rates if fnmatchcase(name, pattern)), None)
        unused.discard(pattern or "")
        rate = 1.0 if pattern is None else float(rates[pattern])
        if rate == 0:
            parameter.requires_grad_(False)
        else:
            groups.setdefault(rate, []).append(parameter)
    if unused:
        names = ", ".join(name for name, _ in named)
        raise UserError(
            f"no parameter of the model is called {', '.join(sorted(unused))}; its parameters are {names}"
        )
    if not groups:
        raise UserError("every parameter of the model is frozen, so nothing would be learned; free some")
    return [{"params": parameters, "rate": rate} for rate, parameters in groups.items()]


def _plain(name: str) -> str:
    """As the architecture calls it, without the names of what is around it."""
    return name.removeprefix("potential.").removeprefix("replay.").removeprefix("model.")


def learning_rate(full: float, step: int, total: int, schedule: str = "cosine") -> float:
    """After a warm-up of one twentieth of the run: a cosine from the full rate to a hundredth of it, or constant."""
    warm = max(1, total // _WARM_UP)
    if step < warm:
        return full * (step + 1) / warm
    if schedule == "constant":
        return full
    progress = (step - warm) / max(1, total - warm)
    return full * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


class MovingAverage:
    """Exponential moving average of parameters: a steadier model than the last step's.

    Its decay grows from 0.1 to the full one, min(decay, (1 + n) / (10 + n)) at step n, so that the start is soon forgotten.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self._averages = [p.detach().clone() for p in self._parameters]
        self._num_steps = 0

    def update(self) -> None:
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        current: list[Tensor] = [p.detach() for p in self._parameters]
        mean(self._averages, current, self._num_steps)
        self._num_steps += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """With the averages as the weights."""
        kept = [p.detach().clone() for p in self._parameters]
        self.copy_to_weights()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self._parameters), kept)

    def copy_to_weights(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self._parameters), self._averages)

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self._num_steps, "averages": [a.clone() for a in self._averages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._num_steps = int(state["num_steps"])
        with torch.no_grad():
            torch._foreach_copy_(
                self._averages, [a.to(b) for a, b in zip(state["averages"], self._averages, strict=True)]
            )

"""The random numbers of Langevin dynamics, drawn for many steps at a time: each replica's own stream, in its own order.

Drawn step by step they would have a GPU wait for the processor in each, and for their way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hpcft.md.replica import Replica

_MOST_STEPS = 16
# In a block, so that a batch of any size keeps it small.
_MOST_NUMBERS = 2**22


class Noise:
    """Standard normal numbers of one step after another, [n, 3]; zeros for a replica without friction, which draws none.

    `alone`: nothing else draws from these replicas' generators between two steps, so that several steps can be drawn at once.
    The generators are ahead then, until `give_back`.
    """

    def __init__(
        self,
        batch: Sequence[Replica],
        has_friction: Sequence[bool],
        to_tensor: Callable[[np.ndarray], Tensor],
        *,
        alone: bool,
    ) -> None:
        sizes = [len(replica.atoms) for replica in batch]
        ends = np.cumsum(sizes)
        self._num_atoms = int(ends[-1])
        self._drawing = [
            (replica, slice(end - size, end))
            for replica, size, end, draws in zip(batch, sizes, ends, has_friction, strict=True)
            if draws
        ]
        self._to_tensor = to_tensor
        self._num_steps = max(1, min(_MOST_STEPS, _MOST_NUMBERS // (3 * self._num_atoms))) if alone else 1
        self._alone = alone
        self._block_sn3: Tensor | None = None
        self._states: list[Any] = []
        self._used = 0

    def prepare(self) -> None:
        """Draw the next steps' if there are none left: while a GPU is at work on something else."""
        if self._alone and (self._block_sn3 is None or self._used == self._num_steps):
            self._draw()

    def next(self) -> Tensor:
        if self._block_sn3 is None or self._used == self._num_steps:
            self._draw()
        assert self._block_sn3 is not None
        self._used += 1
        return self._block_sn3[self._used - 1]

    def give_back(self) -> None:
        """Leave each generator where it would be, had its numbers been drawn step by step."""
        if self._block_sn3 is not None and self._used < self._num_steps:
            for (replica, rows), state in zip(self._drawing, self._states, strict=True):
                replica.random.bit_generator.state = state
                replica.random.standard_normal((self._used, rows.stop - rows.start, 3))
        self._block_sn3 = None

    def _draw(self) -> None:
        self._states = [replica.random.bit_generator.state for replica, _ in self._drawing]
        block_sn3 = np.zeros((self._num_steps, self._num_atoms, 3))
        for replica, rows in self._drawing:
            block_sn3[:, rows] = replica.random.standard_normal(block_sn3[:, rows].shape)
        self._block_sn3, self._used = self._to_tensor(block_sn3), 0

"""Which structures a step is made of, and what of them this rank computes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hpcft.training.data import LabelledSet, draw, share
from hpcft.training.loss import Counts, LabelledTerm, RelaxationTerm
from hpcft.training.rank import Rank
from hpcft.training.schedule import value_at
from hpcft.training.settings import TrainingData, TrainingSettings

Piece = tuple[list[LabelledTerm], RelaxationTerm | None]


class Batches:
    """The global batches of a training by the number of the step, the same for any number of ranks."""

    def __init__(
        self, data: TrainingData, settings: TrainingSettings, rank: Rank, device: torch.device
    ) -> None:
        self._data, self._settings, self._rank, self._device = data, settings, rank, device

    @property
    def steps_per_epoch(self) -> int:
        one_pass = math.ceil(len(self._data.labels) / self._settings.batch_size)
        return self._settings.steps_per_epoch or one_pass

    @contextlib.contextmanager
    def in_order(self) -> Iterator[Callable[[int], list[Piece]]]:
        """A function from the number of a step to its pieces, which may make those of the next step meanwhile."""
        wanted = self._settings.prefetch
        if not (self._device.type == "cuda" if wanted is None else wanted):
            yield self.pieces
            return
        waiting: dict[int, Future[list[Piece]]] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="next-batch", initializer=self._take_device) as thread:

            def pieces_of(step: int) -> list[Piece]:
                future = waiting.pop(step, None)
                waiting.clear()  # of a step from which training has gone back
                pieces = future.result() if future is not None else self.pieces(step)
                waiting[step + 1] = thread.submit(self.pieces, step + 1)
                return pieces

            yield pieces_of

    def _take_device(self) -> None:
        """A thread begins with GPU 0 as its current one."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def pieces(self, step: int) -> list[Piece]:
        """What this rank computes of a global batch: at once, or in pieces of at most `max_edges` edges."""
        relaxation = self._relaxation(step)
        terms = []
        for data, size, weight, name, stream in self._sources(step / self.steps_per_epoch):
            indices = self._drawn(data, size, step, stream)
            costs = data.num_atoms_each(indices)
            mine = [indices[i] for i in share(costs, self._rank.rank, self._rank.world_size)]
            counts = Counts(len(indices), sum(costs))
            chunks = [mine]
            if self._settings.max_edges is not None and mine:
                chunks = _chunks(mine, data.num_edges_each(mine), self._settings.max_edges)
            for chunk in chunks:
                batch = data.batch(chunk, self._device) if chunk else None
                terms.append(LabelledTerm(batch, counts, weight, name))
        if self._settings.max_edges is None:
            return [(terms, relaxation)]
        pieces: list[Piece] = [([term], None) for term in terms]
        return [*pieces, ([], relaxation)] if relaxation is not None else pieces

    def sizes(self, steps: Iterable[int]) -> tuple[int, int]:
        """Labelled structures and atoms in the global batches of these steps."""
        structures = atoms = 0
        for step in steps:
            for data, size, _, _, stream in self._sources(0.0):
                indices = self._drawn(data, size, step, stream)
                structures, atoms = structures + len(indices), atoms + data.num_atoms(indices)
        return structures, atoms

    def _sources(self, epoch: float) -> Iterator[tuple[LabelledSet, int, float, str, int]]:
        """Each labelled set with its structures in a batch, weight, name, and number of its random stream."""
        yield self._data.labels, self._settings.batch_size, 1.0, "labels", 0
        replay = self._settings.replay
        if replay is not None and self._data.replay is not None:
            yield self._data.replay, replay.batch_size, value_at(replay.weight, epoch), "replay", 1

    def _drawn(self, data: LabelledSet, size: int, step: int, stream: int) -> list[int]:
        return draw(len(data), size, step, (*self._settings.seed, stream))

    def _relaxation(self, step: int) -> RelaxationTerm | None:
        bptt, relaxations = self._settings.relaxation, self._data.relaxations
        if bptt is None or not relaxations or step % bptt.every:
            return None
        epoch = step / self.steps_per_epoch
        weight, steps = value_at(bptt.weight, epoch), round(value_at(bptt.steps, epoch))
        if weight == 0:
            return None
        number = step // bptt.every
        indices = draw(len(relaxations), bptt.batch_size, number, (*self._settings.seed, 2))
        pairs = [relaxations[i] for i in indices]
        costs = [len(pair.start) * min(steps, pair.num_steps or steps) for pair in pairs]
        mine = [pairs[i] for i in share(costs, self._rank.rank, self._rank.world_size)]
        return RelaxationTerm(mine, len(indices), weight, steps, bptt.unrolling)


def _chunks(indices: Sequence[int], costs: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive runs of `indices` whose costs add up to at most `most`; a dearer one is alone."""
    chunks: list[list[int]] = []
    total = math.inf
    for index, cost in zip(indices, costs, strict=True):
        if total + cost > most:
            chunks.append([])
            total = 0
        chunks[-1].append(index)
        total += cost
    return chunks

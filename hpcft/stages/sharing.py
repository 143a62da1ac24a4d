"""Light helpers that several stages need: no torch here, or only where it is called for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from hpcft.config.training import RelaxationTraining
from hpcft.stages.context import StageContext
from hpcft.storage.atomic import read_json
from hpcft.storage.structures import count_structures, evenly_spread, read_structures
from hpcft.storage.trajectory import Trajectory

if TYPE_CHECKING:
    from hpcft.relaxation import RelaxationMap, StepSize


def share_out(count: int, tasks: int) -> list[dict[str, Any]]:
    """Payloads that spread `count` replicas over at most `tasks` tasks, evenly and in order."""
    parts = np.array_split(np.arange(count), min(tasks, count))
    return [{"replicas": [int(i) for i in part]} for part in parts]


def stopped_in(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Why replicas were stopped, by their index, from the results of all tasks that had some."""
    stopped: dict[str, str] = {}
    for result in results:
        stopped |= result["stopped"]
    return stopped


def relaxation_map(settings: RelaxationTraining, step_size: StepSize | None = None) -> RelaxationMap:
    """The map that train.relaxation iterates, with its own step size or one that is learned."""
    from hpcft.relaxation import Descent, Fire

    if settings.map == "fire":
        return Fire(max_step=settings.max_step)
    return Descent(step_size or settings.step_size, settings.momentum, settings.max_step)


def learned_step_size(context: StageContext, round_: int) -> StepSize | None:
    """What the training of a round has made of the relaxation's step size; None where it was not learned, or in round 0."""
    from hpcft.relaxation import StepSize

    product = context.folder.stage(round_, "train").product
    values = read_json(product).get("step_size") if product.exists() else None
    return None if values is None else StepSize.from_values(values)


def energy_shifts(context: StageContext, round_: int) -> dict[int, float]:
    """What round 1 has added to the foundation's energy of each atom, by atomic number (eV); nothing in round 0."""
    if round_ == 0:
        return {}
    product = context.folder.stage(1, "train").product
    shifts = read_json(product).get("energy_shifts", {}) if product.exists() else {}
    return {atomic_numbers[symbol]: float(shift) for symbol, shift in shifts.items()}


def replay_structures(
    context: StageContext, shifts: Mapping[int, float], most: int | None = None
) -> list[Atoms]:
    """The foundation's own structures, or `most` of them evenly spread, with energies of the model's present zero."""
    from hpcft.training.energy_zero import shifted

    file = context.folder.inputs / "replay.h5"
    if most is None:
        return shifted(read_structures(file), shifts)
    return shifted(read_structures(file, evenly_spread(count_structures(file), most)), shifts)


def share_of(numbers: Sequence[int]) -> str:
    """Numbers as a plan keeps them, `0:100:8 5 9`: a million that are dealt out in turn must not make it long."""
    words = []
    start = 0
    while start < len(numbers):
        end = start + 1
        step = numbers[end] - numbers[start] if end < len(numbers) else 0
        while step and end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - start < 3:
            end = start + 1
            words.append(str(numbers[start]))
        else:
            words.append(f"{numbers[start]}:{numbers[end - 1] + step}:{step}")
        start = end
    return " ".join(words)


def numbers_of(share: str | Mapping[str, int]) -> list[int]:
    """What `share_of` has written, or the mapping that plans had in its place before."""
    if not isinstance(share, str):
        return list(range(share["first"], share["stop"], share["step"]))
    numbers: list[int] = []
    for word in share.split():
        first, *rest = map(int, word.split(":"))
        numbers += range(first, *rest) if rest else [first]
    return numbers


def work_of(payload: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Kind (frames, relaxations) and number of each item of a labelling task, in the order in which workers get them."""
    return [(kind, number) for kind in kinds_of(payload) for number in numbers_of(payload[kind])]


def kinds_of(payload: Mapping[str, Any]) -> Sequence[str]:
    """frames and relaxations, in the order in which a labelling task has them."""
    order: Sequence[str] = payload.get("order", ("frames", "relaxations"))  # as before plans said so
    return order


def last_states(context: StageContext) -> dict[int, dict[str, Any]]:
    """Where explore of the round before left each replica, by its index."""
    states: dict[int, dict[str, Any]] = {}
    for task in context.tasks_of("explore", context.round - 1):
        with Trajectory(task.path / "trajectory.h5") as trajectory:
            states |= {int(name): dict(state) for name, state in trajectory.checkpoint().items()}
    return states


def probe_frames(context: StageContext, wanted: Sequence[int] | None = None) -> list[Atoms]:
    """The frames that this round's probe has kept for the reference, numbered as everywhere; those of `wanted`, in its order."""
    frames: dict[int, Atoms] = {}
    first = 0
    for task in context.tasks_of("probe"):
        path = task.path / "frames.h5"
        count = count_structures(path)
        numbers = [
            n
            for n in (range(first, first + count) if wanted is None else wanted)
            if first <= n < first + count
        ]
        if numbers:
            frames |= zip(numbers, read_structures(path, [n - first for n in numbers]), strict=True)
        first += count
    return list(frames.values()) if wanted is None else [frames[number] for number in wanted]

"""Train: fine-tune the model of the round before on all labels so far, and on relaxed structures (BPTT)."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from hpcft.config.campaign import Campaign
from hpcft.errors import CampaignStopped, UserError
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.labels import relaxation_results_by_index, training_labels
from hpcft.stages.sharing import energy_shifts, learned_step_size, relaxation_map, replay_structures
from hpcft.storage.atomic import write_text

if TYPE_CHECKING:
    from hpcft.models.protocol import Potential
    from hpcft.relaxation import RelaxationPair
    from hpcft.training.settings import BpttSettings, TrainingData
    from hpcft.training.trainer import Trainer


def ranks(campaign: Campaign) -> int:
    return campaign.train.ranks


def plan(context: StageContext) -> list[dict[str, Any]]:
    return [{}]


def run(task: TaskContext) -> dict[str, Any]:
    import torch

    from hpcft.models.allocator import keep_freed_memory
    from hpcft.models.files import load_model, save_model, sha256_of
    from hpcft.training.distributed import choose_device, process_group
    from hpcft.training.from_config import settings_of
    from hpcft.training.trainer import Trainer

    keep_freed_memory()
    context = task.context
    device = choose_device(task.rank, context.device)
    dtype = getattr(torch, context.campaign.train.precision)
    start = context.model(context.round - 1)
    potential = load_model(start, dtype=dtype, device=device)
    labels = _labels(context)
    shifts = _align(context, potential, labels)
    data, refused = _data(context, potential, labels, shifts)
    with process_group(task.rank, task.path, device):
        settings = settings_of(
            context.campaign.train,
            seed=context.entropy("train", context.round),
            relaxation=_bptt(context, potential.elements),
        )
        trainer = Trainer(potential, data, settings, task.rank)
        log = _log_to(task, trainer)
        history = trainer.run(task.path, log, log, once(task.is_ending))
    final = task.path / "model.pt"
    if task.rank.is_first:
        provenance = {
            "campaign": context.campaign.name,
            "round": context.round,
            "start_sha256": sha256_of(start),
            "labels": len(labels),
            "relaxations": len(data.relaxations),
        }
        task.ensure_owned()
        save_model(final, potential, provenance)
    return {
        "labels": len(labels),
        "validation": 0 if data.validation is None else len(data.validation),
        "relaxations": len(data.relaxations),
        "relaxations_refused": refused,
        "energy_shifts": {chemical_symbols[number]: shift for number, shift in shifts.items()},
        "epochs": len(history),
        "best_epoch": trainer.best.get("epoch"),
        "first": history[0],
        "last": history[-1],
        "step_size": None if trainer.step_size is None else trainer.step_size.values(),
        "model_sha256": sha256_of(final) if task.rank.is_first else None,
    }


def once(happened: Callable[[], bool]) -> Callable[[], bool]:
    """True the first time that it has happened, and never again."""
    told = False

    def news() -> bool:
        nonlocal told
        if told or not happened():
            return False
        told = True
        return True

    return news


def _log_to(task: TaskContext, trainer: Trainer) -> Callable[[dict[str, Any]], None]:
    """Keeps metrics.jsonl equal to the history: a line for each epoch and setback, whatever was killed in between."""

    def write(row: dict[str, Any]) -> None:
        if task.rank.is_first:
            lines = "".join(json.dumps(line) + "\n" for line in trainer.log())
            write_text(task.path / "metrics.jsonl", lines)

    return write


def _labels(context: StageContext) -> list[Atoms]:
    structures = training_labels(context)
    if not structures:
        raise CampaignStopped(why_no_labels(context))
    return structures


def why_no_labels(context: StageContext) -> str:
    """What to tell where a round has nothing to train on: which guards stopped how many replicas of explore."""
    from hpcft.selection.q_residual import Q_RESIDUAL

    explore = context.campaign.explore
    guards = {
        "temperature": f"explore.max_temperature_K ({explore.temperature_limit_K:g} K)",
        "distance": f"explore.min_distance ({explore.min_distance:g} Å)",
        Q_RESIDUAL: f"explore.max_q_residual ({explore.max_q_residual})",
    }
    stopped = Counter(context.product("explore")["stopped"].values())
    said = [
        f"{count} replica{'s' * (count != 1)} by {guards.get(cause, f'the guard of {cause}')}"
        for cause, count in stopped.most_common()
    ]
    stops = f"Stopped in explore: {', '.join(said)}. " if said else ""
    return (
        f"round {context.round} has no labels to train on: no frame of explore stayed within the guards, or every label "
        f"failed. {stops}See `hpcft status`; "
        "a lower explore.temperature_K or timestep helps, or a guard that leaves room for the structures as they are."
    )


def _align(context: StageContext, potential: Potential, labels: Sequence[Atoms]) -> dict[int, float]:
    """In round 1 the model gets the reference's zero of energy; returns by how much each element's energy has moved."""
    from hpcft.training.energy_zero import fitted_shifts, shifts_to

    wanted = context.campaign.train.energy_zero
    if wanted == "keep" or context.round > 1:
        return energy_shifts(context, context.round - 1)
    shifts = fitted_shifts(potential, labels) if wanted == "fit" else shifts_to(potential, dict(wanted))
    potential.shift_energies(shifts)
    return shifts


def _data(
    context: StageContext, potential: Potential, labels: Sequence[Atoms], shifts: Mapping[int, float]
) -> tuple[TrainingData, list[str]]:
    from hpcft.models.protocol import dtype_of
    from hpcft.training.data import LabelledSet
    from hpcft.training.settings import TrainingData

    def labelled(structures: Sequence[Atoms], origin: str) -> LabelledSet:
        return LabelledSet(structures, potential.cutoff, dtype_of(potential), origin)

    train, replay, validation = context.campaign.train, None, None
    if train.replay is not None:
        replay = labelled(replay_structures(context, shifts), "replay")
    if train.validation is not None:
        labels, aside = set_aside(labels, train.validation.fraction)
        validation = labelled(aside, "the labels that were set aside")
    pairs, refused = _relaxations(context)
    return TrainingData(labelled(labels, "the labels"), replay, pairs, validation), refused


def set_aside(structures: Sequence[Atoms], fraction: float) -> tuple[list[Atoms], list[Atoms]]:
    """Structures to train on and to validate with, about `fraction` of all; the same structure always falls the same way.

    UserError unless there are two; one of each kind at least.
    """
    if len(structures) < 2:
        raise UserError("one label cannot be both trained on and validated with; leave train.validation out")
    places = [_place(atoms) for atoms in structures]
    bounds = sorted(places)
    bound = min(max(fraction, math.nextafter(bounds[0], 1)), bounds[-1])
    kept = [atoms for atoms, place in zip(structures, places, strict=True) if place >= bound]
    aside = [atoms for atoms, place in zip(structures, places, strict=True) if place < bound]
    return kept, aside


def _place(atoms: Atoms) -> float:
    """In [0, 1), by a hash of the structure."""
    content = b"".join(
        np.ascontiguousarray(a).tobytes() for a in (atoms.numbers, atoms.positions, atoms.cell.array)
    )
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


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


def _bptt(context: StageContext, elements: Sequence[int]) -> BpttSettings | None:
    from hpcft.relaxation import StepSize, Stop
    from hpcft.training.loss import Unrolling
    from hpcft.training.schedule import scheduled
    from hpcft.training.settings import BpttSettings

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

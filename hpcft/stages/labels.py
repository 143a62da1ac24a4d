"""What label and reference have produced, for the stages that need it. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from ase import Atoms

from hpcft.labelling.journal import Record
from hpcft.labelling.label import Label, Relaxation, with_label
from hpcft.labelling.shard import SHARD_FILE, read_frames, read_shard
from hpcft.stages.context import StageContext
from hpcft.stages.quarantine import quarantined
from hpcft.stages.sharing import work_of


def _records(context: StageContext, stage: str, round_: int) -> Iterator[tuple[str, int, Record]]:
    """(kind, number within that kind, record) of everything a label stage has finished, tasks set aside included.

    Labels in quarantine are left out.
    """
    where = context.folder.stage(round_, stage)
    left_out = quarantined(context, stage, round_)
    for index, payload in enumerate(context.plan(stage, round_)):
        task = where.task(index)
        if not (task.path / SHARD_FILE).exists():  # set aside before it had a single label
            continue
        work = work_of(payload)
        for record in read_shard(task.path):
            if (index, record.index, None) not in left_out:
                yield *work[record.index], record


def relaxation_frames(context: StageContext) -> list[Atoms]:
    """The labelled structures on the way of the training relaxations, which the reference has done in round 1."""
    found = []
    where = context.folder.stage(1, "label")
    left_out = quarantined(context, "label", 1)
    for index, payload in enumerate(context.plan("label", 1)):
        work = work_of(payload)
        folder = where.task(index).path
        for record in read_frames(folder) if (folder / SHARD_FILE).exists() else ():
            if (index, record.index, record.step) in left_out:
                continue
            atoms = _labelled(record)
            atoms.info["origin"] = f"step {record.step} of relaxation {work[record.index][1]}"
            found.append(atoms)
    return found


def _labelled(record: Record) -> Atoms:
    assert record.atoms is not None and isinstance(record.result, Label)
    return with_label(record.atoms, record.result)


def label_outcomes(context: StageContext, stage: str, round_: int | None = None) -> dict[int, Atoms]:
    """The labelled structures (REF_energy, REF_forces, REF_stress) by their number; failed ones, and suspect ones unless
    label.quarantine releases them, are missing.
    """
    found = {}
    for kind, number, record in _records(context, stage, context.round if round_ is None else round_):
        if kind == "frames" and isinstance(record.result, Label):
            found[number] = _labelled(record)
    return dict(sorted(found.items()))


def training_labels(context: StageContext) -> list[Atoms]:
    """Every label of this round and those before it that was paid for to train on."""
    found = relaxation_frames(context) if context.campaign.relaxations.learn_frames else []
    for round_ in range(1, context.round + 1):
        for number, atoms in label_outcomes(context, "label", round_).items():
            atoms.info["origin"] = f"frame {number} of round {round_}"  # for what is said about it
            found.append(atoms)
    return found


def relaxation_results_by_index(context: StageContext, stage: str, round_: int) -> dict[int, Relaxation]:
    """The converged reference relaxations; one that did not converge is never a target."""
    found = {}
    for kind, number, record in _records(context, stage, round_):
        result = record.result
        if kind == "relaxations" and isinstance(result, Relaxation) and result.converged:
            found[number] = result
    return dict(sorted(found.items()))

"""Sharded reference calculations: what the stages label and reference have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from hpcft.config.campaign import Campaign, Relaxations
from hpcft.config.label_run import Relaxation
from hpcft.config.settings import Settings
from hpcft.errors import CampaignStopped
from hpcft.labelling.item import Item, StoredItems, item_key
from hpcft.labelling.journal import Listing, Record, list_journals
from hpcft.labelling.presets import launcher
from hpcft.labelling.reference import Reference, reference_from
from hpcft.labelling.shard import SHARD_FILE, finish_shard
from hpcft.labelling.store import LabelStore
from hpcft.labelling.worker import label_items
from hpcft.stages.context import StageContext, TaskContext
from hpcft.stages.quarantine import find_suspects
from hpcft.stages.sharing import kinds_of, numbers_of
from hpcft.storage.atomic import create_json_once, read_json
from hpcft.storage.campaign_folder import RETRY_FAILURES, CampaignFolder, StageFolder

_SET_ASIDE = "set-aside"
_SHOWN = 3  # reasons in one message


def reference_of(context: StageContext) -> Reference:
    """Reads all files that its arguments name, a teacher's model too: not to be called for each of many tasks."""
    return reference_with(context.settings, context.mpi)


def reference_with(settings: Settings, mpi: Sequence[str]) -> Reference:
    """The same without a stage, for a site whose MPI launcher is `mpi`."""
    return reference_from(settings.reference, launcher(mpi, settings.label.ranks_per_calculation))


def provenance_of(
    where: StageFolder, settings: Settings, reference: Callable[[], Reference]
) -> dict[str, Any]:
    """What each file of labels says of the reference and the campaign: without it no store can tell whose they are.

    As a task of the stage has noted it, so that labels can be published where the reference's files are gone.
    """
    if where.provenance.exists():
        return dict(read_json(where.provenance))
    return _noted_provenance(where, settings, reference())


def _noted_provenance(where: StageFolder, settings: Settings, reference: Reference) -> dict[str, Any]:
    provenance: dict[str, Any] = reference.provenance() | {"campaign": settings.name}
    if not where.provenance.exists():
        create_json_once(where.provenance, provenance)
    return provenance


def relaxation_items(
    task: TaskContext, path: Path, settings: Relaxations | Relaxation | None
) -> Sequence[Item]:
    """The relaxations of a task, whose start structures are in the file at `path`, if there are any."""
    numbers = numbers_of(task.payload["relaxations"])
    if not numbers:
        return ()
    assert settings is not None
    fmax, max_steps, with_cell = settings.fmax, settings.max_steps, settings.cell

    def relaxation(atoms: Atoms) -> Item:
        free = atoms.copy()
        free.set_constraint()
        return Item.relaxation(free, fmax=fmax, max_steps=max_steps, with_cell=with_cell)

    return StoredItems(path, numbers, relaxation)


def run_shard(task: TaskContext, frames: Sequence[Item], relaxations: Sequence[Item] = ()) -> dict[str, Any]:
    """Label what is still missing of one shard: its frames and relaxations, each in the order of the payload's numbers.

    A label found in this campaign's earlier rounds, or in the store that it shares with others, is not paid for again, nor are
    those on the way of a relaxation that had another criterion.
    """
    context = task.context
    of_kind = {"frames": frames, "relaxations": relaxations}
    parts = [of_kind[kind] for kind in kinds_of(task.payload) if of_kind[kind]]
    items = parts[0] if len(parts) == 1 else [item for part in parts for item in part]
    reference = reference_of(context)
    provenance = _noted_provenance(context.here, context.settings, reference)
    known = _known(context, [item_key(item, reference) for item in items])
    start = time.monotonic()
    retry = task.path / RETRY_FAILURES
    causes = {*(read_json(retry)["causes"] if retry.exists() else ()), "interrupted"}
    summary = label_items(
        items,
        reference,
        task.path,
        known=known,
        ways=_ways(context, items, reference, known) if relaxations else {},
        attempt=task.attempt,
        workers=context.settings.label.workers,
        ranks=context.settings.label.ranks_per_calculation,
        cores=context.settings.label.resources.cpus_per_rank,
        retry_causes=causes,
    )
    task.ensure_owned()
    finish_shard(task.path, provenance)
    retry.unlink(missing_ok=True)
    published = read_json(task.path / SHARD_FILE)
    return {
        "items": summary.num_items,
        "done": summary.num_done,
        "failed": summary.num_failed,
        "frames_done": len(published["labels"]),
        "relaxation_frames": len(published["frames"]),
        "causes": dict(summary.causes),
        "wall_s": time.monotonic() - start,
    }


def stores_of(folder: CampaignFolder, settings: Settings) -> list[LabelStore]:
    """Where labels are looked up and registered: first the folder's own store, then the one that it shares."""
    shared = settings.label.store
    return [LabelStore(folder.labels), *([] if shared is None else [LabelStore(shared)])]


def _known(context: StageContext, keys: Sequence[str]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for store in stores_of(context.folder, context.settings):
        found |= store.find(set(keys) - found.keys())
    return found


def _ways(
    context: StageContext, items: Sequence[Item], reference: Reference, known: Mapping[str, Record]
) -> dict[int, list[Record]]:
    """What relaxations that began where these begin had on their way, by the number of the item."""
    starts = {
        index: item_key(Item.single_point(item.atoms), reference)
        for index, item in enumerate(items)
        if item.kind == "relaxation" and item_key(item, reference) not in known
    }
    found: dict[str, list[Record]] = {}
    for store in stores_of(context.folder, context.settings):
        found |= store.find_ways(set(starts.values()) - found.keys())
    return {index: found[key] for index, key in starts.items() if key in found}


def collect_shards(context: StageContext) -> dict[str, Any]:
    """Counts over all shards; stops the campaign when more than the tolerated share failed.

    What a task had labelled before it was set aside is kept; the rest of its items count as failed. All labels are
    registered here, at once: a task that had to look through what the others register would read 10,000 files.
    """
    results = [*context.results(), *_salvage(context)]
    _register(context)
    causes: dict[str, int] = {}
    for result in results:
        for cause, count in result["causes"].items():
            causes[cause] = causes.get(cause, 0) + count
    items, failed = (sum(result[key] for result in results) for key in ("items", "failed"))
    if items and failed / items > context.settings.label.tolerated_failures:
        raise CampaignStopped(_too_many_failed(context, failed, items, causes))
    done = sum(result["done"] for result in results)
    relaxations = sum(len(numbers_of(payload["relaxations"])) for payload in context.plan())
    frames = sum(result["frames_done"] for result in results)
    learnt, settings = {}, context.settings
    if isinstance(settings, Campaign) and settings.relaxations.learn_frames and context.stage == "label":
        learnt["relaxation_frames"] = sum(result.get("relaxation_frames", 0) for result in results)
    return {
        "items": items,
        "done": done,
        "failed": failed,
        "causes": causes,
        "relaxations": relaxations,
        "frames_done": frames,
        **learnt,
        "suspects": find_suspects(context, keep_tables=True),
    }


def _too_many_failed(context: StageContext, failed: int, items: int, causes: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} x {cause}" for cause, count in sorted(causes.items()))
    says = [
        f"{failed} of {items} reference calculations of round {context.round}, stage {context.stage} failed ({counts}), more "
        f"than label.tolerated_failures = {context.settings.label.tolerated_failures:g} allows."
    ]
    if causes.keys() - {_SET_ASIDE}:
        says.append(f"Each cause is in failures.json of its task, under {context.here.path}.")
    aside = sorted(context.here.read_set_aside().items())
    says += [f"Task {task} was set aside: {why.rstrip('.')}." for task, why in aside[:_SHOWN]]
    if len(aside) > _SHOWN:
        says.append(f"{len(aside) - _SHOWN} more tasks were set aside.")
    says.append(
        "`hpcft resume` tries the failed ones again; with a higher tolerance in its file, the command that began all this goes "
        "on without them."
    )
    return " ".join(says)


def _register(context: StageContext) -> None:
    own, *shared = stores_of(context.folder, context.settings)
    own.register_below(context.here.path)
    for store in shared:
        try:
            store.register_below(context.here.path)
        except OSError as error:
            raise CampaignStopped(
                f"the labels of round {context.round}, stage {context.stage} are safe in the campaign, but cannot be registered "
                f"in label.store = {store.folder} ({error.strerror}). Make that folder writable and `hpcft resume`, or leave "
                "label.store out and `hpcft run`."
            ) from error


def _salvage(context: StageContext) -> list[dict[str, Any]]:
    """Publish what tasks that were set aside have in their journals; a result for each of them."""
    aside = context.here.read_set_aside()
    if not aside:
        return []
    found = []
    plan = context.plan()
    provenance = provenance_of(context.here, context.settings, lambda: reference_of(context))
    for index in aside:
        where = context.here.task(index)
        items = sum(len(numbers_of(plan[index][kind])) for kind in ("frames", "relaxations"))
        listing = list_journals(where.path) if where.path.exists() else Listing({}, {})
        done = [entry for entry in listing.items.values() if entry.done]
        relaxation_frames = sum(map(len, listing.frames.values()))
        if (
            done or relaxation_frames
        ):  # a relaxation that never came to its end has labels on its way all the same
            finish_shard(where.path, provenance)
        failed = items - len(done)
        found.append(
            {
                "items": items,
                "done": len(done),
                "failed": failed,
                "frames_done": sum(entry.kind == "single-point" for entry in done),
                "relaxation_frames": relaxation_frames,
                "causes": {_SET_ASIDE: failed},
            }
        )
    return found

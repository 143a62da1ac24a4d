"""What a user does about failures: try tasks again, with more time or memory, or start again from a stage."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpcft.campaign.controllers import dismiss_controller
from hpcft.campaign.manager import bring_back, reopen_failures, write_marker
from hpcft.campaign.records import StageRecord, read_records
from hpcft.campaign.scheduler import Scheduler
from hpcft.campaign.settings import model_of, settings_of, site_of
from hpcft.campaign.tidy import tidy, untidy
from hpcft.config.fingerprint import PATIENCE_KEYS, fingerprint
from hpcft.errors import SchedulerUnavailable, UserError
from hpcft.storage.atomic import create_json_once, read_json, write_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder

_CANCEL_WAIT_S = 120.0


@dataclass(frozen=True)
class Retried:
    stage: StageRecord
    tasks: tuple[int, ...]
    """Tasks that get new attempts."""
    reopened: tuple[int, ...]
    """Tasks that were done and are run again for their failed labels."""


def retry(
    folder: CampaignFolder,
    *,
    stage: str | None = None,
    tasks: Sequence[int] | None = None,
    cause: str | None = None,
) -> Retried:
    """New attempts for tasks of the stage in progress that have failed or were set aside. The caller holds the lease.

    `cause` is that of an attempt's end (hpcft.campaign.records.Cause), of a failed label, or set-aside. Labels alone, on which
    nothing is built, may be finished: then they are in progress again. Raises UserError when nothing matches, or when the stage
    is finished.
    """
    current = read_records(folder).current
    if current is None and folder.kind == "label":
        with _finished_no_more(folder):
            return retry(folder, stage=stage, tasks=tasks, cause=cause)
    if current is None or (stage is not None and stage != current.name):
        raise UserError(_not_in_progress(folder, current, stage))
    return _try_again(folder, current, tasks, cause)


def _try_again(
    folder: CampaignFolder, current: StageRecord, tasks: Sequence[int] | None, cause: str | None
) -> Retried:
    where = folder.stage(current.round, current.name)
    chosen = [
        task
        for task in range(current.num_tasks or 0)
        if (tasks is None or task in tasks) and task not in current.done and _has_failed(current, task, cause)
    ]
    done = [task for task in current.done if tasks is None or task in tasks]
    reopened = reopen_failures(where, sorted(done), cause)
    if not chosen and not reopened:
        raise UserError(_nothing_to_retry(current, cause))
    write_marker(folder, current, time.time(), [*chosen, *reopened])
    for task in sorted(current.set_aside & set(chosen)):
        bring_back(where, task)
    return Retried(current, tuple(chosen), tuple(reopened))


@contextlib.contextmanager
def _finished_no_more(folder: CampaignFolder) -> Iterator[None]:
    """Labels alone are in progress again, with all that they had; finished as before if nothing is tried again."""
    [place] = folder.places()
    where = folder.stage(*place)
    product = read_json(where.product)
    if not product["failed"]:
        raise UserError(
            f"{folder.root} is finished and nothing in it has failed, so there is nothing to try again"
        )
    untidy(where)
    where.product.unlink()
    try:
        yield
    except UserError:
        write_json(where.product, product)
        tidy(where)
        raise


def _has_failed(stage: StageRecord, task: int, cause: str | None) -> bool:
    if cause == "set-aside":
        return task in stage.set_aside
    counted = [e for e in stage.endings.get(task, ()) if e.attempt > stage.counted_after(task)]
    return bool(counted) and (cause is None or counted[-1].cause == cause)


def _not_in_progress(folder: CampaignFolder, current: StageRecord | None, stage: str | None) -> str:
    where = "is finished" if current is None else f"is in stage {current.name} of round {current.round}"
    wish = f", not in {stage}" if current is not None else ""
    places = folder.places()
    number, name = places[0] if len(places) == 1 else ("N", stage or "STAGE")
    return (
        f"the campaign {where}{wish}. To run a finished stage again, with all that follows from it: hpcft rewind "
        f"{folder.root} --round {number} --stage {name} (labels that were paid for are found again, and old results "
        "are kept aside)"
    )


def _nothing_to_retry(stage: StageRecord, cause: str | None) -> str:
    seen = sorted({e.cause for endings in stage.endings.values() for e in endings})
    known = f"its failed attempts ended by {', '.join(seen)}" if seen else "none of its attempts has failed"
    return f"round {stage.round}, stage {stage.name} has no failed task{f' of cause {cause}' if cause else ''}: {known}"


def change_settings(folder: CampaignFolder, changes: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Change settings that decide no result, written `key.path=value`; returns old and new value by full key.

    `label.time_min` stands for `label.resources.time_min`. Raises UserError for any other key, and for a value that
    the campaign's schema refuses. The caller holds the lease.
    """
    import yaml

    identity = folder.read_identity()
    config = identity["config"]
    decided = fingerprint(config)
    changed: dict[str, tuple[Any, Any]] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        path = _full_path(config, key.strip().split("."))
        if not equals or path is None:
            raise UserError(
                f"--set {change}: write key=value with a key that may change while a campaign goes on "
                f"({', '.join(sorted(PATIENCE_KEYS))}), such as label.time_min=60"
            )
        section = config
        for name in path[:-1]:
            section = section[name]
        changed[".".join(path)] = (section[path[-1]], yaml.safe_load(text))
        section[path[-1]] = yaml.safe_load(text)
    try:
        model_of(identity).model_validate(config)
    except ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        raise UserError(
            f"--set {'.'.join(map(str, first['loc']))}: {first['msg']}; nothing was changed"
        ) from failure
    if fingerprint(config) != decided:
        raise UserError(
            f"--set {', '.join(changes)}: other data sets make other labels, and this campaign has some already; nothing was "
            "changed. Give the new potentials a campaign of their own."
        )
    write_json(folder.identity, identity)
    return changed


def _full_path(config: Mapping[str, Any], path: Sequence[str]) -> list[str] | None:
    """The keys down to a setting of patience; None if there is no such one."""
    if path[-1] not in PATIENCE_KEYS:
        return None
    for candidate in (list(path), [*path[:-1], "resources", path[-1]]):
        section: Any = config
        for name in candidate[:-1]:
            section = section.get(name) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping) and candidate[-1] in section:
            return candidate
    return None


def rewind(folder: CampaignFolder, round_: int, stage: str, scheduler: Scheduler) -> list[Path]:
    """Start again from a stage: it and all that came after it go to `aside/`; returns where. The caller holds the lease.

    Nothing is deleted, and labels stay in the label store, so none is paid for again. What waits or runs is cancelled
    first. Killed half-way, it has moved the later stages only: say it again. Raises UserError for a stage that has not
    begun, SchedulerUnavailable while Slurm does not confirm that nothing of the campaign runs any more.
    """
    refuse_unknown_place(folder, round_, stage)
    order = folder.places()
    later = order[order.index((round_, stage)) :]
    begun = [where for where in later if folder.stage(*where).path.exists()]
    _complete_what_was_killed(folder)
    if not folder.stage(round_, stage).path.exists():
        raise UserError(f"stage {stage} of round {round_} has not begun, so there is nothing to rewind")
    dismiss_controller(folder)
    cancel_everything(folder, scheduler)
    target = _new_aside(folder, round_, stage)
    moved = []
    for where in reversed(begun):
        old = folder.stage(*where)
        _publish_labels(folder, old)
        new = target / old.path.relative_to(folder.root)
        new.parent.mkdir(parents=True, exist_ok=True)
        old.path.rename(new)
        _register_labels(folder, new)
        moved.append(new)
    _forget_markers(folder, target, set(later))
    folder.stopped.unlink(missing_ok=True)
    shutil.rmtree(folder.report, ignore_errors=True)  # of rounds that are no more; made anew at the end
    return moved


def refuse_unknown_place(folder: CampaignFolder, round_: int, stage: str) -> None:
    """UserError for a stage that the campaign does not have in this round."""
    order = folder.places()
    if (round_, stage) not in order:
        there = ", ".join(name for number, name in order if number == round_)
        known = f"it has {there}" if there else f"the last round is {order[-1][0]}"
        raise UserError(f"round {round_} has no stage {stage}; {known}")


def _complete_what_was_killed(folder: CampaignFolder) -> None:
    """A rewind that died between moving a stage and telling the label store where its labels are now."""
    if folder.aside.exists():
        for moved in sorted(folder.aside.glob("*/round-*/*")):
            _register_labels(folder, moved)


def cancel_everything(
    folder: CampaignFolder, scheduler: Scheduler, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Cancel, and see that it has happened; returns how many jobs there were. The caller holds the lease.

    Raises SchedulerUnavailable while Slurm does not confirm that nothing of the campaign waits or runs any more.
    """
    deadline = time.monotonic() + _CANCEL_WAIT_S
    first = count = scheduler.cancel_all()
    while count:
        if time.monotonic() > deadline:
            raise SchedulerUnavailable(
                f"{count} jobs of {folder.root} are still there after {_CANCEL_WAIT_S:.0f} s; wait until squeue shows "
                "none, then say it again"
            )
        sleep(1.0)
        count = scheduler.cancel_all()
    return first


def _new_aside(folder: CampaignFolder, round_: int, stage: str) -> Path:
    folder.aside.mkdir(exist_ok=True)
    number = 1
    about = {"round": round_, "stage": stage, "at": time.time()}
    while not create_json_once(folder.aside / f"{number:04d}.json", about):
        number += 1
    target = folder.aside / f"{number:04d}"
    target.mkdir()
    return target


def _publish_labels(folder: CampaignFolder, stage: StageFolder) -> None:
    """Labels that unfinished tasks have in their journals become shards, which the store can hold."""
    journals = {path.parent for path in stage.path.glob("tasks/*/journal-*.jsonl")}
    if not journals:
        return
    from hpcft.labelling.shard import finish_shard
    from hpcft.stages.label_tasks import provenance_of, reference_with

    settings = settings_of(folder)
    provenance = provenance_of(
        stage, settings, lambda: reference_with(settings, site_of(folder).mpi_launcher)
    )
    for task in sorted(journals):
        finish_shard(task, provenance)


def _register_labels(folder: CampaignFolder, moved: Path) -> None:
    if moved.name in ("label", "reference"):
        from hpcft.stages.label_tasks import stores_of

        for store in stores_of(folder, settings_of(folder)):
            store.register_below(moved)


def _forget_markers(folder: CampaignFolder, target: Path, stages: set[tuple[int, str]]) -> None:
    """Markers speak of attempts by number; the stage that begins anew counts from 1 again."""
    for path in sorted(folder.resumes.glob("[0-9]*.json")):
        marker = read_json(path)
        if (marker["round"], marker["stage"]) in stages:
            (target / "resumes").mkdir(exist_ok=True)
            path.rename(target / "resumes" / path.name)

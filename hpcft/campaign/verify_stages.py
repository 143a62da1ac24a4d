"""Whether every stage has what it says and what those after it read: plan, product, results, data, as many as they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.campaign.archive import TRAJECTORY, left_out_before
from hpcft.campaign.verify import Findings, naming, sha256_of
from hpcft.labelling.shard import FAILURES_FILE, FRAMES_FILE, LABELS_FILE, RELAXATIONS_FILE, SHARD_FILE
from hpcft.labelling.store import LabelStore
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder
from hpcft.storage.structures import count_structures
from hpcft.storage.trajectory import Trajectory

_LABELLING = ("label", "reference")
_FILES = {
    "explore": (TRAJECTORY,),
    "select": ("selected.h5",),
    "label": (SHARD_FILE, FAILURES_FILE),
    "train": ("model.pt", "metrics.jsonl"),
    "probe": (TRAJECTORY, "frames.h5", "relaxed.h5"),
    "reference": (SHARD_FILE, FAILURES_FILE),
    "evaluate": (),
}


def check_stages(folder: CampaignFolder, findings: Findings) -> None:
    """Every stage that has been planned; what is asked of one in progress is that its tasks with a result have their data."""
    left_out = frozenset(left_out_before(folder))
    findings.num_left_out = sum(not (folder.root / name).exists() for name in left_out)
    places = folder.places()
    finished = [place for place in places if folder.stage(*place).product.exists()]
    findings.num_stages = len(finished)
    for place in places:
        check = _StageCheck(folder, findings, left_out, *place)
        with naming(findings, folder, check.where.path):
            if place in finished:
                check.finished()
            elif finished and places.index(place) < places.index(finished[-1]):
                check.add(
                    check.where.product, f"is missing, although later stages are finished; {check.remedy}"
                )
            elif check.where.plan.exists():
                check.tasks()
    with naming(findings, folder, folder.labels):
        _check_store(folder, findings)


@dataclass(frozen=True)
class _StageCheck:
    folder: CampaignFolder
    findings: Findings
    left_out: frozenset[str]
    round: int
    name: str

    @property
    def where(self) -> StageFolder:
        return self.folder.stage(self.round, self.name)

    @property
    def remedy(self) -> str:
        again = f"hpcft rewind {self.folder.root} --round {self.round} --stage {self.name}"
        return f"restore it from a backup, or do this stage and all after it again: {again}"

    def add(self, path: Path, text: str) -> None:
        self.findings.add(self._name(path), text)

    def finished(self) -> None:
        where = self.where
        if not where.plan.exists():
            self.add(where.plan, f"is missing; {self.remedy}")
        if where.results.exists() and not (where.history.exists() or where.outcomes.exists()):
            self.add(where.history, "is missing: how this stage came about is lost; restore it from a backup")
        if self._has_damaged_records():
            return
        count = len(read_json(where.plan)["tasks"])
        product = read_json(where.product)
        if product["tasks"] != count:
            self.add(
                where.product, f"counts {product['tasks']} tasks, but {count} were planned; {self.remedy}"
            )
        there = where.read_results().keys() | where.read_set_aside().keys()
        if missing := [str(task) for task in range(count) if task not in there]:
            self.add(where.results, f"has no result of task {', '.join(missing)}; {self.remedy}")
        self.tasks()
        if self.name in _LABELLING:
            self._check_totals(product)

    def tasks(self) -> None:
        """The data of every task that has a result."""
        if self._has_damaged_records():
            return
        plan = read_json(self.where.plan)["tasks"]
        for task, result in self.where.read_results().items():
            path = self.where.task(task).path
            missing = [name for name in _FILES[self.name] if not self._is_there(path / name)]
            for name in missing:
                self.add(path / name, f"is missing; {self.remedy}")
            if not missing:
                self._check_counts(path, plan[task], result)

    def _has_damaged_records(self) -> bool:
        """What these say cannot be compared then, and they have been told of already."""
        where = self.where
        records = [where.plan, where.product, where.results]
        records += where.outcomes.iterdir() if where.outcomes.exists() else []
        return any(self.findings.has(self._name(path)) for path in records)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder.root).as_posix()

    def _is_there(self, path: Path) -> bool:
        return path.exists() or self._name(path) in self.left_out

    def _check_counts(self, path: Path, payload: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        if self.name in ("explore", "probe") and (path / TRAJECTORY).exists():
            self._compare(path / TRAJECTORY, _count_frames, result["frames"], "frames")
        if self.name == "probe":
            self._compare(path / "frames.h5", count_structures, result["to_label"], "structures")
            self._compare(path / "relaxed.h5", count_structures, len(payload["relaxations"]), "structures")
        elif self.name == "select":
            self._compare(path / "selected.h5", count_structures, result["selected"], "structures")
        elif self.name == "train":
            self._compare(path / "model.pt", sha256_of, result["model_sha256"], "as its SHA-256")
        elif self.name in _LABELLING:
            self._check_shard(path, result)

    def _compare(self, path: Path, measure: Any, expected: Any, what: str) -> None:
        if self.findings.has(self._name(path)):
            return
        with naming(self.findings, self.folder, path):
            found = measure(path)
            if found != expected:
                self.add(path, f"has {found} {what}, but its record says {expected}; {self.remedy}")

    def _check_shard(self, path: Path, result: Mapping[str, Any]) -> None:
        shard = path / SHARD_FILE
        with naming(self.findings, self.folder, shard):
            contents = read_json(shard)
            frames, relaxations = len(contents["labels"]), len(contents["relaxations"])
            on_the_way = len(contents["frames"])
            files = ((LABELS_FILE, frames), (RELAXATIONS_FILE, relaxations), (FRAMES_FILE, on_the_way))
            for name, count in files:
                if count and not (path / name).exists():
                    self.add(path / name, f"is missing: {count} results are in it; {self.remedy}")
                elif count:
                    self._compare(path / name, count_structures, count, "structures")
            self._compare(path / FAILURES_FILE, _count_items, contents["num_failures"], "failures")
            said = (result["frames_done"], result["done"], result["failed"])
            if (frames, frames + relaxations, contents["num_failures"]) != said:
                self.add(
                    shard,
                    f"lists {frames} labels, {relaxations} relaxations and {contents['num_failures']} failures, but its "
                    f"task's result says {said[0]}, {said[1] - said[0]} and {said[2]}; {self.remedy}",
                )

    def _check_totals(self, product: Mapping[str, Any]) -> None:
        """Tasks that were set aside count with what they had labelled before."""
        shards = sorted(self.where.path.glob(f"tasks/*/{SHARD_FILE}"))
        if any(self.findings.has(self._name(shard)) for shard in shards):
            return
        frames = sum(len(read_json(shard)["labels"]) for shard in shards)
        if frames != product["frames_done"]:
            self.add(
                self.where.product,
                f"counts {product['frames_done']} labels, but its tasks have {frames}; {self.remedy}",
            )


def _count_frames(path: Path) -> int:
    with Trajectory(path) as trajectory:
        return sum(trajectory.num_frames(replica) for replica in trajectory.replicas)


def _count_items(path: Path) -> int:
    return len(read_json(path))


def _check_store(folder: CampaignFolder, findings: Findings) -> None:
    """Every shard of a stage that is over is where the label store will find it, or its labels would be paid for again."""
    indices = [path.relative_to(folder.root).as_posix() for path in folder.labels.glob("*")]
    if any(findings.has(name) for name in indices):
        return
    listed = LabelStore(folder.labels).listed()
    over = [path for path in folder.root.glob("round-*/*") if StageFolder(path).product.exists()]
    for stage in (*over, *folder.aside.glob("*/round-*/*")):
        for shard in sorted(stage.glob(f"tasks/*/{SHARD_FILE}")):
            with naming(findings, folder, shard):
                contents = read_json(shard)
                known = listed.get(shard.parent.resolve(), set())
                if lost := {*contents["labels"], *contents["relaxations"]} - known:
                    text = _not_listed(len(lost), folder.labels, stage)
                    findings.add(shard.relative_to(folder.root).as_posix(), text)


def _not_listed(count: int, store: Path, stage: Path) -> str:
    return (
        f"has {count} labels that label-store/ does not list, so they could be paid for again; restore label-store/ from a "
        f"backup, or in Python: LabelStore(Path({str(store)!r})).register_below(Path({str(stage)!r}))"
    )

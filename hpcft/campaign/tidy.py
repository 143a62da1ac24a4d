"""What a finished stage no longer needs is removed: a campaign leaves a few files per task."""

from __future__ import annotations

from hpcft.storage.campaign_folder import StageFolder

# All of it can be had again from what stays: labels are in the shards, the trained weights in the model.
_IN_TASKS = ("lock", "journal-*.jsonl", "checkpoint-*.pt", "segment-*.h5*", "rendezvous-*.json", ".tmp-*")


def tidy(stage: StageFolder) -> None:
    """Remove scaffolding of a stage whose product is written: safe to repeat, and harmless when interrupted."""
    for task in sorted((stage.path / "tasks").glob("*")):
        for pattern in _IN_TASKS:
            for path in task.glob(pattern):
                path.unlink(missing_ok=True)
    for jobs in (stage.path / "attempts").glob("*-jobs"):
        for path in [*jobs.glob("*.pkl"), *jobs.glob("*.sh"), *jobs.glob(".tmp-*")]:
            path.unlink(missing_ok=True)
        for log in jobs.glob("*_log.*"):
            if log.stat().st_size == 0:
                log.unlink(missing_ok=True)

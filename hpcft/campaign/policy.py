"""What becomes of a task whose attempts have failed: again, with more, elsewhere, or not any more. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.campaign.records import Cause, Ending, StageRecord

# These are the machine's doing, not the task's: they do not count as attempts, up to a bound of their own.
INTERRUPTIONS: frozenset[Cause] = frozenset({"node-failure", "preempted"})
# Slurm itself marks a dead node as down; this only covers the time until it has noticed.
AVOID_NODE_S = 3600.0
GROWTH = 2


@dataclass(frozen=True)
class Limits:
    """What bounds a stage. Sizes count jobs (array elements), of which each holds `tasks_per_job` tasks."""

    max_attempts: int = 3
    max_interruptions: int = 20
    max_running: int | None = None
    """Tasks that run at once."""
    max_array: int | None = None
    """Jobs of one submission; what is beyond follows in the next."""
    room: int | None = None
    """Jobs that may be submitted now."""
    tasks_per_job: int = 1
    tolerated: int = 0
    """Tasks that may be given up before the campaign stops."""
    time_min: int = 60
    memory_GB: float | None = None
    max_time_min: float | None = None
    """None: not known; infinite: there is none."""
    max_memory_GB: float | None = None
    num_nodes: int | None = None
    """Nodes on which the stage may run; None: not known."""


@dataclass(frozen=True)
class Needs:
    """What the next attempt asks for; None: what the campaign says."""

    time_min: int | None = None
    memory_GB: float | None = None
    exclude: tuple[str, ...] = ()
    """Nodes on which the task has just lost an attempt."""


@dataclass(frozen=True)
class GivenUp:
    why: str


def next_attempt(stage: StageRecord, task: int, limits: Limits, now: float) -> Needs | GivenUp:
    """What to ask for now that no attempt at the task runs any more, or why there is to be none.

    Time-outs and out-of-memory double what was asked for, up to the site's bound; a lost node is avoided for a
    while. Only attempts since the user last said to go on count.
    """
    endings = [e for e in stage.endings.get(task, ()) if e.attempt > stage.counted_after(task)]
    if not endings:
        return Needs()
    latest = endings[-1]
    error = stage.error(task, latest.attempt)
    if latest.cause == "error" and error is not None and error.get("final"):
        return GivenUp(str(error["message"]))
    faults = [e for e in endings if e.cause not in INTERRUPTIONS]
    if len(faults) >= limits.max_attempts or len(endings) - len(faults) >= limits.max_interruptions:
        return GivenUp(describe(latest, error["message"] if error else None))
    return Needs(
        _grown_time(endings, limits),
        _grown_memory(endings, limits),
        _avoided_nodes(endings, limits, now),
    )


def _avoided_nodes(endings: list[Ending], limits: Limits, now: float) -> tuple[str, ...]:
    """Nodes that have just failed, unless they are so many of the partition's that the task might find none."""
    failed = {e.node for e in endings if e.cause == "node-failure" and e.node and now - e.at < AVOID_NODE_S}
    if limits.num_nodes is not None and limits.num_nodes <= 2 * len(failed):
        return ()
    return tuple(sorted(failed))


def describe(ending: Ending, message: str | None = None) -> str:
    """How an attempt ended, in words that say what can be done about it."""
    words: dict[Cause, str] = {
        "error": message or "it ended with an error",
        "time-limit": "it ran into its time limit",
        "out-of-memory": "it ran out of memory",
        "node-failure": "its node failed",
        "preempted": "it was preempted and not requeued",
        "cancelled": "its job was cancelled",
        "failed": "its job failed before the task could say why",
        "lost": "it ended without a result or an error (killed, or out of memory?)",
    }
    where = f" on {ending.node}" if ending.node and ending.cause != "error" else ""
    detail = f" ({ending.detail})" if ending.detail and ending.cause != "error" else ""
    return f"{words[ending.cause]}{where}{detail}"


def _grown_time(endings: list[Ending], limits: Limits) -> int | None:
    times = sum(1 for e in endings if e.cause == "time-limit")
    if not times or limits.max_time_min is None:
        return None  # an unknown bound: more could wait for ever (PartitionConfig)
    return max(limits.time_min, int(min(limits.time_min * GROWTH**times, limits.max_time_min)))


def _grown_memory(endings: list[Ending], limits: Limits) -> float | None:
    exhausted = [e for e in endings if e.cause == "out-of-memory"]
    known = limits.memory_GB or next((e.memory_GB for e in exhausted if e.memory_GB), None)
    if not exhausted or known is None or limits.max_memory_GB is None:
        return None
    return max(known, min(float(known * GROWTH ** len(exhausted)), limits.max_memory_GB))

"""What the jobs of each stage ask for, read from a site and a campaign alone."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.cluster.limits import JobKind
from hpcft.config.campaign import STAGES, Campaign
from hpcft.config.settings import Settings
from hpcft.config.site import Site, Slurm

JOB_KINDS: tuple[JobKind, ...] = (*STAGES, "controller")


@dataclass(frozen=True)
class Job:
    """What one job of a stage asks for. None: a campaign decides that, and there is none."""

    stage: JobKind
    asked: Slurm
    processes: int
    """Ranks of one task, or as many tasks of one rank that share the job."""
    are_packed: bool
    cpus: int | None
    gpus: int
    memory_GB: float | None
    time_min: int | None


def job_kinds(settings: Settings | None) -> tuple[JobKind, ...]:
    """The kinds of jobs that there will be; all, where nobody knows what is to run."""
    return JOB_KINDS if settings is None else (*settings.stages, "controller")


def job_of(site: Site, stage: JobKind, settings: Settings | None) -> Job:
    """What the largest job of the stage asks for."""
    asked = site.slurm_for(stage) if site.executor == "slurm" else Slurm()
    if stage == "controller":
        own = site.controller
        return Job(stage, asked, 1, False, 1, asked.gpus_per_rank, own.memory_GB, own.time_min)
    ranks = ranks_of(settings, stage)
    packed = min(asked.tasks_per_job, max_tasks(settings, stage) or asked.tasks_per_job) if ranks == 1 else 1
    processes = ranks * packed
    gpus = asked.gpus_per_rank * processes
    if settings is None:
        return Job(stage, asked, processes, packed > 1, None, gpus, None, None)
    wish = settings.resources_for(stage)
    cpus = wish.cpus_per_rank * processes
    return Job(stage, asked, processes, packed > 1, cpus, gpus, wish.memory_GB, wish.time_min)


def ranks_of(settings: Settings | None, stage: JobKind) -> int:
    """Processes of one task; the stages' own `ranks` say the same, but bring torch with them."""
    return settings.train.ranks if isinstance(settings, Campaign) and stage == "train" else 1


def max_tasks(settings: Settings | None, stage: JobKind) -> int | None:
    """Tasks of the stage in one round at most; None: unknown."""
    if settings is None:
        return None
    shards = settings.label.shards
    spread = {"label": shards, "reference": shards}
    if isinstance(settings, Campaign):
        spread |= {"explore": settings.explore.tasks, "probe": settings.probe.tasks}
    return spread.get(stage, 1)

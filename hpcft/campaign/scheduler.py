"""The two ways to run tasks, seen alike: submit, look, cancel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from hpcft.campaign.decide import Observation
from hpcft.campaign.records import Attempt, Records, StageRecord, TaskKey
from hpcft.campaign.worker import run_task
from hpcft.cluster import local, slurm
from hpcft.cluster.executors import JobSpec, submit
from hpcft.config.campaign import Campaign
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable
from hpcft.storage.campaign_folder import CampaignFolder


class Scheduler:
    """Submits the tasks of one campaign to one site, and says which of them wait or run."""

    def __init__(self, folder: CampaignFolder, campaign: Campaign, site: Site) -> None:
        self.folder, self.campaign, self.site = folder, campaign, site
        self._prefix = f"hpcft-{folder.read_identity()['id']}-"

    def job_name(self, round_: int, stage: str, attempt: int) -> str:
        return f"{self._prefix}r{round_}-{stage}-{attempt}"

    def submit(self, round_: int, stage: str, tasks: Sequence[int], attempt: int, ranks: int) -> list[str]:
        """Job ids, one for each of `tasks`; held on Slurm until `release`."""
        spec = JobSpec(
            name=self.job_name(round_, stage, attempt),
            stage=stage,
            ranks=ranks,
            resources=self.campaign.resources_for(stage),  # type: ignore[arg-type]
            folder=self.folder.stage(round_, stage).logs(attempt),
        )
        root = str(self.folder.root)
        return submit(self.site, spec, run_task, [(root, round_, stage, task, attempt) for task in tasks])

    def release(self, job_ids: Sequence[str]) -> None:
        if self.site.executor == "slurm":
            slurm.release(job_ids)

    def cancel(self, job_ids: Sequence[str]) -> None:
        if job_ids and self.site.executor == "slurm":
            slurm.cancel(job_ids)

    def cancel_all(self) -> int:
        """End everything of this campaign that waits or runs; returns how many jobs that were."""
        if self.site.executor == "slurm":
            jobs = [job.job_id for job in slurm.queue(self._prefix)]
            self.cancel(jobs)
            return len(jobs)
        return local.cancel_below(self.folder.root)

    def observe(self, records: Records) -> Observation:
        """What waits or runs now; `known` is False when Slurm did not answer."""
        stage = records.current
        if stage is None or stage.num_tasks is None:
            return Observation()
        if self.site.executor == "local":
            return Observation(self._alive_locally(stage))
        try:
            jobs = slurm.queue(self._prefix)
        except SchedulerUnavailable:
            return Observation(known=False)
        return self._from_queue(stage, jobs)

    def _alive_locally(self, stage: StageRecord) -> frozenset[TaskKey]:
        where = self.folder.stage(stage.round, stage.name)
        alive = set()
        for task in stage.missing:
            attempt = stage.latest_attempt(task)
            if attempt is None:
                continue
            job_id = (attempt.job_ids or {}).get(task)
            lock = where.task(task).lock
            started = job_id is not None and local.job_is_alive(job_id, where.logs(attempt.number))
            if started or (lock.exists() and local.lock_is_held(lock)):
                alive.add((stage.round, stage.name, task))
        return frozenset(alive)

    def _from_queue(self, stage: StageRecord, jobs: Sequence[slurm.QueuedJob]) -> Observation:
        """Match by name and id; release what was recorded but not released; report what was never recorded.

        Jobs of earlier stages may still be completing: they are nobody's business any more.
        """
        alive: set[TaskKey] = set()
        strays: list[str] = []
        held: list[str] = []
        by_name = {a.job_name: a for a in stage.attempts}
        for job in jobs:
            attempt = by_name.get(job.name)
            if attempt is None:
                continue
            task = _task_of(attempt, job.job_id)
            if task is None:
                strays.append(job.job_id)
            else:
                alive.add((stage.round, stage.name, task))
                if job.is_held:
                    held.append(job.job_id)
        if held:
            with contextlib.suppress(SchedulerUnavailable):  # the next look tries again
                self.release(held)
        return Observation(frozenset(alive), True, tuple(strays))


def _task_of(attempt: Attempt, job_id: str) -> int | None:
    """The task that a job runs; None for a job whose submission was not recorded."""
    recorded = attempt.job_ids or {}
    return next((task for task, known in recorded.items() if known == job_id), None)
